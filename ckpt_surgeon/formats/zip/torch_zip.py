"""The zip container of ``torch.save`` since 1.6: ``data.pkl`` beside one record of bytes per storage.

Reading resolves every storage to its place in the file; writing emits the same layout (protocol 2 pickle, records
``data/0``, ``data/1`` …, stored, aligned), so that ``torch.load`` reads it, mapped or not, with weights_only.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial

from ...errors import NEW_FILE, BrokenFile, EditError, FileError, NoRoom
from ...files.journal import Patch
from ...files.prefetch import reading_ahead
from ...files.sinks import Sink
from ...tensors.dtypes import DType
from ...tensors.extra_state import Device, tensors_in, unknown_in
from ...tensors.records import ComputedTensor, ExtraState, OpaqueTensor, Tensor, spans_of, unseen_span
from ...tensors.storage import Storage
from ...tensors.stored import StoredTensor
from ...tensors.strides import row_major
from ..contents import Contents, Reindexed
from ..payloads import names_in_loads
from ..pickle import numpy_objects
from ..pickle.key_opcodes import KeyUnpickler, Opcode
from ..pickle.machine import PickleError, Unpickled
from ..pickle.torch_objects import CONSTRUCTORS, TypedStorage, storage_dtype
from ..pickle.unpickler import Unpickler
from ..pickle.values import Global, Object, Value, spelled
from .archive import ALIGNMENT, TRUNCATED, Archive, Directory, Member, checksum_places

CONTAINER = "torch zip"
SUFFIXES: tuple[str, ...] = (".pth", ".pt", ".bin", ".ckpt")
ALL_CONSTRUCTORS = CONSTRUCTORS | numpy_objects.CONSTRUCTORS
VERSIONS = range(1, 11)  # kMinSupportedFileFormatVersion to kMaxSupportedFileFormatVersion, caffe2/serialize/versions.h
METADATA_DEPTH = 100  # how deep what is in ``_metadata`` may be nested
ROOT = "archive"  # the folder in the archive; torch takes any


# -- reading


def holds(archive: Archive) -> bool:
    """Whether a zip is a checkpoint of torch.save."""
    return any(name == "data.pkl" or name.endswith("/data.pkl") for name in archive.members)


def root_pickle(archive: Archive) -> str | None:
    """The pickle that torch.load reads: ``data.pkl`` in the folder of the first record."""
    member = archive.find(archive.folder + "data.pkl") if archive.folder else None
    return None if member is None else member.name


def main_pickle(archive: Archive) -> str:
    """The pickle that torch.load reads; where it would find none (a zip packed again), the outermost one.

    Raises BrokenFile where several lie equally far out.
    """
    if found := root_pickle(archive):
        return found
    names = [name for name in archive.members if name == "data.pkl" or name.endswith("/data.pkl")]
    if not names:
        raise BrokenFile(archive.path, "has no data.pkl, where torch keeps what is in a file", "fetch it again")
    outermost = min(name.count("/") for name in names)
    found, *others = [name for name in names if name.count("/") == outermost]
    if others:
        problem = f"holds {found!r} and {others[0]!r}, and torch reads neither: the first record lies elsewhere"
        raise BrokenFile(archive.path, problem, "unpack it and give one of them")
    return found


def read(archive: Archive, *, salvage: bool = False) -> Contents:
    """Read the index of a torch zip; with ``salvage``, storages may be missing.  Raises BrokenFile."""
    pickle = main_pickle(archive)
    folder = pickle[: -len("data.pkl")]
    _check_version(archive, folder)
    find = storages(archive, folder, lambda key: f"{folder}data/{key}", salvage=salvage)
    return _contents(archive, load(archive, pickle, find))


def _check_version(archive: Archive, folder: str) -> None:
    """Raise BrokenFile for a format that is newer than torch's, or that is none.

    A zip without a version is read: torch writes one always and refuses without it, but all else is there.
    """
    member = archive.find(f"{folder}.data/version") or archive.find(f"{folder}version")
    if member is None:
        return
    text = archive.read(member.name)
    found = re.match(rb"\s*\+?([0-9]{1,18})", text)
    if found is None or not VERSIONS[0] <= int(found[1]) <= VERSIONS[-1]:
        problem = f"has a format version of {text[:20]!r}; torch reads {VERSIONS[0]} to {VERSIONS[-1]}"
        raise BrokenFile(archive.path, problem, "save it again with the torch that wrote it, or fetch it again")
    alignment = archive.find(f"{folder}.storage_alignment")
    if alignment is not None and not re.fullmatch(rb"\s*[0-9]{1,18}\s*", archive.read(alignment.name)):
        raise BrokenFile(archive.path, "has a .storage_alignment that is no number", "fetch it again")


def _contents(archive: Archive, made: Unpickled) -> Contents:
    notes = () if archive.has_checksums else ("saved without checksums: damage cannot be told",)
    inside = partial(names_in_loads, archive.path, made.loads)
    return Contents(archive.path, CONTAINER, made.root, notes=notes, globals=made.globals, globals_inside=inside)


def truncated(found: Archive, error: BrokenFile) -> BrokenFile:
    """The error for a zip without its directory, with the bytes that it would need where its pickle tells them."""
    if not holds(found):
        return error
    pickle = found.members[main_pickle(found)]
    if pickle.packed < pickle.size:
        return error  # nobody knows to how many bytes the tensors were packed
    sizes: dict[Value, int] = {}

    def see(saved: Value) -> Value:
        if isinstance(saved, tuple) and len(saved) == 5 and type(saved[4]) is int:
            sizes[spelled(saved[2])] = saved[4] * storage_dtype(saved[1]).itemsize
        return None

    try:
        Unpickler(found.read(pickle.name), persistent=see).load()
    except (PickleError, BrokenFile):
        return error
    there = found.path.size
    whole = max(member.start + member.packed for member in found.members.values())
    missing = [size for key, size in sizes.items() if pickle.name.removesuffix(".pkl") + f"/{key}" not in found.members]
    needed = whole + sum(missing) + len(missing) * ALIGNMENT
    problem = f"is truncated: it has {there:,} bytes of at least {needed:,}"
    return BrokenFile(found.path, problem if needed > there else error.problem, TRUNCATED)


def load(archive: Archive, pickle: str, find: Callable[[Value], Value]) -> Unpickled:
    """The object of one pickle in an archive, and the names that it mentions."""
    machine = Unpickler(archive.read(pickle), constructors=ALL_CONSTRUCTORS, persistent=find)
    return unpickled(archive, pickle, machine)


def unpickled(archive: Archive, pickle: str, machine: Unpickler) -> Unpickled:
    """What a machine makes of the pickle that it was given, and the names."""
    try:
        return machine.unpickled()
    except PickleError as error:
        raise BrokenFile(archive.path, f"its {pickle.rpartition('/')[2]} is damaged: {error}") from error


def storages(
    archive: Archive,
    folder: str,
    record_of: Callable[[str], str],
    *,
    salvage: bool = False,
    others: Callable[[Value], Value] | None = None,
) -> Callable[[Value], Value]:
    """A function from a persistent id to the storage in the archive.

    ``record_of`` gives the name of a storage's record by its key; ``others`` reads persistent ids of other kinds.
    The function raises ValueError or BrokenFile for an id that torch refuses.
    """
    big = _is_big_endian(archive, folder)
    known: dict[str, TypedStorage] = {}

    def find(saved: Value) -> Value:
        if others is not None and isinstance(saved, tuple) and saved:
            if saved[0] not in ("storage", b"storage"):
                return others(saved)
            if len(saved) == 5 and type(saved[2]) is int:  # torch.package counts its storages
                saved = (*saved[:2], str(saved[2]), *saved[3:])
        cls, key, location, numel = _fields(saved)
        typed = known.get(key)
        if typed is not None:  # whatever its class and size are here: torch takes the first as well
            return typed
        dtype = storage_dtype(cls)
        nbytes = numel * dtype.itemsize
        member = archive.members.get(record_of(key))
        if member is None and salvage:
            storage = Storage(None, nbytes, location)
        elif member is None:
            raise BrokenFile(archive.path, f"storage {key!r} is missing: there is no record data/{key}", TRUNCATED)
        elif member.size != nbytes:
            problem = f"storage {key!r} should have {nbytes:,} bytes, its record has {member.size:,}"
            raise BrokenFile(archive.path, problem)
        else:
            storage = member.storage(archive.path, location, big, archive.has_checksums)
        typed = TypedStorage(storage, dtype)
        if nbytes and location != "meta":  # torch keeps no storage without memory: each mention has its own class
            known[key] = typed
        return typed

    return find


def _is_big_endian(archive: Archive, folder: str) -> bool:
    member = archive.find(folder + "byteorder")
    order = b"little" if member is None else archive.read(member.name)
    if order not in (b"little", b"big"):
        raise BrokenFile(archive.path, f"has an unknown byte order, {order[:20]!r}", "fetch it again")
    return order == b"big"


def _fields(saved: Value) -> tuple[Value, str, str, int]:
    """class, key, location and element count of a storage's persistent id.  Raises ValueError for any other."""
    if not isinstance(saved, tuple) or len(saved) != 5 or saved[0] not in ("storage", b"storage"):
        raise ValueError("a tensor without a storage: a persistent id that is no storage")
    _, cls, key, location, numel = saved
    if type(key) is not str or "\0" in key:
        raise ValueError(f"a storage under the key {spelled(key)!r}, which is no text that torch writes")
    if type(numel) is not int or numel < 0:
        raise ValueError("a storage without a proper size")
    return cls, key, spelled(location), numel


