"""What a write will do: the files of an output, the tensors in each, the bytes; nothing is touched."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, cast

from ..errors import Argument, BrokenFile, EditError, FileError, OutputExists, Phrase, listed
from ..files import swap
from ..files.local import LocalPath
from ..files.paths import AnyPath, FilePath, file_path
from ..files.sinks import Progress, Sink
from ..files.spans import ByteSpan
from ..formats import gguf, registry, safetensors, sharded
from ..formats.aliases import aliases_in, aliases_of
from ..formats.registry import FolderWriter, Layout, Writer
from ..reading.parts import refuse_part
from ..reading.selecting import select_state_dict
from ..tensors.checkpoint import Checkpoint
from ..tensors.combining import Kept, Row
from ..tensors.extra_state import without_extra_states
from ..tensors.opaque import named_opaque, ways_on
from ..tensors.records import Finding, Tensor, findings, producer
from ..tensors.stored import StoredTensor
from ..text import Shown, command
from . import model_folder
from .body_hashes import HASHES, LEGACY, has_body_of
from .leftovers import was_interrupted

# How keys that are one tensor are written into a container that cannot share it.
COPY, ALIAS = TIES = ("copy", "alias")
_ALIASED = Argument("ties", ALIAS)

Places = Sequence[tuple[int, int]]  # where in a file the pieces are that an index has to tell of


class Written(NamedTuple):
    """What is known of a file once it is made: what the index has to tell, notes, and problems that forbid it.

    ``kept`` is what of small changes is in it, tensor by tensor (see :class:`~ckpt_surgeon.tensors.combining.Kept`).
    """

    places: Places
    notes: Sequence[str] = ()
    problems: Sequence[str] = ()
    kept: Sequence[Row] = ()


@dataclass(frozen=True, slots=True, repr=False)
class PlannedFile(Shown):
    """One file of an output, the tensors that it has, or has pieces of, and where in the file they will lie."""

    path: FilePath
    tensors: Mapping[str, Tensor]
    selected: str = "."
    copy_of: FilePath | None = None  # a file without tensors that is copied as it is


@dataclass(frozen=True, slots=True, repr=False)
class Plan(Shown):
    """What a write will do: its files, the index beside them, and the checkpoint they come from.

    Where the output is a folder, the files and the index lie in it, and ``layout`` says how they are made.
    """

    out: FilePath
    checkpoint: Checkpoint
    files: tuple[PlannedFile, ...]
    writer: Writer | FolderWriter
    index: FilePath | None = None
    max_shard_size: int | None = None
    layout: Layout | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)  # keys that a note stands for, and those that are written
    written: bool = False  # whether it was carried out
    model_folder: FilePath | None = None  # the folder that was named, in which model.safetensors is written

    @property
    def is_folder(self) -> bool:
        """Whether the output is a folder."""
        return self.layout is not None

    @property
    def shards(self) -> list[PlannedFile]:
        """The files that have tensors."""
        return [file for file in self.files if file.copy_of is None]

    @property
    def sizes(self) -> list[int]:
        """About how many bytes each file will have."""
        return [file.copy_of.size if file.copy_of else self.writer.size_of(file.tensors) for file in self.files]

    @property
    def nbytes(self) -> int:
        """About how many bytes will be written."""
        return self.writer.size_of(self.checkpoint.tensors) if self.is_folder else sum(self.sizes)

    def in_the_way(self) -> list[FilePath]:
        """What is there already and would be replaced."""
        files = [*([self.index] if self.index else []), *(file.path for file in self.files), *self.stale()]
        return [path for path in ([self.out] if self.is_folder else files) if path.lexists()]

    def stale(self) -> list[FilePath]:
        """What an earlier output of this name left that a new index does not list: shards, or one whole file."""
        if self.is_folder or (self.index is None and self.model_folder is None):
            return []
        kept, folder = {file.path.name for file in self.files}, self.out.parent
        if self.model_folder is not None and folder.local is not None and not folder.is_dir():
            return []
        shards = [name for name in folder.names() if sharded.is_shard_of(self.out, name)]
        other = self.out if self.index is not None else sharded.index_name(self.out)
        return [*([other] if other.lexists() else []), *(folder / name for name in shards if name not in kept)]

    def fill(self, number: int, sink: Sink, tell: Progress, metadata: Mapping[str, str]) -> Written:
        """Write the contents of one file; what turned out while values were computed is known then."""
        file = self.files[number]
        places: Places = ()
        if file.copy_of is not None:
            sink.copy(ByteSpan(file.copy_of, 0, file.copy_of.size))
        elif self.layout is not None:
            places = self.layout.write(number, sink, tell)
        else:
            writer = cast(Writer, self.writer)
            writer.write(sink, file.tensors, self._versions_for(file), self._metadata_for(file, metadata))
        found = list(findings(file.tensors.values()))
        kept = [row for one in found if isinstance(one, Kept) for row in one.rows()]
        notes, problems = ([text for text in texts if text] for texts in _texts(found))
        return Written(places, notes, problems, kept)

    def _metadata_for(self, file: PlannedFile, given: Mapping[str, str]) -> Mapping[str, str]:
        """What is written beside tensors: no text that would be read as a note on one of these keys, but the notes."""
        texts = {**self.checkpoint.metadata, **given}
        stale = aliases_in(file.tensors, texts)
        if wrong := [name for name in stale if name in given]:
            problem = f"metadata that reads as another name of a tensor: {listed(wrong)}"
            raise EditError([problem], remedy=Phrase("tie the tensors and give ", _ALIASED))
        kept = {name: text for name, text in texts.items() if name not in stale}
        return kept if self.index is not None else {**kept, **self.aliases}

    def _versions_for(self, file: PlannedFile) -> Mapping[str, Mapping[str, object]] | None:
        """A shard carries the versions of its own modules."""
        versions = self.checkpoint.versions
        if versions is None or len(self.shards) == 1:
            return versions
        modules = {key.rpartition(".")[0] for key in file.tensors}
        return {module: version for module, version in versions.items() if module in modules or not module}

    def index_bytes(self, places: Sequence[Places]) -> bytes:
        """The bytes of the index; ``places`` are those of each file."""
        if self.layout is not None:
            return self.layout.metadata(places)
        weight_map = {key: file.path.name for file in self.shards for key in file.tensors}
        ordered = {key: weight_map[key] for key in self.checkpoint if key in weight_map}
        return sharded.index_bytes(ordered, sum(self.checkpoint[key].nbytes for key in ordered), self.aliases)

    def verify(self, made: Callable[[FilePath], FilePath], fate: str = "nothing was replaced") -> None:
        """Read the index of each file back and compare it with the plan: keys, their order, dtypes, shapes.

        ``made`` says where a file lies that will have a path.  Raises BrokenFile, which tells the output's fate.
        """
        whole = [PlannedFile(self.out, self.checkpoint.tensors)] if self.is_folder else self.shards
        for file in whole:
            written = select_state_dict(registry.read(made(file.path)), file.selected)
            tensors = file.tensors
            if self.index is None:
                tensors = {**tensors, **{name: tensors[kept] for name, kept in self.aliases.items()}}
            asked = [(key, tensor.dtype, tensor.shape) for key, tensor in tensors.items()]
            found = [(key, tensor.dtype, tensor.shape) for key, tensor in written.items()]
            if asked != found:
                pairs = zip(asked, found, strict=False)
                odd = next((f"{a} became {b}" for a, b in pairs if a != b), "tensors are missing")
                raise BrokenFile(file.path, f"did not read back as planned ({odd}), {fate}", "do it again")

    def sources(self) -> list[FilePath]:
        """The files that the tensors' bytes come from."""
        copied = [file.copy_of for file in self.files if file.copy_of is not None]
        by_identity: dict[int, FilePath] = {id(path): path for path in copied}  # each as it was when it was opened
        seen: set[int] = set()
        for tensor in self.checkpoint.values():
            if type(tensor) is StoredTensor and tensor.storage.source is None:
                by_identity.update((id(path), path) for path in tensor.storage.files)
            else:
                by_identity.update((id(path), path) for path in sources_of(tensor, seen))
        return list(by_identity.values())


