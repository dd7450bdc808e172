"""The containers: one module each, which reads and, where anybody needs it, writes.

A reader is chosen by content, never by the file's name; a writer by the output's extension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast, runtime_checkable

from ..errors import NEW_FILE, BrokenFile, FileError, NotACheckpoint, listed
from ..files.local import LocalPath
from ..files.paths import FilePath
from ..files.sinks import Sink
from ..tensors.records import Tensor
from .contents import Contents, Index
from .later import Later
from .pickle.values import Value
from .shard_names import DCP_METADATA, is_shard, sets_in

if TYPE_CHECKING:
    from . import engines, foreign, gguf, npy, plain_pickle, safetensors, shard_set, sharded, torch_legacy, torch_tar
    from .dcp import consolidated, megatron_core
    from .dcp import metadata as dcp
    from .zip import archive as zip_archive
    from .zip import npz, stable_baselines, torch_export, torch_package, torch_zip, torchscript
else:
    engines, foreign, gguf, npy = map(Later, (".engines", ".foreign", ".gguf", ".npy"))
    plain_pickle, safetensors = map(Later, (".plain_pickle", ".safetensors"))
    shard_set, sharded = map(Later, (".shard_set", ".sharded"))
    torch_legacy, torch_tar = map(Later, (".torch_legacy", ".torch_tar"))
    consolidated, megatron_core, dcp = map(Later, (".dcp.consolidated", ".dcp.megatron_core", ".dcp.metadata"))
    zip_archive, torch_export, torch_package = map(Later, (".zip.archive", ".zip.torch_export", ".zip.torch_package"))
    torch_zip, torchscript = map(Later, (".zip.torch_zip", ".zip.torchscript"))
    npz, stable_baselines = map(Later, (".zip.npz", ".zip.stable_baselines"))


class Writer(Protocol):
    """What a module offers that can write its container."""

    CONTAINER: str
    SUFFIXES: tuple[str, ...]
    HOLDS_EXTRA_STATES: bool

    def check(self, tensors: Mapping[str, Tensor]) -> None: ...

    def size_of(self, tensors: Mapping[str, Tensor]) -> int: ...

    def write(
        self,
        sink: Sink,
        tensors: Mapping[str, Tensor],
        versions: Mapping[str, Mapping[str, Value]] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None: ...


class Layout(Protocol):
    """The files of a folder that is one output, each of which can be written by itself."""

    @property
    def files(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The tensors that each file has, or has pieces of, by its name."""
        ...

    def write(self, number: int, sink: Sink, tell: Callable[[int], object], /) -> list[tuple[int, int]]:
        """Write one file; returns where in it the pieces are: offset and length of each."""
        ...

    def metadata(self, places: Sequence[Sequence[tuple[int, int]]], /) -> bytes:
        """The bytes of the file that says where all pieces are."""
        ...


@runtime_checkable
class FolderWriter(Protocol):
    """What a module offers whose container is a folder."""

    CONTAINER: str
    SUFFIXES: tuple[str, ...]
    HOLDS_EXTRA_STATES: bool
    METADATA: str

    def check(self, tensors: Mapping[str, Tensor]) -> None: ...

    def size_of(self, tensors: Mapping[str, Tensor]) -> int: ...

    def is_part(self, name: str) -> bool: ...

    def layout(self, tensors: Mapping[str, Tensor], max_file_size: int | None = None) -> Layout: ...


class Reader(Protocol):
    """Reads one container."""

    def __call__(self, path: FilePath, *, salvage: bool = False) -> Contents: ...


class Container(NamedTuple):
    """One container: whether a file begins as it does, what reads it and, where anybody needs it, what writes it."""

    matches: Callable[[bytes], bool]
    read: Reader
    writer: Writer | FolderWriter | None = None


class Format(Protocol):
    """What a module offers that reads one container."""

    def matches(self, head: bytes, /) -> bool: ...

    def read(self, path: FilePath, *, salvage: bool = False) -> Contents: ...


def container(format: Format, writer: Writer | FolderWriter | None = None) -> Container:
    """The container that a module reads; the module is imported by the first file that is held against it."""
    return Container(
        lambda head: format.matches(head), lambda path, salvage=False: format.read(path, salvage=salvage), writer
    )


# Every container, in the order in which files are tried.
CONTAINERS: tuple[Container, ...] = (
    Container(
        lambda head: zip_archive.matches(head), lambda path, salvage=False: read_zip(path, salvage=salvage), torch_zip
    ),
    container(safetensors, safetensors),
    container(gguf, gguf),
    container(torch_tar),
    container(torch_legacy),
    Container(
        lambda head: sharded.matches(head),
        lambda path, salvage=False: sharded.read(path, read_shard, salvage=salvage),
    ),
    Container(lambda head: dcp.matches(head), lambda path, salvage=False: read_distributed(path, salvage=salvage), dcp),
    container(plain_pickle),
    container(npy),
)