def package_object(saved: Value) -> Value:
    """A persistent id that is no storage: torch.package has such for its own objects."""
    if isinstance(saved, tuple) and saved and isinstance(saved[0], str):
        return Object(Global("persistent", saved[0]), saved[1:])
    raise ValueError("a persistent id that is no storage")


# -- renaming in place


class Index:
    """The pickle of a torch zip, its keys with the opcodes that say them: see :class:`.contents.Index`.

    What is shorter leaves its room behind the STOP opcode, where no unpickler looks.  Raises FileError where the
    pickle does not lie in the file as it is, or shares its bytes with another record.
    """

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._member = archive.members[main_pickle(archive)]
        start, stop = self._member.start, self._member.start + self._member.packed
        if self._member.packed != self._member.size or self._member.method:
            raise FileError(archive.path, "its index is compressed, so its keys cannot be renamed in place", NEW_FILE)
        if any(other.start < stop and start < other.start + other.packed for other in self._others()):
            raise BrokenFile(archive.path, "another record shares bytes with its index", "fetch the file again")
        self._raw = archive.read(self._member.name)
        folder = self._member.name[: -len("data.pkl")]
        _check_version(archive, folder)
        find = storages(archive, folder, lambda key: f"{folder}data/{key}")
        self._machine = KeyUnpickler(self._raw, constructors=ALL_CONSTRUCTORS, persistent=find)
        self.contents = _contents(archive, unpickled(archive, self._member.name, self._machine))

    def _others(self) -> list[Member]:
        return [member for member in self._archive.members.values() if member is not self._member]

    def places(self, node: Value, name: str) -> Sequence[Hashable]:
        """The opcodes that say a key."""
        return self._machine.places(node, name)

    def rewritten(self, texts: Mapping[Hashable, str]) -> Reindexed:
        """The pickle with other keys, and its new checksums.  Raises NoRoom."""
        places = {place: text for place, text in texts.items() if isinstance(place, Opcode)}
        made = self._machine.rewritten(places)
        if len(made) > len(self._raw):
            made = self._machine.rewritten(places, lean=True)
        return self.with_pickle(made)

    def with_pickle(self, made: bytes) -> Reindexed:
        """Another pickle in the place of the one that is there, and its new checksums.  Raises NoRoom."""
        room = len(self._raw)
        if len(made) > room:
            raise NoRoom(self._archive.path, len(made), room)
        padded = made.ljust(room, b"\0")
        patches = [Patch(self._member.start, self._raw, padded)]
        if self._archive.has_checksums:
            old, new = struct.pack("<I", self._member.crc32), struct.pack("<I", zlib.crc32(padded))
            patches += [Patch(place, old, new) for place in checksum_places(self._archive.path, self._member)]
        planned = Archive(self._archive.path, self._archive.members)
        planned.replaced[self._member.name] = padded
        return Reindexed(tuple(patches), read(planned), room - len(made))