def _texts(found: Sequence[Finding]) -> tuple[list[str], list[str]]:
    """The notes and the problems of one file."""
    return [one.note for one in found if not isinstance(one, Kept)], [one.problem for one in found]


def sources_of(tensor: Tensor, seen: set[int]) -> Iterator[FilePath]:
    """The files that a tensor's bytes come from; ``seen`` has the computed tensors that were asked before."""
    waiting = [tensor]
    while waiting:
        tensor = waiting.pop()
        if isinstance(tensor, StoredTensor):
            yield from tensor.storage.files
        computed = producer(tensor)
        if computed is not None and id(computed) not in seen:
            seen.add(id(computed))
            waiting.extend(computed.inputs)
            yield from computed.files


def plan(
    checkpoint: Checkpoint,
    out: AnyPath,
    *,
    force: bool = False,
    max_shard_size: int | None = None,
    ties: str = COPY,
    writer: Writer | FolderWriter | None = None,
    with_files: bool = False,
) -> Plan:
    """Plan the files of an output; nothing is touched.

    The container is that of ``out``'s extension, unless a ``writer`` is given; ``max_shard_size`` (bytes) splits it
    into shards with an index.  Keys that are one tensor share it in torch's containers; a safetensors file has its
    bytes under each key (``ties`` "copy"), or under one, and notes on the others as in the hub's files ("alias").
    Where ``out`` is a folder, or ends with a slash, ``model.safetensors`` goes into it as the hub has it;
    ``with_files`` copies the files beside the input's weights that hold no tensors (config, tokenizer).
    Raises OutputExists (without ``force``), FileError (what is there cannot or should not be replaced),
    NotACheckpoint (unknown extension), FileError (one rank's part of a model),
    EditError (tensors that the container cannot hold, or none at all).
    """
    named = file_path(out)
    folder = named if model_folder.is_model_folder(named) else None
    out = model_folder.weights_in(named)
    chosen, writer = writer, writer or registry.writer_for(out)
    refuse_part(checkpoint)
    if chosen is None and (opaque := named_opaque(checkpoint)):
        raise EditError(f"{opaque}: more than plain elements, cannot be copied", remedy=ways_on(checkpoint))
    _check_ties(ties, out, writer)
    if not writer.HOLDS_EXTRA_STATES:
        checkpoint = _of_tensors_alone(checkpoint, writer.CONTAINER)
    if not checkpoint.tensors:
        raise EditError([f"{out}: no tensor is left to write"])
    if isinstance(writer, FolderWriter) and out.local is None:
        raise FileError(out, "would be a folder at a URL, which cannot be written", "write .safetensors or .pth")
    if folder is not None:
        model_folder.refuse_other(folder)
    if folder is None or out.local is None or out.parent.is_dir():
        out.check_writable()
    else:
        folder.check_writable()  # the folder that it is made in
    writer.check(checkpoint.tensors)
    if writer is gguf:
        gguf.check_metadata(checkpoint.metadata)
        if max_shard_size is not None:
            remedy = Phrase(
                "leave out ", Argument("max_shard_size"), ", and split it with llama.cpp's llama-gguf-split"
            )
            raise EditError([f"{out}: a GGUF file is written as one file"], remedy=remedy)
    planned = replace(_planned(checkpoint, out, writer, max_shard_size, ties), model_folder=folder)
    planned = _with_true_hashes(planned)
    planned = _with_files(planned) if with_files else planned
    if (local := out.local) is not None:
        _check_replaceable(planned, local)
    if not force and (there := planned.in_the_way()):
        began = f"it is of a run that was killed; first: {command('recover', out)}" if was_interrupted(out) else ""
        raise OutputExists(there[0], began)
    return planned