STEPS = 4  # how many folders may lead to the next one


class ZipKind(Protocol):
    """What a module offers that reads one kind of zip."""

    def holds(self, archive: zip_archive.Archive) -> bool: ...

    def read(self, archive: zip_archive.Archive, *, salvage: bool = False) -> Contents: ...


# What a zip may be, told by its members.
ZIPS: tuple[ZipKind, ...] = (torch_export, torch_package, torchscript, torch_zip, stable_baselines, npz)
OTHER_ZIPS: tuple[ZipKind, ...] = (npz,)  # those that are not torch's, whose readers tell capitals in names apart
ZIP_WRITERS: tuple[Writer, ...] = (npz,)  # beside torch's own


def writers() -> dict[str, Writer | FolderWriter]:
    """What writes each container, by the extensions of its outputs."""
    made = [*(one.writer for one in CONTAINERS if one.writer is not None), *ZIP_WRITERS]
    found = [one.module() if isinstance(one, Later) else one for one in made]
    return {suffix: cast(Writer | FolderWriter, writer) for writer in found for suffix in writer.SUFFIXES}


def read(path: FilePath, *, salvage: bool = False) -> Contents:
    """Read what a file or folder holds: its index only, no tensor.

    With ``salvage`` a truncated file is read as far as it goes; tensors that are cut off are opaque ones of kind
    "lost".  Raises NotACheckpoint (it is something else), BrokenFile (it is damaged), FileError (it cannot be
    opened).
    """
    try:
        if path.is_dir():
            if (here := path.local) is not None:
                return _read_folder(here, salvage=salvage)
            return engines.read(path, read_shard, salvage=salvage) or read_named(_found_there(path), salvage=salvage)
        if path.name == DCP_METADATA:
            return read_distributed(path, salvage=salvage)
        head = _head(path)
        for container in CONTAINERS:
            if container.matches(head):
                return _read_by(container.read, path, salvage)
    except OSError as error:
        raise path.failure(error) from error
    raise foreign.refuse(path, head, safetensors.broken(path, head))


def read_named(path: FilePath, *, salvage: bool = False) -> Contents:
    """Read what somebody means by naming a file or folder: of a shard that no index lists, the whole set.

    Raises what :func:`read` raises.
    """
    shards = shard_set.set_of(path) if is_shard(path.name) and path.is_file() else None
    return read(path, salvage=salvage) if shards is None else shard_set.read(shards, read_shard, salvage=salvage)


def _found_there(folder: FilePath) -> FilePath:
    """The file of a folder at a URL that says what is in it."""
    if DCP_METADATA in folder.names():
        return folder / DCP_METADATA
    return sharded.find(folder)


def read_distributed(path: FilePath, *, salvage: bool = False) -> Contents:
    """Read a distributed checkpoint's metadata.  Raises FileError for one at a URL."""
    if (here := path.local) is None:
        problem = "belongs to a distributed checkpoint at a URL, whose pieces torch's own engine reads from files"
        raise FileError(path, problem, "copy its folder here first")
    contents = dcp.read(here, salvage=salvage)
    if not megatron_core.holds(here.parent.names()):
        return contents
    return megatron_core.joined(contents, read(here.parent / megatron_core.COMMON))


def located(path: LocalPath) -> LocalPath:
    """The file that a path means: itself, or that in a folder.  Raises NotACheckpoint for a folder without one."""
    try:
        if not path.is_dir() or consolidated.holds(path) or engines.holds(path):
            return path
        return _step_or_found(path)
    except OSError as error:
        raise path.failure(error) from error


def index_of(path: LocalPath) -> Index:
    """The index of a file, whose keys can be said anew where they lie.

    Raises FileError for a container where they cannot, and what :func:`read` raises.
    """
    path = located(path)
    try:
        index = _index(path, _head(path))
        listing = sharded.index_over(path)
    except OSError as error:
        raise path.failure(error) from error
    if (shards := shard_set.set_of(path)) is not None:
        raise FileError(path, f"is one of {shards.count:,} shards, which cannot change in one step", NEW_FILE)
    if index is None:
        container = read(path).container
        raise FileError(path, f"is {container}: its keys cannot be changed where they lie", NEW_FILE)
    if listing is not None:
        raise FileError(path, f"is a shard, and two files, it and {listing.name}, cannot change in one step", NEW_FILE)
    return index


def _index(path: LocalPath, head: bytes) -> Index | None:
    if safetensors.matches(head):
        return safetensors.Index(path)
    if zip_archive.matches(head):
        archive = zip_archive.read_archive(path)
        if _zip_kind(archive) is torch_zip:
            return torch_zip.Index(archive)
    return None


