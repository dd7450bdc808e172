"""Merge adapters into the weights that they were trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, cast

from ...errors import EditError, listed
from ...files.spans import Block
from ...tensors import casts
from ...tensors.blocks import Stream
from ...tensors.checkpoint import Checkpoint
from ...tensors.combining import Kept, Rounding, combined
from ...tensors.dtypes import BY_NAME, DType
from ...tensors.records import ComputedTensor, Finding, Tensor
from ...tensors.torch_bridge import raw_bytes, typed, whole
from ...text import plural
from ..alike import HowRounded, OutDType, Seed, dtype_of, rounding_of
from ..arguments import Input, Patterns
from ..change import Change, Inline, listed_patterns, matching
from ..inputs import FIRST, label, numbered, parted, qualified, union
from ..search_limits import SECONDS, endless_search, time_limit
from ..value_edit import of_first, value_edit
from .formulas import Addition, addition, bias_of, rows_of
from .layers import Adapter, Layer, parsed
from .places import LEAVES, Places, placed, refused
from .settings import Settings, alpha_argument, settings_of

# PEFT's wrapper of torch's MultiheadAttention adds the part of the output projection twice, when it is trained as well
# as when it is merged (``tuners/lora/layer.py``, MultiheadAttention.merge): so does what is merged here.
ATTENTION = ".base_layer.out_proj.lora_"
ELEMENTS = 1 << 20  # of a weight that are made at a time
ROWS = 64  # a multiple of what BLAS takes at a time, so that the same rows give the same bits in any block


@value_edit(
    "Merge LoRA adapters into their base.",
    "base.safetensors adapter.safetensors merged.safetensors --alpha 16",
    "sd.safetensors style.safetensors merged.safetensors --scale 0.8",
    inline=[Inline("", help="Merge all other inputs, which are adapters, into the first.")],
    computes=True,
)
def merge_lora(
    state_dict: Checkpoint,
    *adapters: Annotated[Input, "The adapters, in the order in which they are added."],
    scale: Annotated[Sequence[float], "What each adapter's part is multiplied by; one number for all."] = (1.0,),
    take: Annotated[Patterns, "Globs on the adapters' keys that count; 2::GLOB is for the first adapter alone."] = (),
    alpha: Annotated[float, "The alpha of adapters that state none."] = 0.0,
    rslora: Annotated[bool, "Divide alpha by the square root of the rank."] = False,
    fan_in_fan_out: Annotated[bool, "Weights are stored as (inputs, outputs), as Conv1D of transformers."] = False,
    dtype: OutDType = "",
    rounding: HowRounded = "nearest",
    seed: Seed = 0,
) -> Change[Checkpoint]:
    """Merge adapters into the weights that they were trained on: W + s · B A and its kin.

    Adapters are those of PEFT (LoRA, rsLoRA, DoRA, LoHa, LoKr; linear layers, Conv1D, embeddings, convolutions;
    whole modules and biases that were trained with them), kohya, LyCORIS and diffusers.  alpha comes from the
    adapter's own tensors, or the adapter_config.json beside it.  Sums are those of PEFT in float32, bit for bit, and
    rounded once; the output says how much of the change its dtype keeps.  An adapter's tensor that has no place in the
    base is an error that names it.  Raises NothingMatched, EditError.

    >>> import torch
    >>> base = {"fc.weight": torch.zeros(2, 3)}
    >>> adapter = {"fc.lora_A.weight": torch.ones(1, 3), "fc.lora_B.weight": torch.tensor([[1.0], [2.0]])}
    >>> merge_lora(base, adapter, scale=[0.5])["fc.weight"]
    tensor([[0.5000, 0.5000, 0.5000],
            [1.0000, 1.0000, 1.0000]])
    """
    others = numbered(cast(Sequence[Checkpoint], adapters))
    given = [float(scale)] if isinstance(scale, (int, float)) else list(scale)
    factors = given * len(others) if len(given) == 1 else given
    if len(factors) != len(others):
        raise EditError([f"{plural(len(others), 'adapter')} need as many scales, given were {len(factors)}"])
    chosen = _chosen(others, take)
    merged = _Merged(state_dict, dtype_of(dtype), rounding_of(rounding, seed))
    for (name, adapter), factor in zip(others.items(), factors, strict=True):
        merged.add(name, adapter, chosen[name], factor, alpha=alpha, rslora=rslora, fan_in_fan_out=fan_in_fan_out)
    return merged.change(others)


def _chosen(others: Mapping[str, Checkpoint], take: Patterns) -> dict[str, dict[str, Tensor]]:
    """The tensors of each adapter that count.  Raises NothingMatched."""
    patterns = listed_patterns(take)
    if not patterns:
        return {name: dict(other) for name, other in others.items()}
    keys = {qualified(name, key): key for name, other in others.items() for key in other}
    wanted: set[str] = set()
    for pattern in patterns:
        name, glob = parted(pattern, others)
        there = {key: full for full, key in keys.items() if not name or full.startswith(qualified(name, ""))}
        own = matching(there.keys(), [glob])
        wanted.update(
            full for full, key in keys.items() if key in own and (not name or parted(full, others)[0] == name)
        )
    return {
        name: {key: tensor for key, tensor in other.items() if qualified(name, key) in wanted}
        for name, other in others.items()
    }


@dataclass(slots=True)
class _Made:
    """What becomes of one key of the base: a tensor that takes its place, additions, and where they come from."""

    replaced: Tensor | None = None
    additions: list[Addition] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)


class _Merged:
    """A base and what adapters do to it, adapter by adapter."""

    def __init__(self, base: Checkpoint, dtype: DType | None, rounding: Rounding) -> None:
        self.base, self.dtype, self.rounding = base, dtype, rounding
        self.kept = Kept()
        self.made: dict[str, _Made] = {}
        self.notes: list[str] = []

    def add(self, name: str, adapter: Checkpoint, tensors: Mapping[str, Tensor], scale: float, *, alpha: float,
            rslora: bool, fan_in_fan_out: bool) -> None:  # fmt: skip
        """Find the places of an adapter's tensors.  Raises EditError naming those without."""
        called = label(name, adapter)
        if not tensors:
            self.notes.append(f"of {called}: nothing")
            return
        found = parsed(called, tensors)
        settings = settings_of(called, adapter, is_peft=found.is_peft, alpha=alpha, rslora=rslora,
                               fan_in_fan_out=fan_in_fan_out)  # fmt: skip
        places = placed(found.layers, self.base)
        problems = list(places.problems)
        whole_ones = self._replace(name, found, places, settings, problems)
        try:
            if endless_search(settings.patterns, found.layers, SECONDS):
                raise TimeoutError
            with time_limit(SECONDS):  # of the regular expressions in a configuration
                _Layers(self, name, found, settings, places, scale).add(problems)
        except TimeoutError:
            raise EditError([f"a pattern in the configuration of {called} searches without end"]) from None
        if problems:
            raise refused(called, problems)
        more = f", {plural(whole_ones, 'tensor')} taken whole" if whole_ones else ""
        left = len(adapter) - len(tensors)
        more += f", {plural(left, 'key')} left out" if left else ""
        times = "" if scale == 1 else f" × {scale:g}"
        self.notes.append(f"of {called}{times}: {plural(len(found.layers), 'layer')} added{more}")

    def at(self, key: str) -> _Made:
        """What becomes of a key of the base."""
        return self.made.setdefault(key, _Made())

    def _replace(self, name: str, found: Adapter, places: Places, settings: Settings, problems: list[str]) -> int:
        """Take tensors of modules that were trained whole."""
        saved = settings.says("modules_to_save")
        extra = [str(one) for one in saved] if isinstance(saved, list) else []
        for path, (key, tensor) in found.plain.items():
            new = places.path(path)
            if new not in self.base and not any(f".{one}." in f".{path}" for one in extra):
                problems.append(f"{key!r} is no key of the base")
                continue
            one = self.at(new)
            one.replaced = tensor
            one.origins = [qualified(name, key)]
        return len(found.plain)

    # -- the change

    def change(self, others: Mapping[str, Checkpoint]) -> Change[Checkpoint]:
        """The base with all that was added."""
        base = self.base
        before = union(base, others)
        shared = self._ties()
        tensors: dict[str, Tensor] = {}
        origins: dict[str, tuple[str, ...]] = {}
        known: dict[object, Tensor] = {}
        for key, tensor in base.items():
            source = shared.get(tensor.tie, key)
            one = self.made.get(source)
            if one is None:
                tensors[key], origins[key] = tensor, (key,)
                continue
            if source not in known:
                known[source] = self._tensor(source, base[source], one)
            tensors[key] = known[source]
            origins[key] = (*([key] if one.replaced is None else []), *dict.fromkeys(one.origins))
        for key, one in self.made.items():
            if key not in tensors and one.replaced is not None:  # of a module that the base has not
                tensors[key], origins[key] = one.replaced, tuple(one.origins)
        result = base.with_tensors(tensors, before.versions)
        used = frozenset(old for olds in origins.values() for old in olds if parted(old, others)[0])
        change = Change(before, result, origins, settled=used)
        return of_first(change, {FIRST: base, **others}, self.notes)

    def _ties(self) -> dict[object, str]:
        """For each tie of the base the one key whose changes all of its keys get; none where several change."""
        keys: dict[object, list[str]] = {}
        for key, tensor in self.base.items():
            keys.setdefault(tensor.tie, []).append(key)
        found: dict[object, str] = {}
        for tie, tied in keys.items():
            changed = [key for key in tied if key in self.made]
            if len(tied) == 1 or not changed:
                continue
            others = [key for key in tied if key != changed[0]]
            if len(changed) == 1:
                found[tie] = changed[0]
                self.notes.append(f"{listed(others)} stays tied to {changed[0]!r} and changes with it, as in PEFT")
            else:
                self.notes.append(f"{listed(changed)} are no longer tied: each gets what its own layer adds")
        return found

    def _tensor(self, key: str, old: Tensor, one: _Made) -> Tensor:
        """The new tensor of a key."""
        start = old if one.replaced is None else one.replaced
        dtype = self.dtype or old.dtype
        if not one.additions and (start.dtype == dtype or not old.dtype.is_floating):
            return start
        if not old.dtype.is_floating:
            raise EditError([f"{key!r} is {old.dtype}, and adapters are added to floating-point weights"])
        casts.check_computable(key, old.dtype)
        casts.check_computable(key, dtype)
        additions = tuple(one.additions)
        parts = tuple(tensor for addition in additions for tensor in addition.tensors)
        wide = old.dtype if old.dtype.name == "float64" else BY_NAME["float32"]
        exact = ComputedTensor(wide, start.shape, (start, *parts), lambda own: _summed(own[0], additions, wide))
        finding = Finding()

        def make(tensors: tuple[Tensor, ...]) -> Iterator[Block]:
            losses = casts.Losses()
            yield from combined(tensors, lambda _, values: values[1], dtype, key=key, rounding=self.rounding,
                                kept=self.kept, losses=losses)  # fmt: skip
            if losses.infinite:
                finding.problem = f"{key!r}: {losses.infinite:,} values are too large for {dtype}; give another dtype"

        made = ComputedTensor(dtype, start.shape, (start, exact), make, finding)
        return ComputedTensor(dtype, start.shape, (made,), lambda own: own[0].blocks(), self.kept)