def _with_true_hashes(planned: Plan) -> Plan:
    """A plan without those hashes in the metadata that the bytes of the output would belie; a note says so."""
    checkpoint = planned.checkpoint
    stated = [name for name in checkpoint.metadata if HASHES.fullmatch(name)]
    if not stated or planned.writer is not safetensors:
        return planned
    source = has_body_of([file.tensors for file in planned.files])
    if source is not None:
        there = registry.read(source).root
        is_same = isinstance(there, dict) and list(there) == list(planned.files[0].tensors)
        stated = [name for name in stated if name == LEGACY and not is_same]
    if not stated:
        return planned
    note = f"left out of the metadata, as it is not the hash of these bytes: {listed(stated)}"
    metadata = {name: text for name, text in checkpoint.metadata.items() if name not in stated}
    return replace(planned, checkpoint=replace(checkpoint, metadata=metadata, notes=(*checkpoint.notes, note)))


def _with_files(planned: Plan) -> Plan:
    """The plan with copies of the files that lie beside the input's weights."""
    if planned.model_folder is None:
        problem = Phrase(f"{planned.out} is no folder: ", Argument("with_files", True), " copies files into one")
        raise EditError([problem], remedy=f"name a folder, with a slash at its end: {planned.out.stem}/")
    found = model_folder.copied(planned.checkpoint.path)
    copies = [PlannedFile(planned.out.parent / path.name, {}, copy_of=path) for path in found]
    return replace(planned, files=(*copies, *planned.files))  # the weights get their names last


