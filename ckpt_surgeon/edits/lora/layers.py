"""The tensors of an adapter by layer and role, in the names of PEFT, kohya, LyCORIS and diffusers.

============  =======================================================================================================
PEFT          ``base_model.model.PATH.lora_A.weight``, ``.lora_A.NAME.weight``, ``.lora_embedding_A``,
              ``.lora_magnitude_vector``, ``.hada_w1_a``, ``.lokr_w1`` (``peft/utils/save_and_load.py``)
kohya         ``lora_unet_PATH_WITH_UNDERSCORES.lora_down.weight``, ``.lora_up.weight``, ``.lora_mid.weight``,
              ``.alpha``, ``.dora_scale`` (sd-scripts ``networks/lora.py``)
LyCORIS       the same paths with ``.hada_w1_a`` …, ``.lokr_w1`` …, ``.diff``, ``.diff_b``, ``.w_norm``, ``.b_norm``
diffusers     ``unet.PATH.lora.down.weight``, ``unet.PATH.lora_A.weight``, ``….processor.to_q_lora.down.weight``,
              ``text_encoder.PATH.lora_linear_layer.down.weight`` (``loaders/lora_conversion_utils.py``)
============  =======================================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ...errors import EditError, Either, Phrase, listed
from ...tensors.records import Tensor

_NAME = r"(?:\.(?P<name>(?!weight$|bias$)[^.]+))?"  # what PEFT calls the adapter, where a key says it
_HALVES = {"A": "down", "B": "up", "down": "down", "up": "up", "mid": "mid"}
_FORMS = [
    (re.compile(pattern), role)
    for pattern, role in (
        (rf"\.lora_(?P<half>[AB]){_NAME}\.weight", ""),
        (rf"\.lora_B{_NAME}\.bias", "up_bias"),
        (rf"\.lora_embedding_(?P<half>[AB]){_NAME}(?:\.weight)?", "embedding_"),
        (rf"\.lora_magnitude_vector{_NAME}(?:\.weight)?", "magnitude"),
        (r"\.lora_(?P<half>down|up|mid)\.weight", ""),
        (r"\.lora(?:_linear_layer)?\.(?P<half>down|up)\.weight", ""),
        (r"_lora\.(?P<half>down|up)\.weight", ""),
        (rf"\.(?P<part>hada_[wt][12](?:_[ab])?|lokr_(?:w[12](?:_[ab])?|t2)){_NAME}", ""),
        (r"\.alpha", "alpha"),
        (r"\.dora_scale", "dora_scale"),
        (r"\.(?:diff|w_norm)", "difference"),
        (r"\.(?:diff_b|b_norm)", "bias_difference"),
        (rf"\.token_adapter\.trainable_tokens_delta{_NAME}", "tokens"),
    )
]
_ENDS = [re.compile(f"(?P<module>.+?){form.pattern}") for form, _ in _FORMS]
_PROCESSOR = re.compile(r"(.+)\.processor\.(to_(?:q|k|v|out))")
_WRAPPERS = re.compile(r"\.(?:base_layer|modules_to_save(?:\.(?:default|adapter))?)(?=\.|$)")
_LONE = ("alpha", "dora_scale", "difference", "bias_difference")  # of which a layer of a model may have its own
PEFT_PREFIX = "base_model.model."


@dataclass(slots=True)
class Layer:
    """The tensors of one layer of an adapter, by their roles: ``module`` is its path as the adapter spells it."""

    module: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)  # of each role the key in the file

    def has(self, *roles: str) -> bool:
        """Whether all of these roles are there."""
        return all(role in self.tensors for role in roles)


@dataclass(slots=True)
class Adapter:
    """An adapter file: its layers by their paths, and whole tensors (of modules that were trained) by theirs."""

    label: str
    layers: dict[str, Layer] = field(default_factory=dict)
    plain: dict[str, tuple[str, Tensor]] = field(default_factory=dict)  # path: the key in the file, and the tensor
    is_peft: bool = False

    @property
    def keys(self) -> Iterator[str]:
        """Every key that counts."""
        for layer in self.layers.values():
            yield from layer.keys.values()
        yield from (key for key, _ in self.plain.values())


def parsed(label: str, tensors: Mapping[str, Tensor]) -> Adapter:
    """An adapter's tensors by layer and role.  Raises EditError for a file without any, or with several adapters."""
    found = Adapter(label, is_peft=any(key.startswith(PEFT_PREFIX) for key in tensors))
    names: dict[str, None] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        read = role_of(key)
        if read is None:
            others[key] = tensor
            continue
        module, role, name = read
        names.update({name: None} if name else {})
        layer = found.layers.setdefault(module, Layer(module))
        layer.tensors[role], layer.keys[role] = tensor, key
    if len(names) > 1:
        problem = f"{label} holds {len(names)} adapters ({listed(names)})"
        raise EditError([problem], remedy=Phrase("keep one first (", Either("ckpt_surgeon.keep", "ckpt keep"), ")"))
    for module in [module for module, layer in found.layers.items() if not set(layer.tensors) - set(_LONE[:1])]:
        layer = found.layers.pop(module)  # a parameter of the model that is called alpha
        others.update((layer.keys[role], tensor) for role, tensor in layer.tensors.items())
    if not found.layers and not found.is_peft:
        raise EditError([f"{label} is no adapter that is known: no key of it names a part of one"])
    _add_plain(found, others)
    return found


def role_of(key: str) -> tuple[str, str, str] | None:
    """The layer, the role in it and PEFT's name of the adapter ("" for none) that a key says; None for other keys.

    >>> role_of("base_model.model.fc.lora_A.default.weight"), role_of("lora_unet_mid_proj.lora_down.weight")
    (('fc', 'down', 'default'), ('lora_unet_mid_proj', 'down', ''))
    >>> role_of("unet.mid.attn1.processor.to_out_lora.up.weight")
    ('unet.mid.attn1.to_out.0', 'up', '')
    """
    for (_, role), end in zip(_FORMS, _ENDS, strict=True):
        match = end.fullmatch(key)
        if match is None:
            continue
        groups = match.groupdict()
        half = _HALVES.get(groups.get("half") or "", "")
        return module_path(groups["module"]), role + half + (groups.get("part") or ""), groups.get("name") or ""
    return None


def module_path(module: str) -> str:
    """A path without what PEFT wraps around the model and its layers, and without diffusers' processors.

    >>> module_path("base_model.model.head.modules_to_save.default.dense"), module_path("fc.base_layer")
    ('head.dense', 'fc')
    """
    path = _WRAPPERS.sub("", module.removeprefix(PEFT_PREFIX))
    if found := _PROCESSOR.fullmatch(path):
        path = f"{found[1]}.{found[2]}" + (".0" if found[2] == "to_out" else "")
    return path


def _add_plain(found: Adapter, others: Mapping[str, Tensor]) -> None:
    """Whole tensors: what PEFT trained counts, its copies of the originals do not."""
    for key, tensor in others.items():
        if ".original_module." in key:
            continue
        path = module_path(key)
        if path not in found.plain or ".modules_to_save." in key:
            found.plain[path] = (key, tensor)