def _summed(start: Tensor, additions: Sequence[Addition], dtype: DType) -> Iterator[Block]:
    """The bytes of a weight with its additions, in float32 or float64; some rows at a time where formulas allow it."""
    import torch

    if all(one.is_by_rows for one in additions):
        yield from _summed_by_rows(start, additions, dtype)
        return
    base = whole(start).to(getattr(torch, dtype.name))
    current = base
    for one in additions:
        current = one.onto(base, current)
    yield raw_bytes(current.to(base.dtype).contiguous())


def _summed_by_rows(start: Tensor, additions: Sequence[Addition], dtype: DType) -> Iterator[Block]:
    import torch

    if not start.nbytes:
        return
    rows, width = start.shape
    values = [one.values() for one in additions]
    stream = Stream(start.blocks())
    step = max(ROWS, ELEMENTS // max(width, 1) // ROWS * ROWS)
    for first in range(0, rows, step):
        stop = min(first + step, rows)
        raw = stream.take((stop - first) * width * start.dtype.itemsize)
        current = typed(raw, start.dtype).to(getattr(torch, dtype.name)).reshape(stop - first, width)
        for one, own in zip(additions, values, strict=True):
            assert one.part is not None
            current = current + one.part(own, first, stop)
        yield raw_bytes(current.to(getattr(torch, dtype.name)).contiguous())


@dataclass(slots=True)
class _Layers:
    """The layers of one adapter on their way into a base."""

    merged: _Merged
    name: str
    adapter: Adapter
    settings: Settings
    places: Places
    scale: float

    def add(self, problems: list[str]) -> None:
        """Add every layer that has a place; what is wrong goes to ``problems``."""
        unsaid = [layer for layer in self.adapter.layers.values()
                  if self.settings.needs_alpha and "alpha" not in layer.tensors and layer.has("down")]  # fmt: skip
        if unsaid:
            keys = [layer.keys["down"] for layer in unsaid]
            raise EditError(
                [f"{self.adapter.label}: no alpha is stated for {listed(keys, 2)}"], remedy=alpha_argument()
            )
        for path, module in self.places.modules.items():
            layer = self.adapter.layers[path]
            try:
                self._add_layer(layer, module)
            except EditError as error:
                problems += error.problems

    def _add_layer(self, layer: Layer, module: str) -> None:
        base = self.merged.base
        key = next(f"{module}.{leaf}" for leaf in LEAVES if f"{module}.{leaf}" in base)
        scaling = self.settings.scaling(layer.module)
        used: set[str] = set()
        if set(layer.tensors) - {"bias_difference"}:
            start = self.merged.made[key].replaced if key in self.merged.made else None
            shape = (start or base[key]).shape
            if "tokens" in layer.tensors:
                one = rows_of(layer, shape, self.settings.tokens(layer.module))
            else:
                one = addition(layer, shape, scaling, scale=self.scale, transposed=self.settings.is_transposed,
                               rank=self.settings.rank(layer.module), by_peft=self.adapter.is_peft)  # fmt: skip
            used |= self._put(key, one)
            if any(ATTENTION in old for old in layer.keys.values()):
                self._put(key, one)
        bias_key = key.removesuffix("weight") + "bias"
        bias = bias_of(layer, scaling, self.scale)
        if bias is not None:
            if bias_key not in base or base[bias_key].shape != bias.tensors[0].shape:
                raise EditError([f"{bias.keys[0]!r} adds to a bias, and the base has none like it at {bias_key!r}"])
            used |= self._put(bias_key, bias)
        if left := [layer.keys[role] for role in layer.tensors if role not in used]:
            raise EditError([f"{listed(left)} is no part of what is merged"])

    def _put(self, key: str, one: Addition) -> set[str]:
        made = self.merged.at(key)
        made.additions.append(one)
        made.origins += [qualified(self.name, old) for old in one.keys]
        return set(one.roles)