def _check_ties(ties: str, out: FilePath, writer: Writer | FolderWriter) -> None:
    """Raise EditError for a way to write ties that is not known, or that the container has no need of."""
    if ties not in TIES:
        raise EditError([Phrase(Argument("ties"), f" is one of {', '.join(TIES)}, not {ties!r}")])
    if ties == ALIAS and writer is not safetensors:
        shares = "shares tied tensors by itself, and " if writer.HOLDS_EXTRA_STATES else ""
        problem = Phrase(f"{out}: its container {shares}has no notes for ", _ALIASED)
        raise EditError([problem], remedy=Phrase("leave it out, or write .safetensors"))


def _of_tensors_alone(checkpoint: Checkpoint, container: str) -> Checkpoint:
    """A checkpoint without extra states, for a container that holds tensors alone, with a note that says so."""
    tensors = without_extra_states(checkpoint.tensors)
    left = [key for key in checkpoint if key not in tensors]
    if not left:
        return checkpoint
    note = (
        f"left out, as {container} holds tensors alone: {listed(left, 3)}; "
        "a strict load into a model with extra states needs them: write a .pth"
    )
    return replace(checkpoint, tensors=tensors, notes=(*checkpoint.notes, note))


def _planned(
    checkpoint: Checkpoint, out: FilePath, writer: Writer | FolderWriter, max_shard_size: int | None, ties: str
) -> Plan:
    if isinstance(writer, FolderWriter):
        layout = writer.layout(checkpoint.tensors, max_shard_size)
        files = tuple(PlannedFile(out / name, tensors) for name, tensors in layout.files.items())
        return Plan(out, checkpoint, files, writer, out / writer.METADATA, max_shard_size, layout)
    aliases = aliases_of(checkpoint.tensors, checkpoint.metadata) if ties == ALIAS else {}
    tensors = {key: tensor for key, tensor in checkpoint.tensors.items() if key not in aliases}
    groups = _groups(tensors, max_shard_size) if max_shard_size is not None else [tensors]
    if len(groups) == 1:
        return Plan(out, checkpoint, (PlannedFile(out, groups[0]),), writer, None, max_shard_size, aliases=aliases)
    names = (sharded.shard_name(out, number, len(groups)) for number in range(1, len(groups) + 1))
    files = tuple(PlannedFile(name, group) for name, group in zip(names, groups, strict=True))
    return Plan(out, checkpoint, files, writer, sharded.index_name(out), max_shard_size, aliases=aliases)


def _check_replaceable(planned: Plan, out: LocalPath) -> None:
    """Raise FileError where something is in the way that this output did not make and must not take away."""
    if planned.is_folder:
        swap.check_replaceable(out, is_folder=True)
        _refuse_other_folder(out, cast(FolderWriter, planned.writer))
        return
    paths = [*(file.path for file in planned.files), *([planned.index] if planned.index else []), *planned.stale()]
    for path in paths:
        if path.local is not None:
            swap.check_replaceable(path.local)


def _refuse_other_folder(out: LocalPath, writer: FolderWriter) -> None:
    """A folder is only replaced when all that is in it would be written again."""
    if not out.is_dir():
        return
    others = [
        name for name in out.names() if not writer.is_part(name) or not stat.S_ISREG(os.lstat(out / name).st_mode)
    ]
    if others:
        problem = f"is a folder with more than a distributed checkpoint in it ({listed(others)})"
        raise FileError(out, problem, "write elsewhere, or move those away")


def _groups(tensors: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """Fill shards in the order of the keys; tied tensors stay in one shard, as one storage."""
    homes: dict[object, int] = {}
    groups: list[dict[str, Tensor]] = [{}]
    sizes = [0]
    for key, tensor in tensors.items():
        home = homes.get(tensor.tie)
        if home is None:
            if groups[-1] and sizes[-1] + tensor.nbytes > limit:
                groups.append({})
                sizes.append(0)
            home = homes[tensor.tie] = len(groups) - 1
            sizes[home] += tensor.nbytes
        groups[home][key] = tensor
    return groups
