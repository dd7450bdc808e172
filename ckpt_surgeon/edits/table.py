"""Every edit by its name: the module that has it, and its line in ``ckpt --help``, which imports none of them.

The lines are in the order in which edits are listed.  An edit says all of this itself, too; the tests compare.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from importlib import import_module
from typing import NamedTuple, TypeVar

Made = TypeVar("Made")  # what stands for an edit

KEYS, VALUES, COMBINE = "Edit keys", "Edit values", "Combine"  # groups of ``ckpt --help``


class Listed(NamedTuple):
    """Where an edit is, and what ``ckpt --help`` says of it."""

    module: str
    group: str
    short_help: str


TABLE: dict[str, Listed] = {
    "strip_prefix": Listed("keys", KEYS, "Take module. and other prefixes off the keys."),
    "add_prefix": Listed("keys", KEYS, "Put a prefix in front of the keys."),
    "rename": Listed("keys", KEYS, "Rename keys by components, indices, patterns."),
    "keep": Listed("keys", KEYS, "Keep some keys only."),
    "drop": Listed("keys", KEYS, "Drop some keys."),
    "select": Listed("keys", KEYS, "Take one sub-tree, its prefix stripped."),
    "cast": Listed("values", VALUES, "Convert to another dtype."),
    "scale": Listed("values", VALUES, "Multiply by a factor."),
    "reshape": Listed("values", VALUES, "Give tensors another shape."),
    "transpose": Listed("values", VALUES, "Permute dimensions."),
    "slice": Listed("values", VALUES, "Take some indices of a dimension."),
    "pad": Listed("values", VALUES, "Add indices to a dimension."),
    "concat": Listed("combine", VALUES, "Join tensors (q, k, v into qkv)."),
    "split": Listed("combine", VALUES, "Take tensors apart (qkv into q, k, v)."),
    "stack": Listed("combine", VALUES, "Stack tensors (experts) along a new dimension."),
    "unstack": Listed("combine", VALUES, "Take a stack of tensors apart."),
    "sum": Listed("combine", VALUES, "Sum tensors (RepVGG's branches)."),
    "fold": Listed("fold", VALUES, "Fold weight norm, spectral norm, masks."),
    "fold_norm": Listed("norms", VALUES, "Fold batch norms into the layers before them."),
    "norm_to_conv": Listed("norms", VALUES, "Make convolutions of batch norms that stand alone."),
    "dequantize": Listed("quantised", VALUES, "Turn codes and scales into plain weights."),
    "quantize": Listed("quantize", VALUES, "Round weights to codes of ggml, for a GGUF file."),
    "rotary": Listed("rotary", VALUES, "Reorder the rows of queries and keys for rotary embeddings."),
    "resize_rows": Listed("resize", VALUES, "Cut or pad rows (vocabularies, class heads)."),
    "map_classes": Listed("resize", VALUES, "Reorder a head's rows by class name."),
    "resize_channels": Listed("resize", VALUES, "Change the input channels of convolutions."),
    "resize_grid": Listed("resize", VALUES, "Interpolate position embeddings."),
    "resize_bias_table": Listed("resize", VALUES, "Interpolate relative-position tables."),
    "resize_kernel": Listed("kernels", VALUES, "Resize patch embeddings (ViT)."),
    "inflate": Listed("kernels", VALUES, "Inflate 2D convolutions to 3D."),
    "join": Listed("join", COMBINE, "Join checkpoints into one."),
    "graft": Listed("join", COMBINE, "Take a part of another checkpoint."),
    "average": Listed("averages", COMBINE, "Average checkpoints."),
    "ema": Listed("averages", COMBINE, "Average with weights that decay."),
    "lerp": Listed("averages", COMBINE, "Interpolate between two checkpoints."),
    "slerp": Listed("averages", COMBINE, "Interpolate on the sphere."),
    "subtract": Listed("deltas", COMBINE, "The difference of two checkpoints."),
    "add": Listed("deltas", COMBINE, "Add a difference to a checkpoint."),
    "merge": Listed("deltas", COMBINE, "Merge fine-tunings of one base."),
    "extract_lora": Listed("lora.extracting", COMBINE, "Make a LoRA adapter of a difference."),
    "merge_lora": Listed("lora.merging", COMBINE, "Merge LoRA adapters into their base."),
}


class Edits(MutableMapping[str, Made]):
    """Every edit by its name; its module is imported when it is asked for, all of them where all are.

    >>> from ckpt_surgeon.edits.change import EDITS
    >>> EDITS["strip_prefix"].group
    'Edit keys'
    """

    def __init__(self) -> None:
        self._made: dict[str, Made] = {}

    def __getitem__(self, name: str) -> Made:
        if name not in self._made and name in TABLE:
            import_module(f".{TABLE[name].module}", __package__)
        return self._made[name]

    def __setitem__(self, name: str, edit: Made) -> None:
        self._made[name] = edit

    def __delitem__(self, name: str) -> None:
        del self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in TABLE or name in self._made

    def __iter__(self) -> Iterator[str]:
        yield from TABLE
        yield from (name for name in list(self._made) if name not in TABLE)

    def __len__(self) -> int:
        return len(list(iter(self)))
