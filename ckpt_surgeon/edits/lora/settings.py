"""What is stated beside an adapter's tensors: alpha, rank, rsLoRA, how weights lie."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...errors import Argument, EditError, Phrase, listed
from ...tensors.checkpoint import PEFT_CONFIG, Checkpoint

DIFFUSERS_CONFIG = "lora_adapter_metadata"  # diffusers' (``loaders/lora_base.py``): settings of all parts, as JSON
KINDS = ("LORA", "LOHA", "LOKR")  # of PEFT's, those that are merged here
_CHANGED_BASES = ("pissa", "corda", "olora", "loftq", "lora_ga")  # initialisations that alter the base's weights
_VARIANTS = ("alora_invocation_tokens", "arrow_config", "use_qalora", "kasa_config", "use_bdlora", "layer_replication",
             "monteclora_config", "target_parameters")  # fmt: skip
_PLAIN_PATTERN = re.compile(r"\^?[\w.\-]*\$?")


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one adapter; ``stated`` is PEFT's configuration, None where there is none."""

    label: str
    stated: Mapping[str, object] | None = None
    alpha: float = 0.0  # one that the caller gives for all layers
    rslora: bool = False
    fan_in_fan_out: bool = False
    is_peft: bool = False

    def says(self, name: str) -> object:
        """One entry of the configuration."""
        return (self.stated or {}).get(name)

    @property
    def is_transposed(self) -> bool | None:
        """Whether weights are stored as (inputs, outputs), as Conv1D of transformers has them; None is not said."""
        if self.fan_in_fan_out:
            return True
        return None if self.stated is None else bool(self.says("fan_in_fan_out"))

    def scaling(self, module: str) -> Callable[[int, float | None], float]:
        """What a layer's product is multiplied by: alpha ÷ rank, or alpha ÷ √rank for rsLoRA (arXiv 2312.03732).

        It is asked with the rank, and the alpha of a tensor beside the layer.  Files of kohya and diffusers that
        state none mean the rank (sd-scripts ``networks/lora.py``; diffusers ``utils/peft_utils.py``).
        """
        stated = self._number("alpha", module)
        is_root = self.rslora or bool(self.says("use_rslora"))

        def factor(rank: int, alpha: float | None) -> float:
            return (self.alpha or alpha or stated or float(rank)) / (math.sqrt(rank) if is_root else rank)

        return factor

    @property
    def needs_alpha(self) -> bool:
        """Whether a layer without an alpha of its own has none, so that the caller has to say it."""
        return self.is_peft and self.stated is None and not self.alpha

    def rank(self, module: str) -> int:
        """The rank that the configuration says; 0 where it says none."""
        return int(self._number("r", module))

    def tokens(self, module: str) -> list[int]:
        """The rows of an embedding that were trained by themselves (``trainable_token_indices``)."""
        said = self.says("trainable_token_indices")
        for name, rows in said.items() if isinstance(said, Mapping) else ():
            if _answers(str(name), module):
                said = rows
        return [int(row) for row in said] if isinstance(said, list) else []

    @property
    def patterns(self) -> list[str]:
        """The regular expressions of the configuration that modules are matched with."""
        tables = (self.says(name) for name in ("rank_pattern", "alpha_pattern", "trainable_token_indices"))
        names = (str(name) for table in tables if isinstance(table, Mapping) for name in table)
        return [_expression(name) for name in names if not name.endswith("..*") and not _PLAIN_PATTERN.fullmatch(name)]

    def _number(self, name: str, module: str) -> float:
        """``r`` or ``alpha`` of a layer, by its pattern (``peft.utils.other.get_pattern_key``)."""
        patterns = self.says("rank_pattern" if name == "r" else "alpha_pattern")
        found = self.says("r") if name == "r" else self.says("lora_alpha") or self.says("alpha")
        for pattern, value in patterns.items() if isinstance(patterns, Mapping) else ():
            if _answers(str(pattern), module):
                found = value
                break
        return float(found) if isinstance(found, (int, float)) else 0.0


