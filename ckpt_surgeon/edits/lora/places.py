"""The tensors of a base that the layers of an adapter belong to, found by the base's own keys."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ...errors import Argument, EditError, Phrase, listed
from ..flat_names import flat, flat_prefix

# What diffusers, and kohya's flattened names, call the parts of a pipeline; and where a base may keep each.
PARTS = {
    "unet": ("unet", "model.diffusion_model", "diffusion_model"),
    "transformer": ("transformer", "model.diffusion_model", "diffusion_model"),
    "diffusion_model": ("diffusion_model", "model.diffusion_model", "transformer", "unet"),
    "prior": ("prior",),
    "text_encoder": ("text_encoder", "cond_stage_model.transformer", "conditioner.embedders.0.transformer"),
    "text_encoder_2": ("text_encoder_2", "conditioner.embedders.1.model"),
    "text_encoder_3": ("text_encoder_3",),
}
_FLAT_PARTS = {
    "lora_unet_": "unet",
    "lora_transformer_": "transformer",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
LEAVES = ("weight", "in_proj_weight")  # what a layer's matrix is called; the second in torch's MultiheadAttention


@dataclass(slots=True)
class Places:
    """The base's module for each layer of an adapter; ``problems`` name those without, or with several.

    ``moved`` are the prefixes that the adapter's dotted paths lost and got, ("", "") where they are the base's own.
    """

    modules: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    moved: dict[str, tuple[str, str]] = field(default_factory=dict)  # by the part of the pipeline

    def path(self, path: str) -> str:
        """A dotted path of the adapter (of a whole tensor) as the base would have it."""
        lost, got = self.moved.get(part_of(path), ("", ""))
        return got + path.removeprefix(lost)


def placed(paths: Iterable[str], keys: Iterable[str]) -> Places:
    """Find the modules of a base, by its keys, that the paths of an adapter's layers name.

    A dotted path is that of the base, or has a prefix more or less, the same for all layers of a part; a flattened
    path has ``_`` for the dots.  What fits in two ways is a problem.

    >>> base = ["model.fc.weight", "model.mid_block.proj.weight"]
    >>> placed(["fc", "mid_block.proj"], base).modules
    {'fc': 'model.fc', 'mid_block.proj': 'model.mid_block.proj'}
    >>> placed(["lora_unet_mid_block_proj"], base).modules
    {'lora_unet_mid_block_proj': 'model.mid_block.proj'}
    """
    modules = {module: None for key in keys for module, _, leaf in [key.rpartition(".")] if leaf in LEAVES}
    found = Places()
    groups: dict[tuple[str, bool], list[str]] = {}
    for path in paths:
        prefix = flat_prefix(path) if "." not in path else ""
        if "." not in path and path not in modules and (prefix or "_" in path):
            groups.setdefault((prefix, True), []).append(path)
        else:
            groups.setdefault((part_of(path), False), []).append(path)
    for (name, is_flat), members in groups.items():
        if is_flat:
            _place_flat(found, name, members, modules)
        else:
            _place_dotted(found, name, members, modules)
    return found


def part_of(path: str) -> str:
    """The part of a pipeline that a dotted path begins with, "" for none."""
    first = path.partition(".")[0]
    return first if first in PARTS else ""


# -- dotted paths


def _place_dotted(found: Places, part: str, paths: Sequence[str], modules: Mapping[str, None]) -> None:
    """Place layers by one change of prefix for all of them: the smallest that fits the most."""
    best: dict[tuple[str, str], int] = {}
    for lost, got in dict.fromkeys(_moves(part, paths, modules)):
        best[lost, got] = sum(path.startswith(lost) and got + path.removeprefix(lost) in modules for path in paths)
    most = max(best.values(), default=0)
    fitting = sorted((move for move, count in best.items() if most and count == most), key=_size)
    if len(fitting) > 1 and _size(fitting[0]) == _size(fitting[1]) and not _hinted(part, fitting[0]):
        ways = listed([got + paths[0].removeprefix(lost) for lost, got in fitting])
        found.problems.append(f"{paths[0]!r} may be {ways}")
        return
    lost, got = fitting[0] if fitting else ("", "")
    found.moved[part] = (lost, got)
    for path in paths:
        module = got + path.removeprefix(lost)
        if path.startswith(lost) and module in modules:
            found.modules[path] = module
        else:
            found.problems.append(f"{path!r} is no layer of the base")


def _moves(part: str, paths: Sequence[str], modules: Mapping[str, None]) -> Iterator[tuple[str, str]]:
    """Changes of prefix that may be meant, as the prefix that goes and the one that comes."""
    yield "", ""
    for home in PARTS.get(part, ()):
        yield f"{part}.", f"{home}."
    path = paths[0]
    starts = ["", f"{part}."] if part else [""]
    for lost in starts:
        end = path.removeprefix(lost)
        yield from ((lost, module[: -len(end)]) for module in modules if module == end or module.endswith(f".{end}"))
    if not part:
        components = path.split(".")
        yield from ((".".join(components[:count]) + ".", "") for count in range(1, len(components)))


def _size(move: tuple[str, str]) -> int:
    """How many components a change of prefix takes and gives."""
    return move[0].count(".") + move[1].count(".")


def _hinted(part: str, move: tuple[str, str]) -> bool:
    return move[1].removesuffix(".") in PARTS.get(part, ())


# -- flattened paths


def _place_flat(found: Places, prefix: str, paths: Sequence[str], modules: Mapping[str, None]) -> None:
    """Place layers whose names have ``_`` for the dots: below one prefix of the base, where only one path reads so."""
    ends: dict[str, list[tuple[str, str]]] = {}  # of each flattened end of a path, the prefix before it and the path
    for module in modules:
        components = module.split(".")
        for count in range(len(components)):
            start = ".".join(components[:count])
            ends.setdefault(flat(".".join(components[count:])), []).append((start, module))
    rest = {path: path.removeprefix(prefix) for path in paths}
    counts: dict[str, int] = {}
    for name in rest.values():
        for start in {start for start, _ in ends.get(name, ())}:
            counts[start] = counts.get(start, 0) + 1
    most = max(counts.values(), default=0)
    starts = [start for start, count in counts.items() if count == most]
    hints = [home for home in PARTS.get(_FLAT_PARTS.get(prefix, ""), ()) if home in starts]
    if len(starts) > 1 and not hints and "" not in starts:
        found.problems.append(f"{paths[0]!r} may be a layer of {listed(starts)}")
        return
    chosen = hints[0] if hints else "" if "" in starts else starts[0] if starts else ""
    for path, name in rest.items():
        candidates = [module for start, module in ends.get(name, ()) if start == chosen]
        if len(candidates) == 1:
            found.modules[path] = candidates[0]
        elif candidates:
            found.problems.append(f"{path!r} may be {listed(candidates)}")
        else:
            found.problems.append(f"{path!r} is no layer of the base with _ for the dots")


def refused(label: str, problems: Sequence[str], shown: int = 5) -> EditError:
    """The error for layers without a place."""
    said = [f"{label}: {problem}" for problem in problems[:shown]]
    more = [f"and {len(problems) - shown:,} more like these"] if len(problems) > shown else []
    return EditError(said + more, remedy=Phrase("take what is meant for this base alone: ", Argument("take", "GLOB")))