# -- writing


HOLDS_EXTRA_STATES = True


def check(tensors: Mapping[str, Tensor]) -> None:
    """Raise EditError naming the tensors that this container cannot hold here."""
    unknown = [f"{key!r} (holds an {what})" for key, tensor in tensors.items() if (what := unknown_in(tensor))]
    if unknown:
        problem = f"{', '.join(unknown)}: an extra state that is more than data cannot be written again"
        raise EditError(problem, remedy="drop '*_extra_state', or rename in place, which leaves it as it is")
    odd = [f"{key!r} ({tensor.kind})" for key, tensor in tensors.items() if isinstance(tensor, OpaqueTensor)]
    if odd:
        raise EditError(
            f"{', '.join(odd)}: more than plain elements, cannot be copied", remedy="leave them out by pattern"
        )


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """About how many bytes :func:`write` will write: the elements, each tie once, and the index."""
    data = {one.tie: one.nbytes for tensor in tensors.values() for one in tensors_in(tensor)}
    return sum(data.values()) + sum(len(key) + 160 for key in tensors) + 120 * len(data)


def write(
    sink: Sink,
    tensors: Mapping[str, Tensor],
    versions: Mapping[str, Mapping[str, Value]] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a state_dict: ties as one storage, everything else compact, on the device ``cpu``.

    ``versions`` becomes the OrderedDict's ``_metadata``; torch zips have no room for ``metadata``.
    """
    check(tensors)
    records: dict[Hashable, tuple[int, Tensor]] = {}
    for tensor in (one for held in tensors.values() for one in tensors_in(held)):
        records.setdefault(tensor.tie, (len(records), tensor))
    directory = Directory()

    def literal(name: str, raw: bytes) -> None:
        sink.literal(directory.local(f"{ROOT}/{name}", len(raw), zlib.crc32(raw), sink.position))
        sink.literal(raw)

    literal("data.pkl", _pickled(tensors, records, versions))
    literal("byteorder", b"little")
    with reading_ahead(spans_of(tensor for _, tensor in records.values())):
        for index, tensor in records.values():
            write_record(sink, directory, f"{ROOT}/data/{index}", tensor)
    literal("version", b"3\n")
    sink.literal(directory.finish(sink.position))


def write_record(sink: Sink, directory: Directory, name: str, tensor: Tensor) -> None:
    if isinstance(tensor, StoredTensor) and not tensor.is_contiguous:
        tensor = tensor.in_place or tensor
    span, crc32 = tensor.span, tensor.crc32
    if span is not None and crc32 is not None:
        sink.literal(directory.local(name, tensor.nbytes, crc32, sink.position, source_start=span.start))
        if unseen_span(tensor) is not None:
            sink.copy(span)
        else:
            sink.stream(tensor.blocks(), tensor.nbytes)
        return
    sink.literal(directory.local(name, tensor.nbytes, 0, sink.position, described=not sink.can_patch))
    made = sink.stream(tensor.blocks(), tensor.nbytes, checksum=True)
    where, checksum = directory.set_crc32(made)
    if sink.can_patch:
        sink.patch(where, checksum)
    else:
        sink.literal(directory.descriptor())


def _pickled(
    tensors: Mapping[str, Tensor],
    records: Mapping[Hashable, tuple[int, Tensor]],
    versions: Mapping[str, Mapping[str, Value]] | None,
) -> bytes:
    """The pickle of an OrderedDict of tensors, in protocol 2 as torch.save writes it."""
    modules = {module: dict(version) for module, version in (versions or {}).items()}  # held: the memo goes by identity
    out = _Pickle(_shared(modules))
    out.raw(b"\x80\x02")
    out.ordered_dict()
    if tensors:
        out.raw(b"(")
        for key, tensor in tensors.items():
            out.text(key)
            if isinstance(tensor, ExtraState):
                out.value(tensor.value, records)
            else:
                out.tensor(tensor, records[tensor.tie][0])
        out.raw(b"u")
    if versions is not None:
        out.raw(b"}")
        out.text("_metadata")
        out.ordered_dict()
        if modules:
            out.raw(b"(")
            for module, version in modules.items():
                out.text(module)
                out.plain(version)
            out.raw(b"u")
        out.raw(b"sb")
    out.raw(b".")
    return bytes(out.buffer)


def _shared(root: Value) -> frozenset[int]:
    """The identities of the dicts, lists and tuples that stand in several places below a value, or in themselves."""
    seen: set[int] = set()
    shared: set[int] = set()
    ahead = [root]
    while ahead:
        node = ahead.pop()
        if isinstance(node, (dict, list, tuple)):
            if id(node) in seen:
                shared.add(id(node))
                continue
            seen.add(id(node))
            ahead.extend([part for pair in node.items() for part in pair] if isinstance(node, dict) else node)
    return frozenset(shared)


class _Pickle:
    """Just enough of a pickler for a state_dict; globals and repeated words go through the memo."""

    def __init__(self, shared: frozenset[int] = frozenset()) -> None:
        self.buffer = bytearray()
        self._memo: dict[str, bytes] = {}
        self._shared = shared  # the identities of containers that stand in several places

    def raw(self, opcodes: bytes) -> None:
        self.buffer += opcodes

    def _once(self, name: str, opcodes: bytes) -> None:
        if name in self._memo:
            self.buffer += self._memo[name]
        else:
            index = len(self._memo)
            self._memo[name] = b"j" + struct.pack("<I", index)
            self.buffer += opcodes + b"r" + struct.pack("<I", index)

    def found(self, module: str, name: str) -> None:
        self._once(f"{module} {name}", f"c{module}\n{name}\n".encode())

    def word(self, text: str) -> None:
        self._once(f"'{text}", _unicode(text))

    def text(self, text: str) -> None:
        self.buffer += _unicode(text)

    def ordered_dict(self) -> None:
        self.found("collections", "OrderedDict")
        self.buffer += b")R"

    def integers(self, values: tuple[int, ...]) -> None:
        short = len(values) <= 3
        self.buffer += b"" if short else b"("
        for value in values:
            self.buffer += _integer(value)
        self.buffer += (b")", b"\x85", b"\x86", b"\x87")[len(values)] if short else b"t"

    def tensor(self, tensor: Tensor, record: int) -> None:
        """One ``_rebuild_tensor_v2`` (or v3, where the dtype has no storage class) and its persistent id."""
        dtype = tensor.dtype
        stride = tensor.stride if isinstance(tensor, StoredTensor) and tensor.is_dense else row_major(tensor.shape)
        self.found("torch._utils", "_rebuild_tensor_v2" if dtype.storage else "_rebuild_tensor_v3")
        self.buffer += b"(("
        self.word("storage")
        self.found(*(("torch", dtype.storage) if dtype.storage else ("torch.storage", "UntypedStorage")))
        self.text(str(record))
        self.word("cpu")
        self.buffer += _integer(tensor.numel if dtype.storage else tensor.nbytes) + b"tQK\x00"
        self.integers(tensor.shape)
        self.integers(stride)
        self.buffer += b"\x89"
        self.ordered_dict()
        if not dtype.storage:
            self.found("torch", dtype.name)
        self.buffer += b"tR"

    def plain(self, value: Value, depth: int = 0) -> None:
        """A value of torch's ``_metadata``: nested dicts, lists and tuples of numbers, strings, None."""
        if value is None or isinstance(value, bool):
            self.buffer += {None: b"N", True: b"\x88", False: b"\x89"}[value]
        elif isinstance(value, int):
            self.buffer += _integer(value)
        elif isinstance(value, float):
            self.buffer += b"G" + struct.pack(">d", value)
        elif isinstance(value, str):
            self.text(value)
        elif isinstance(value, (dict, list, tuple)):
            self._plain_container(value, depth)
        else:
            self.buffer += b"N"  # an object of some class: torch's own readers of _metadata look at versions only

    def _plain_container(self, value: dict[Value, Value] | list[Value] | tuple[Value, ...], depth: int) -> None:
        """A container; one that stands in several places, or in itself, is written once."""
        name = f"#{id(value)}"
        if name in self._memo:
            self.buffer += self._memo[name]
            return
        if depth > METADATA_DEPTH:
            raise EditError(["its _metadata is nested too deeply to be written"], remedy="write .safetensors")
        is_shared = id(value) in self._shared
        if not isinstance(value, tuple):
            empty = b"}" if isinstance(value, dict) else b"]"
            if is_shared:
                self._once(name, empty)
            else:
                self.buffer += empty
        self.buffer += b"("
        items = [part for pair in value.items() for part in pair] if isinstance(value, dict) else value
        for item in items:
            self.plain(item, depth + 1)
        closing = b"u" if isinstance(value, dict) else b"e" if isinstance(value, list) else b"t"
        if isinstance(value, tuple) and is_shared:
            self._once(name, closing)
        else:
            self.buffer += closing

    # -- extra states

    def value(self, value: object, records: Mapping[Hashable, tuple[int, Tensor]]) -> None:
        """The value of an extra state, as pickle writes it; a container that stands in it twice, once."""
        if isinstance(value, (StoredTensor, ComputedTensor)):
            self.tensor(value, records[value.tie][0])
        elif isinstance(value, (dict, list)):
            self._container(value, records)
        elif isinstance(value, (tuple, set, frozenset)):
            self._collection(value, records)
        elif isinstance(value, (bytes, bytearray, io.BytesIO)):
            self._raw_bytes(value)
        elif isinstance(value, complex):
            self.found("builtins", "complex")
            self.buffer += b"G" + struct.pack(">d", value.real) + b"G" + struct.pack(">d", value.imag) + b"\x86R"
        elif isinstance(value, DType):
            self.found("torch", value.name)
        elif isinstance(value, Device):
            self.found("torch", "device")
            self.text(value.name)
            self.buffer += b"\x85R"
        else:
            self.plain(value)

    def _container(self, value: object, records: Mapping[Hashable, tuple[int, Tensor]]) -> None:
        name = f"#{id(value)}"
        if name in self._memo:
            self.buffer += self._memo[name]
            return
        if isinstance(value, OrderedDict):
            self.ordered_dict()
        self._once(name, b"" if isinstance(value, OrderedDict) else b"}" if isinstance(value, dict) else b"]")
        self.buffer += b"("
        items = [one for pair in value.items() for one in pair] if isinstance(value, dict) else value
        assert isinstance(items, list)
        for item in items:
            self.value(item, records)
        self.buffer += b"u" if isinstance(value, dict) else b"e"

    def _collection(
        self,
        value: tuple[object, ...] | set[object] | frozenset[object],
        records: Mapping[Hashable, tuple[int, Tensor]],
    ) -> None:
        """A tuple, or a set or frozenset, which protocol 2 makes of a list."""
        if not isinstance(value, tuple):
            self.found("builtins", type(value).__name__)
            self.buffer += b"]"
        self.buffer += b"("
        for item in value:
            self.value(item, records)
        self.buffer += b"t" if isinstance(value, tuple) else b"e\x85R"

    def _raw_bytes(self, value: bytes | bytearray | io.BytesIO) -> None:
        """Bytes as text in Latin-1, as protocol 2 has them; ``io.BytesIO`` by its state."""
        if isinstance(value, bytes):
            self.found("_codecs", "encode")
            self.text(value.decode("latin-1"))
            self.word("latin1")
            self.buffer += b"\x86R"
        elif isinstance(value, bytearray):
            self.found("builtins", "bytearray")
            self._raw_bytes(bytes(value))
            self.buffer += b"\x85R"
        else:
            self.found("_io", "BytesIO")
            self.buffer += b")\x81"
            self._raw_bytes(value.getvalue())
            self.buffer += _integer(value.tell()) + b"N\x87b"


def _unicode(text: str) -> bytes:
    encoded = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes((value,))
    if 0 <= value < 65536:
        return b"M" + struct.pack("<H", value)
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    encoded = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    if len(encoded) > 255:
        problem = f"an integer of {len(encoded):,} bytes, beside the weights, is longer than torch.load takes"
        raise EditError([problem], remedy="write .safetensors")
    return b"\x8a" + bytes((len(encoded),)) + encoded