def settings_of(
    label: str, adapter: Checkpoint, *, is_peft: bool, alpha: float, rslora: bool, fan_in_fan_out: bool
) -> Settings:
    """The settings that come with an adapter, and those that the caller gives.  Raises EditError for other kinds."""
    stated = _stated(label, adapter.metadata)
    if stated is not None:
        _check(label, stated)
    return Settings(label, stated, alpha, rslora, fan_in_fan_out, is_peft)


def _stated(label: str, metadata: Mapping[str, str]) -> Mapping[str, object] | None:
    try:
        if PEFT_CONFIG in metadata:
            found = json.loads(metadata[PEFT_CONFIG])
        elif DIFFUSERS_CONFIG in metadata:
            found = _of_parts(json.loads(metadata[DIFFUSERS_CONFIG]))
        else:
            return None
    except (ValueError, RecursionError, AttributeError) as error:
        raise EditError([f"the configuration of {label} is no JSON ({error})"]) from None
    if not isinstance(found, dict):
        raise EditError([f"the configuration of {label} is no table of settings"])
    return found


def _of_parts(found: Mapping[str, object]) -> dict[str, object]:
    """diffusers' settings, ``unet.lora_alpha`` …, as one configuration: what parts differ in becomes patterns."""
    parts: dict[str, dict[str, object]] = {}
    for name, value in found.items():
        part, _, setting = name.partition(".")
        parts.setdefault(part, {})[setting] = value
    whole: dict[str, object] = {"alpha_pattern": {}, "rank_pattern": {}, "use_rslora": False}
    for part, settings in parts.items():
        for name, patterns in (("lora_alpha", "alpha_pattern"), ("r", "rank_pattern")):
            made = whole[patterns]
            assert isinstance(made, dict)
            own = settings.get(patterns)
            made.update(
                {rf"{part}\.(?:.*\.)?(?:{key})": value for key, value in own.items()} if isinstance(own, dict) else {}
            )
            made[f"{part}..*"] = settings.get(name)
        whole["use_rslora"] = bool(whole["use_rslora"] or settings.get("use_rslora"))
    return whole


def _check(label: str, stated: Mapping[str, object]) -> None:
    """Raise EditError for adapters whose formula is another one, or whose base is not the published one."""
    kind = str(stated.get("peft_type", "LORA"))
    if kind not in KINDS:
        raise EditError([f"{label} is of PEFT's kind {kind}; merged here are {listed(KINDS)}"],
                        remedy="merge it with PEFT's merge_and_unload")  # fmt: skip
    if variants := [name for name in _VARIANTS if stated.get(name)]:
        raise EditError([f"{label} uses {listed(variants)}, which is not merged here"],
                        remedy="merge it with PEFT's merge_and_unload")  # fmt: skip
    start = str(stated.get("init_lora_weights", "")).lower()
    if start.startswith(_CHANGED_BASES):
        problem = f"{label} began with {start}, which alters the base's weights: it fits the altered base alone"
        way = Phrase("save it with PEFT's path_initial_model_for_weight_conversion; or, if the base is the altered ",
                     f"one, set init_lora_weights to true in its {PEFT_CONFIG}")  # fmt: skip
        raise EditError([problem], remedy=way)


def _answers(pattern: str, module: str) -> bool:
    """Whether a pattern of PEFT's is that of a module: the whole path, or its last components."""
    if pattern.endswith("..*"):
        return module.startswith(pattern[:-2])
    if _PLAIN_PATTERN.fullmatch(pattern):
        plain = pattern.removesuffix("$")
        if plain.startswith("^"):
            return module == plain[1:]
        return module == plain or module.endswith(f".{plain}")
    try:
        return re.match(_expression(pattern), module) is not None
    except re.error as error:
        raise EditError([f"{pattern!r} in the adapter's configuration is no regular expression ({error})"]) from None


def _expression(pattern: str) -> str:
    """The regular expression of a pattern of PEFT's."""
    return rf"(.*\.)?({pattern})$"


def alpha_argument() -> Phrase:
    """What to do where nobody says an alpha."""
    return Phrase("put its adapter_config.json beside it, or say it: ", Argument("alpha", 16))
