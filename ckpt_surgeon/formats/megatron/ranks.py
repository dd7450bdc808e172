"""A folder of ranks (``mp_rank_00_001/model_optim_rng.pt``) as one model, with its layers numbered through.

The first number is the rank of tensor parallelism, the second the stage of the pipeline, whose layers each file counts
from 0; with interleaved stages a file has ``model0``, ``model1`` … (``megatron/training/checkpointing.py``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, product

from ...errors import BrokenFile, EditError, NotACheckpoint, listed
from ...files.paths import FilePath, prefetch_heads
from ...files.spans import Block
from ...tensors.records import ComputedTensor, Finding, Tensor
from ...tensors.stored import StoredTensor
from ...tensors.views import interleaved, viewed
from ...text import plural
from ..contents import Contents
from ..pickle.values import Object, Ordered, Value, spelled
from ..sharded import Reader, listed_problems
from .rules import VOCABULARY, second_layer, shared_dim

CONTAINER = "Megatron-LM"
LATEST = "latest_checkpointed_iteration.txt"
FILES = ("model_optim_rng.pt", "model_rng.pt")
DEPTH = 40
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(_\d{3,})?")
_CHUNK = re.compile(r"model(\d*)")
_LAYER = re.compile(r"(?P<stack>(?:.*?\.)?layers\.)(?P<number>\d+)(?P<rest>\..+)")
_TRAINING = re.compile(r"optimizer|opt_param_scheduler|rng_state|lr_scheduler|rerun_state_machine|model\d*")
_AGAIN = "fetch the folder again"

Place = tuple[int, int]  # tensor rank, pipeline stage


def holds(names: Iterable[str]) -> bool:
    """Whether a folder with these names has ranks of Megatron-LM.

    >>> holds(["mp_rank_00_000", "mp_rank_00_001"]), holds(["mp_rank_00_model_states.pt"])
    (True, False)
    """
    return any(map(_RANK.fullmatch, names))


def step_folder(folder: FilePath, names: Sequence[str]) -> FilePath | None:
    """The folder of the iteration that a folder of iterations means; None where it is none.

    Raises NotACheckpoint where the one that is named last is not there.
    """
    if LATEST not in names or not (folder / LATEST).is_file():
        return None
    text = (folder / LATEST).head()[:80].decode("utf-8", "replace").strip()
    name = f"iter_{int(text):07d}" if text.isdecimal() and text.isascii() else text
    if name in names and (folder / name).is_dir():
        return folder / name
    there = [one for one in names if re.fullmatch(r"iter_\d+|release", one)]
    raise NotACheckpoint(folder, f"has a {LATEST} that names {name!r}, which is not there",
                         f"name one: {listed(there, 3)}" if there else _AGAIN)  # fmt: skip


def read(folder: FilePath, names: Sequence[str], read_file: Reader, *, salvage: bool = False) -> Contents:
    """Read the files of all ranks as one model; the optimizers of the ranks are not joined.

    Raises BrokenFile where ranks are missing or a tensor's parts do not fit, NotACheckpoint for expert parallelism.
    """
    places = _places(folder, names)
    paths = {place: _file(folder / name) for place, name in places.items()}
    prefetch_heads(list(paths.values()))
    files = {place: read_file(path, salvage=salvage) for place, path in sorted(paths.items())}
    roots = {place: one.root if isinstance(one.root, dict) else {} for place, one in files.items()}
    first = next(iter(roots.values()))
    size = _check_grid(folder, places, first.get("args"))
    joining = _Joining(size)
    model = joining.joined(roots)
    if joining.problems:
        raise BrokenFile(folder, listed_problems(joining.problems), "join them by rules of yours: ckpt join --concat")
    root: dict[Value, Value] = {"model": model}
    root |= {name: value for name, value in first.items() if not _TRAINING.fullmatch(spelled(name))}
    if any("optimizer" in one for one in roots.values()):
        joining.notes.append("the optimizer's state in the files of the ranks is not joined")
    joining.notes += _padding(model, first.get("args"))
    container = f"{CONTAINER}, {plural(size[0], 'tensor rank')} x {plural(size[1], 'pipeline stage')}"
    return Contents(
        folder,
        container,
        root,
        notes=(*joining.notes, *dict.fromkeys(note for one in files.values() for note in one.notes)),
        globals=tuple(dict.fromkeys(name for one in files.values() for name in one.globals)),
        globals_inside=lambda: chain.from_iterable(one.globals_inside() for one in files.values()),
    )


def _places(folder: FilePath, names: Sequence[str]) -> dict[Place, str]:
    found: dict[Place, str] = {}
    for name in names:
        if (match := _RANK.fullmatch(name)) is None or not (folder / name).is_dir():
            continue
        if match[3] is not None and int(match[3][1:]):
            problem = f"is a Megatron-LM checkpoint of expert-parallel ranks ({name})"
            raise NotACheckpoint(folder, problem, "convert it with Megatron to torch_dist")
        found[int(match[1]), int(match[2] or 0)] = name
    if not found:
        raise NotACheckpoint(folder, "has names of Megatron-LM's ranks that are no folders", _AGAIN)
    return found


def _file(folder: FilePath) -> FilePath:
    names = folder.names()
    for name in FILES:
        if name in names:
            return folder / name
    raise BrokenFile(folder, f"has no {FILES[0]}", _AGAIN)


def _check_grid(folder: FilePath, places: Mapping[Place, str], args: Value) -> Place:
    """The number of tensor ranks and of stages.  Raises BrokenFile where one is missing, naming its folder."""
    said = (
        _argument(args, "tensor_model_parallel_size", "model_parallel_size"),
        _argument(args, "pipeline_model_parallel_size"),
    )
    size = (
        max(said[0], 1 + max(tensor for tensor, _ in places)),
        max(said[1], 1 + max(stage for _, stage in places)),
    )
    if size[0] * size[1] > 1 << 16:
        raise BrokenFile(folder, f"says that it has {size[0]:,} x {size[1]:,} ranks", "do not use it")
    missing = [place for place in product(range(size[0]), range(size[1])) if place not in places]
    if missing:
        long = size[1] > 1
        shown = [f"mp_rank_{tensor:02d}_{stage:03d}" if long else f"mp_rank_{tensor:02d}" for tensor, stage in missing]
        problem = f"has {len(places):,} of {size[0] * size[1]:,} ranks; missing: {listed(shown, 3)}"
        raise BrokenFile(folder, problem, "fetch the missing folders")
    return size


def _argument(args: Value, *names: str) -> int:
    """A number among the arguments of the training; 0 where it is not there."""
    known = args.state if isinstance(args, Object) else args
    values = [known.get(name) for name in names] if isinstance(known, dict) else []
    return next((value for value in values if type(value) is int and value > 0), 0)


def _padding(model: Mapping[Value, Value], args: Value) -> Iterator[str]:
    """A note on rows of the vocabulary that are padding, where the arguments say how many tokens there are."""
    count = _argument(args, "vocab_size")
    padded = [key for key, tensor in model.items() if VOCABULARY.fullmatch(spelled(key))
              and isinstance(tensor, StoredTensor) and tensor.shape and tensor.shape[0] > count > 0]  # fmt: skip
    if padded:
        yield f"rows from {count:,} on are padding of the vocabulary, and stay: {listed(map(spelled, padded), 3)}"


# -- joining


@dataclass(slots=True)
class _Joining:
    """The files of all ranks on their way to one state_dict; what does not fit is gathered."""

    size: Place
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def joined(self, roots: Mapping[Place, Mapping[Value, Value]]) -> Ordered:
        """The state_dict of all stages, in their order."""
        chunks = sorted({int(match[1] or 0) for root in roots.values() for name in root
                         if isinstance(name, str) and (match := _CHUNK.fullmatch(name))})  # fmt: skip
        made = Ordered()
        layers: dict[str, int] = {}
        for chunk, stage in product(chunks or [0], range(self.size[1])):
            ranks = [dict(_flat(_chunk(roots[tensor, stage], chunk), "")) for tensor in range(self.size[0])]
            counts: dict[str, int] = {}
            for key, value in self._stage(ranks).items():
                new, stack, number = _numbered(key, layers)
                if stack:
                    counts[stack] = max(counts.get(stack, 0), number + 1)
                made[new] = self._once(new, made[new], value) if new in made else value
            layers = {stack: layers.get(stack, 0) + counts.get(stack, 0) for stack in {*layers, *counts}}
        if not made:
            self.problems.append("no rank has a 'model'")
        return made

    def _stage(self, ranks: Sequence[Mapping[str, Value]]) -> dict[str, Value]:
        """One stage of the pipeline out of its tensor-parallel ranks."""
        made: dict[str, Value] = {}
        for key in dict.fromkeys(key for rank in ranks for key in rank):
            missing = [number for number, rank in enumerate(ranks) if key not in rank]
            if missing:
                self.problems.append(f"{key!r} is not in tensor rank {missing[0]}")
                continue
            parts = [rank[key] for rank in ranks]
            tensors = [part for part in parts if isinstance(part, StoredTensor)]
            if len(tensors) < len(parts) or len(parts) == 1:
                made[key] = parts[0]
                continue
            made[key] = self._tensor(key, tensors, ranks[0])
        return made

    def _tensor(self, key: str, tensors: Sequence[StoredTensor], rank: Mapping[str, Value]) -> Value:
        dim = shared_dim(key)
        names = [f"{key} of rank {number}" for number in range(len(tensors))]
        try:
            if dim is not None and tensors[0].shape:
                return viewed(interleaved(tensors, names, dim, 2 if _is_gated(key, tensors[0], rank) else 1))
        except EditError as error:
            self.problems += error.problems
            return None
        made: Value = tensors[0]
        for other in tensors[1:]:
            made = self._once(key, made, other)
        return made

    def _once(self, key: str, first: Value, other: Value) -> Value:
        """What two ranks or stages have alike, compared when it is read; data that is no tensor as the first has it."""
        if not isinstance(first, StoredTensor) or not isinstance(other, StoredTensor):
            return first
        if (first.shape, first.dtype) != (other.shape, other.dtype):
            shapes = f"{list(first.shape)} and {list(other.shape)}"
            self.problems.append(f"{key!r} is {shapes} in two ranks, and no rule joins it")
            return first
        if None not in (first.crc32, other.crc32):
            if first.crc32 != other.crc32:
                self.problems.append(f"{key!r} is not the same in all ranks, and no rule joins it")
            return first
        return _compared(key, first, other)


def _compared(key: str, first: StoredTensor, other: StoredTensor) -> StoredTensor:
    """The first of two tensors, which are compared while it is read."""
    finding = Finding()

    def make(tensors: tuple[Tensor, ...]) -> Iterator[Block]:
        from ...tensors.arithmetic import equal_blocks

        for block, same in equal_blocks(tensors):
            if not same:
                finding.problem = f"{key!r} is not the same in all ranks, and no rule joins it"
            yield block

    return ComputedTensor(first.dtype, first.shape, (first, other), make, finding).stored()


def _chunk(root: Mapping[Value, Value], chunk: int) -> Value:
    """The state_dict of one chunk: ``model``, or ``model0`` and its kin where stages are interleaved."""
    found = root.get(f"model{chunk}")
    return found if found is not None or chunk else root.get("model")


def _flat(node: Value, prefix: str, depth: int = 0) -> Iterator[tuple[str, Value]]:
    """The entries of a nested state_dict by dotted keys."""
    for name, value in node.items() if isinstance(node, dict) and depth < DEPTH else ():
        key = prefix + spelled(name)
        if isinstance(value, dict):
            yield from _flat(value, f"{key}.", depth + 1)
        else:
            yield key, value


def _numbered(key: str, before: Mapping[str, int]) -> tuple[str, str, int]:
    """A key with its layer's number in the whole, its stack of layers, and the layer's number in its stage."""
    found = _LAYER.fullmatch(key)
    if found is None:
        return key, "", 0
    number = int(found["number"])
    return f"{found['stack']}{number + before.get(found['stack'], 0)}{found['rest']}", found["stack"], number


def _is_gated(key: str, tensor: StoredTensor, rank: Mapping[str, Value]) -> bool:
    """Whether a first layer of an MLP has the rows of a gate, too: twice as many as its second one has columns."""
    second = rank.get(second_layer(key))
    return isinstance(second, StoredTensor) and len(second.shape) == 2 and tensor.shape[0] == 2 * second.shape[1]
