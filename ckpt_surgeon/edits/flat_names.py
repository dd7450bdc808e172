"""Flattened names: kohya's and LyCORIS' trainers write a module's path with ``_`` for the dots."""

from __future__ import annotations

# What these trainers put in front of the path, for the part of the pipeline that it belongs to.
FLAT_PREFIXES = (
    "lora_unet_",
    "lora_te_",
    "lora_te1_",
    "lora_te2_",
    "lora_te3_",
    "lora_transformer_",
    "lora_prior_unet_",
    "lycoris_",
)
HALVES = {"lora_down": "lora_A", "lora_up": "lora_B"}  # kohya's names and PEFT's


def flat(path: str) -> str:
    """A path with ``_`` for the dots.

    >>> flat("mid_block.attentions.0.proj_in")
    'mid_block_attentions_0_proj_in'
    """
    return path.replace(".", "_")


def flat_prefix(path: str) -> str:
    """The prefix of a flattened path that says which part of a pipeline it is of, "" for none.

    >>> flat_prefix("lora_te1_text_model_encoder_layers_0_mlp_fc1")
    'lora_te1_'
    """
    return next((prefix for prefix in FLAT_PREFIXES if path.startswith(prefix)), "")


def halves(rest: str) -> str:
    """The components behind a layer's path, kohya's halves of a pair in PEFT's names.

    >>> halves("lora_down.weight")
    'lora_A.weight'
    """
    return ".".join(HALVES.get(part, part) for part in rest.split("."))