def _read_folder(folder: LocalPath, *, salvage: bool, steps: int = 0) -> Contents:
    if consolidated.holds(folder):
        return consolidated.read(folder)
    if (joined := engines.read(folder, read_shard, salvage=salvage)) is not None:
        return joined
    found = _step_or_found(folder)
    if found.is_dir():
        if steps == STEPS:
            raise NotACheckpoint(folder, "leads from folder to folder without end", "name the folder of one step")
        return _read_folder(found, salvage=salvage, steps=steps + 1)
    contents = read_named(found, salvage=salvage)
    contents = replace(contents, notes=(*contents.notes, *engines.beside(folder)))
    sets = [] if found.name.endswith(sharded.SUFFIX) or is_shard(found.name) else sets_in(folder, folder.names())
    if sets and found.name != DCP_METADATA:
        firsts = listed(one.first.name for one in sets)
        contents = replace(
            contents, notes=(*contents.notes, f"shards that no index lists are beside it, not read: {firsts}")
        )
    pieces = folder / "sharded"
    if not pieces.is_dir() or not consolidated.holds(pieces):
        return contents
    return replace(contents, notes=(*contents.notes, f"{pieces} has the same tensors in pieces, not read"))


def _step_or_found(folder: LocalPath) -> LocalPath:
    """The file of a folder that says what is in it, or the folder of the step that a folder of steps means."""
    if (inner := engines.inner(folder)) is not None and inner.local is not None and not _has_weights(folder):
        return inner.local
    try:
        return _found(folder)
    except NotACheckpoint:
        if (step := engines.step(folder)) is None or step.local is None:
            raise
        return step.local


def _has_weights(folder: LocalPath) -> bool:
    """Whether a folder has weights of its own, under a name that everybody gives them."""
    return any(name.removesuffix(sharded.SUFFIX) in sharded.PREFERRED for name in folder.names())


def _found(folder: LocalPath) -> LocalPath:
    """The file of a folder that says what is in it.  Raises NotACheckpoint when there is none, or several."""
    inside = folder.names()
    if megatron_core.holds(inside):
        return folder / DCP_METADATA
    if megatron_core.lacks_metadata(inside):
        raise foreign.refuse_megatron_core(folder)
    try:
        found = folder / sharded.find(folder).name
    except NotACheckpoint as error:
        if DCP_METADATA in inside:
            return folder / DCP_METADATA
        raise foreign.refuse_folder(folder, inside) or error from None
    if DCP_METADATA not in inside:
        return found
    problem = f"holds a distributed checkpoint ({DCP_METADATA}) and {found.name!r}"
    raise NotACheckpoint(folder, problem, f"name one: {folder / DCP_METADATA} or {found}")


def _read_by(reader: Reader, path: FilePath, salvage: bool) -> Contents:
    contents = reader(path, salvage=salvage)
    path.forget()
    return contents


def read_shard(path: FilePath, *, salvage: bool = False) -> Contents:
    """Read one file that an index names, which is no index."""
    if sharded.matches(_head(path)):
        raise NotACheckpoint(path, "is named as a shard and is an index itself, or other JSON", "rebuild the index")
    return read(path, salvage=salvage)


def _head(path: FilePath) -> bytes:
    return path.head()


def read_zip(path: FilePath, *, salvage: bool = False) -> Contents:
    """Read a zip of one of the kinds that are known.  Raises NotACheckpoint for any other zip, BrokenFile."""
    try:
        archive = zip_archive.read_archive(path, folds_names=False)
    except zip_archive.Truncated as error:
        if path.local is None and not salvage:
            raise  # to look for its records is to fetch all of it
        archive = zip_archive.scan_archive(path)
        if not salvage:
            raise torch_zip.truncated(archive, error) from error
        if not torch_zip.holds(archive) and not npz.holds(archive):
            raise
    kind = _zip_kind(archive)
    if kind is None:
        raise foreign.refuse_zip(path, list(archive.members))
    return kind.read(archive, salvage=salvage)


def _zip_kind(archive: zip_archive.Archive) -> ZipKind | None:
    """What reads a zip, by its records.  Raises BrokenFile where they are those of two containers."""
    kinds = [kind for kind in ZIPS if kind.holds(archive)]
    others = {torch_export: "torch.export", torch_package: "torch.package"}
    for kind, name in others.items():
        if kind in kinds and torch_zip.root_pickle(archive) is not None:
            problem = f"has the data.pkl of torch.save and the records of {name}: it can be read in two ways"
            raise BrokenFile(archive.path, problem, "do not use it")
    found = kinds[0] if kinds else None
    if found not in OTHER_ZIPS:
        zip_archive.check_names(archive.path, archive.members)
    return found


def writer_for(path: FilePath) -> Writer | FolderWriter:
    """The writer for an output's extension.  Raises NotACheckpoint for one that names no container."""
    try:
        return writers()[path.suffix.lower()]
    except KeyError:
        known = ", ".join(writers())
        what = "has an extension that names no container to write" if path.suffix else "has no extension"
        raise NotACheckpoint(path, what, f"the container is chosen by it: {known}; {path.name}/ is a folder") from None
