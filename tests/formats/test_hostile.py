"""Files made to do harm: nothing in them runs, and none takes much time or memory, whatever it claims.

The pickles are assembled from their opcodes; ``pickle`` itself, which does run them, shows that they are live.
"""

from __future__ import annotations

import copyreg
import io
import json
import pickle
import pickle as op
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from broken_files import Part, counted, legacy_of, pickled, tar_of, zip_of
from command_line import Ran, Run
from payloads import PAYLOADS, PROTO, STOP, call, get, mkdir, named, number, put, text
from tables import assert_same, pickle_of, ramp, rewritten, save_legacy, save_zip

import ckpt_surgeon


@contextmanager
def extension() -> Iterator[None]:
    """Code 240 means os.mkdir, for pickle."""
    copyreg.add_extension("posix", "mkdir", 240)
    try:
        yield
    finally:
        copyreg.remove_extension("posix", "mkdir", 240)


@pytest.mark.parametrize("name", PAYLOADS)
def test_the_payloads_are_live(name: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    with extension(), suppress(TypeError, AttributeError):  # what a payload returns is of no use to what comes after
        pickle.loads(PROTO + PAYLOADS[name][0](str(marker)) + STOP)
    assert marker.is_dir()


def with_weights(payload: bytes) -> bytes:
    """A training checkpoint: weights, and the payload beside them."""
    tensor = pickled(Part())[2:-1]
    beside = text("run") + payload
    return (
        op.PROTO
        + b"\x04"
        + op.EMPTY_DICT
        + op.MARK
        + text("model")
        + op.EMPTY_DICT
        + text("w")
        + tensor
        + (op.SETITEM + beside + op.SETITEMS + STOP)
    )


def hostile_zip(payload: bytes, folder: Path) -> Path:
    return zip_of(folder, with_weights(payload), {"0": ramp(12).numpy().tobytes()})


def hostile_script(payload: bytes, folder: Path) -> Path:
    path = hostile_zip(payload, folder)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/constants.pkl", b"\x80\x02).")
    return path


def hostile_legacy(payload: bytes, folder: Path) -> Path:
    tensor = Part()
    whole = legacy_of({"model": {"w": tensor}, "run": "PAYLOAD"}, {"0": counted(12, 48)})
    path = folder / "legacy.pth"
    path.write_bytes(whole.replace(text("PAYLOAD"), payload))
    return path


def hostile_pickle(payload: bytes, folder: Path) -> Path:
    weights = pickle.dumps(ramp(3, 4), 4)[2:-1]
    path = folder / "plain.pkl"
    path.write_bytes(
        PROTO + op.EMPTY_DICT + op.MARK + text("model") + op.EMPTY_DICT + text("w") + weights + op.SETITEM
        + text("run") + payload + op.SETITEMS + STOP
    )  # fmt: skip
    return path


CONTAINERS: dict[str, Callable[[bytes, Path], Path]] = {
    "zip": hostile_zip,
    "legacy": hostile_legacy,
    "pickle": hostile_pickle,
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", PAYLOADS)
def test_scan_names_it_and_the_weights_beside_it_are_read(name: str, container: str, ckpt: Run, tmp_path: Path) -> None:
    make, suspect = PAYLOADS[name]
    marker = tmp_path / "ran"
    path = CONTAINERS[container](make(str(marker)), tmp_path)
    scanned = ckpt("scan", path)
    assert (scanned.status, scanned.err) == (1, "")
    assert suspect in scanned.out
    assert suspect in json.loads(ckpt("scan", path, "--json").out)["names"].__str__()
    listed = ckpt("ls", path, "--all")
    assert (listed.status, listed.err) == (0, "")
    assert list(ckpt_surgeon.load(path)) == ["w"]
    assert ckpt("convert", path, tmp_path / "clean.pth").status == 0
    assert ckpt("scan", tmp_path / "clean.pth").status == 0
    assert list(torch.load(tmp_path / "clean.pth")) == ["w"]
    assert not marker.exists()


# Where a legacy file, a tar or a pickle in a pickle may hide what torch.load would run.


def _in_the_header(number_of: int, payload: bytes, folder: Path) -> Path:
    header: tuple[object, ...] = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {}, [])
    parts = [pickle.dumps(part, 2) for part in header]
    kept = parts[number_of][2:-1]
    parts[number_of] = PROTO + payload + op.POP + kept + STOP
    path = folder / "legacy.pth"
    path.write_bytes(b"".join(parts))
    return path


def _in_a_persistent_id(payload: bytes, folder: Path) -> Path:
    raw = with_weights(op.NONE).replace(text("cpu"), payload)
    return zip_of(folder, raw, {"0": bytes(48)})


def _in_a_tar(member: str, payload: bytes, folder: Path) -> Path:
    raw = {"storages": pickle.dumps(0, 2) + pickle.dumps([], 2), "tensors": pickle.dumps(0, 2),
           "pickle": pickle.dumps({}, 2)}  # fmt: skip
    raw[member] = PROTO + payload + op.POP + raw[member][2:]
    path = folder / "old.pth"
    with tarfile.open(path, "w:") as archive:
        for name, content in raw.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def _in_a_pickled_storage(payload: bytes, folder: Path) -> Path:
    inner = _in_the_header(3, payload, folder).read_bytes()
    path = folder / "plain.pkl"
    inside = op.BINBYTES + struct.pack("<I", len(inner)) + inner
    path.write_bytes(PROTO + call("torch.storage", "_load_from_bytes", inside) + STOP)
    return path


def _in_a_package(payload: bytes, folder: Path) -> Path:
    path = folder / "package.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("p/.data/extern_modules", b"")
        archive.writestr("p/model/model.pkl", PROTO + op.EMPTY_DICT + STOP)
        archive.writestr("p/other/hidden.pkl", PROTO + payload + STOP)
    return path


def _in_a_shard(payload: bytes, folder: Path) -> Path:
    shard = hostile_zip(payload, folder).rename(folder / "pytorch_model-00001-of-00001.bin")
    raw = pickle_of(shard).replace(text("model") + op.EMPTY_DICT, b"").replace(op.SETITEM + text("run"), text("run"))
    rewritten(shard, folder / "made.bin", records={"data.pkl": raw}).rename(shard)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"w": shard.name}}))
    return index


def _two_pickles(payload: bytes, folder: Path) -> Path:
    """Two data.pkl: torch reads that in the folder of the first record."""
    path = folder / "two.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a_longer_folder/data.pkl", PROTO + payload + STOP)
        archive.writestr("a/data.pkl", PROTO + op.EMPTY_DICT + STOP)
    return path


HIDDEN: dict[str, Callable[[bytes, Path], Path]] = {
    **{f"legacy pickle {number_of}": partial(_in_the_header, number_of) for number_of in range(1, 5)},
    **{f"tar's {member}": partial(_in_a_tar, member) for member in ("storages", "tensors", "pickle")},
    "persistent id": _in_a_persistent_id,
    "pickled storage": _in_a_pickled_storage,
    "package": _in_a_package,
    "TorchScript": hostile_script,
    "shard": _in_a_shard,
    "the first of two pickles": _two_pickles,
}


@pytest.mark.parametrize("place", HIDDEN)
def test_scan_finds_it_in_every_place_that_torch_would_run(place: str, ckpt: Run, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path = HIDDEN[place](mkdir(str(marker)), tmp_path)
    ran = ckpt("scan", path)
    assert (ran.status, ran.err) == (1, "")
    assert "posix.mkdir" in ran.out
    ckpt("ls", path, "--all")
    assert not marker.exists()


def test_a_memo_entry_that_is_made_anew_within_a_tensor_counts(tmp_path: Path) -> None:
    """Torch's runs of opcodes are read in one step; an entry that is overwritten there must not be read as it was."""
    path = save_zip({"a": ramp(2), "b": ramp(3)}, tmp_path)
    raw = pickle_of(path)
    function = raw[raw.index(b"h", raw.index(text("b")) + 6) + 1]  # the entry that b's tensor is rebuilt with
    shape = raw.index(b"K\x02\x85q") + 4  # the number of the entry that a's shape becomes
    words = raw[:shape] + bytes((function,)) + raw[shape + 1 :]
    changed = rewritten(path, tmp_path / "changed.pth", records={"data.pkl": words})
    with pytest.raises(pickle.UnpicklingError):
        torch.load(changed)
    assert list(ckpt_surgeon.open(changed)) == ["a"]


def test_numbers_of_memo_entries_that_follow_a_tensor_are_right(tmp_path: Path) -> None:
    """MEMOIZE counts the entries, those inside a tensor's opcodes too."""
    path = save_zip({"a": ramp(2), "b": ramp(3)}, tmp_path)
    raw = pickle_of(path)
    entries = 1 + max(raw[at + 1] for at in range(raw.index(text("b"))) if raw[at : at + 1] == b"q")
    more = text("posix") + op.MEMOIZE + op.POP + op.BINGET + bytes((entries,)) + text("mkdir") + op.STACK_GLOBAL
    words = raw.replace(text("b"), text("x") + more + text("b"))
    changed = rewritten(path, tmp_path / "changed.pth", records={"data.pkl": words})
    assert "posix.mkdir" in ckpt_surgeon.scan(changed).suspects


# -- nothing is imported, run, spawned or written


AUDIT = """
import os, sys
sys.argv = ["ckpt"]
import ckpt_surgeon
from ckpt_surgeon import cli
from ckpt_surgeon.reading import scanning, tree
from ckpt_surgeon.report import listings
from pathlib import Path

def read(path):
    for use in (lambda: ckpt_surgeon.ls(path, all=True, check=True), lambda: ckpt_surgeon.open(path),
                lambda: scanning.scan(path), lambda: ckpt_surgeon.ls(path, all=True, salvage=True)):
        try:
            listings.listing_text(use()) if "ls" in use.__code__.co_names else use()
        except ckpt_surgeon.CheckpointError:
            pass

FORBIDDEN = ("import", "exec", "compile", "pickle", "marshal", "subprocess", "ctypes", "socket", "shutil", "os.system",
             "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.mkdir", "os.remove", "os.rename", "os.rmdir",
             "os.chmod", "os.link", "os.symlink", "os.truncate", "os.putenv", "tempfile", "signal", "code")
seen = []

def watch(event, args):
    if not armed:
        return
    writes = event == "open" and (set(str(args[1] or "")) & set("wax+") or args[2] & (os.O_WRONLY | os.O_RDWR))
    if writes or event.startswith(FORBIDDEN):
        seen.append((event, str(args)[:200]))

armed = False
sys.addaudithook(watch)
benign, *hostile = map(Path, sys.stdin.read().splitlines())
for path in sorted(benign.iterdir()):
    read(path)
armed = True
for path in hostile:
    read(path)
armed = False
print(len(hostile), seen)
"""


def test_an_audit_of_the_interpreter_sees_only_files_opened_for_reading(tmp_path: Path) -> None:
    benign, paths = tmp_path / "benign", []
    benign.mkdir()
    save_zip({"w": ramp(3).t()}, benign)
    save_legacy({"w": ramp(3)}, benign)
    for place, hide in HIDDEN.items():
        hide(op.NONE, (benign / place).parent)
        for index, (make, _) in enumerate(PAYLOADS.values()):
            folder = tmp_path / f"{place} {index}"
            folder.mkdir()
            paths.append(hide(make(str(folder / "ran")), folder))
    for container, save in CONTAINERS.items():
        save(op.NONE, benign)
        for index, (make, _) in enumerate(PAYLOADS.values()):
            folder = tmp_path / f"{container} {index}"
            folder.mkdir()
            paths.append(save(make(str(folder / "ran")), folder))
    done = subprocess.run(
        [sys.executable, "-c", AUDIT],
        input="\n".join(map(str, [benign, *paths])),
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{len(paths)} []\n"
    assert not list(tmp_path.rglob("ran"))


# -- bombs


MEMORY = 2 << 30
SECONDS = 60  # of processor time, far more than any takes


SERVER = """
import json, os, resource, signal, sys
from ckpt_surgeon import cli
from ckpt_surgeon.reading import listing, scanning
from ckpt_surgeon.report import listings
memory, seconds = map(int, sys.argv[1:])
for line in sys.stdin:
    words, out, err = json.loads(line)
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        signal.alarm(10 * seconds)  # waiting is no processor time
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.argv = ["ckpt", *words]
        cli.main()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Run a command in a process of its own, with little memory and little time."""
    out, err = (tmp_path_factory.mktemp("said") / name for name in ("out", "err"))
    command = [sys.executable, "-W", "error", "-c", SERVER, str(MEMORY), str(SECONDS)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        said, asked = server.stdout, server.stdin

        def run(*words: object) -> Ran:
            print(json.dumps([[*map(str, words)], str(out), str(err)]), file=asked, flush=True)
            return Ran(int(said.readline()), out.read_text(errors="replace"), err.read_text(errors="replace"))

        yield run
        asked.close()


Bomb = Callable[[Path], Path]
BOMBS: dict[str, tuple[Bomb, tuple[str, ...]]] = {}


def bomb(name: str, *words: str) -> Callable[[Bomb], Bomb]:
    """Register a file to make; ``words`` are the command (``ls --all``)."""

    def register(make: Bomb) -> Bomb:
        assert name not in BOMBS
        BOMBS[name] = (make, words or ("ls", "--all"))
        return make

    return register


def pickle_bomb(name: str, raw: bytes | Callable[[], bytes], *words: str, plain: bool = False) -> None:
    """A pickle that is the data.pkl of a zip or, ``plain``, the file itself."""

    def make(folder: Path) -> Path:
        content = raw if isinstance(raw, bytes) else raw()
        if plain:
            path = folder / "bomb.pkl"
            path.write_bytes(content)
            return path
        return zip_of(folder, content, {"0": bytes(48)})

    bomb(name, *words)(make)


TENSOR = pickled(Part())[2:-1]

for _name, _raw in {
    "a memo entry of the largest number": op.NONE + put(0xFFFFFFFF),
    "a memo entry of a larger number": op.NONE + op.PUT + b"9" * 4000 + b"\n",
    "a memo entry of a negative number": op.NONE + op.PUT + b"-1\n",
    "text of the largest length": op.BINUNICODE8 + b"\xff" * 8 + b"a",
    "text of half the memory": op.BINUNICODE + struct.pack("<I", 1 << 31) + b"a",
    "bytes of the largest length": op.BINBYTES8 + b"\xff" * 8,
    "bytes of length 2**63": op.BINBYTES8 + struct.pack("<Q", 1 << 63),
    "a bytearray of the largest length": op.BYTEARRAY8 + b"\xff" * 8,
    "a string of negative length": op.BINSTRING + struct.pack("<i", -5) + b"abc",
    "a number of negative length": op.LONG4 + struct.pack("<i", -5) + b"abc",
    "a number of the largest length": op.LONG4 + struct.pack("<i", 0x7FFFFFFF) + b"abc",
    "a frame of the largest length": op.FRAME + b"\xff" * 8 + op.NONE,
    "a text number of a million digits": op.INT + b"9" * 1_000_000 + b"\n",
    "a text long of a million digits": op.LONG + b"9" * 1_000_000 + b"L\n",
    "a text float of a million digits": op.FLOAT + b"9" * 1_000_000 + b"\n",
    "a text float of letters": op.FLOAT + b"x" * 1_000_000 + b"\n",
    "a number of four million bytes": number(1 << 32_000_000),
    "that number as a key": op.EMPTY_DICT + number(1 << 32_000_000) + TENSOR + op.SETITEM,
    "that number as a shape": call("torch", "Size", number(1 << 32_000_000) + op.TUPLE1),
    "a text of a million escapes": op.STRING + b"'" + rb"\x41\d\\" * 300_000 + b"'\n",
    "a text of a million backslashes": op.STRING + b"'" + b"\\" * 1_000_000 + b"'\n",
    "a name of a million letters": named("a" * 1_000_000, "b" * 1_000_000),
    "a hundred thousand names and more": b"".join(named("m", str(i)) + op.POP for i in range(100_100)) + op.NONE,
    "more marks than there are items": op.MARK * 300_000 + op.NONE,
}.items():
    pickle_bomb(_name, PROTO + _raw + STOP, plain=True)


# objects that name each other so often that walking them would never end


def doubled(empty: bytes, join: Callable[[bytes], bytes], levels: int = 60) -> bytes:
    """An object that holds the one before twice, sixty times over."""
    raw = empty + put(0) + op.POP
    for level in range(levels):
        raw += join(get(level)) + put(level + 1) + op.POP
    return raw + get(levels)


def _two(before: bytes) -> bytes:
    return before + before + op.TUPLE2


def _list(before: bytes) -> bytes:
    return op.EMPTY_LIST + op.MARK + before + before + op.APPENDS


def _dict(before: bytes) -> bytes:
    return op.EMPTY_DICT + op.MARK + text("a") + before + text("b") + before + op.SETITEMS


def _named_dict(name: str) -> Callable[[bytes], bytes]:
    return lambda before: op.EMPTY_DICT + op.MARK + text(name) + before + text(name + "_b") + before + op.SETITEMS


def _module(before: bytes) -> bytes:
    state = text("_parameters") + op.EMPTY_DICT + text("_modules") + _dict(before)
    return call("m", "Net") + op.EMPTY_DICT + op.MARK + state + op.SETITEMS + op.BUILD


def _script(before: bytes) -> bytes:
    return call("__torch__", "Net") + _dict(before) + op.BUILD


def _object(before: bytes) -> bytes:
    return call("m", "C", before, before)


def _weights() -> bytes:
    return op.EMPTY_DICT + text("w") + TENSOR + op.SETITEM


_LEAF = call("m", "Net") + op.EMPTY_DICT + op.MARK + (
    text("_parameters") + op.EMPTY_DICT + text("w") + TENSOR + op.SETITEM + text("_modules") + op.EMPTY_DICT
) + op.SETITEMS + op.BUILD  # fmt: skip
_TUPLES = doubled(op.EMPTY_TUPLE, _two)
_CLASS = named("torch", "FloatStorage")


def _saved(
    cls: bytes = _CLASS, key: bytes = text("0"), where: bytes = text("cpu"), size: bytes = op.BININT1 + b"\x0c"
) -> bytes:
    """A persistent id of a storage, of such parts."""
    return op.MARK + text("storage") + cls + key + where + size + op.TUPLE + op.BINPERSID


for _name, _raw in {
    "tuples": _TUPLES,
    "lists": doubled(op.EMPTY_LIST, _list),
    "dicts": doubled(op.EMPTY_DICT, _dict),
    "dicts with weights": doubled(_weights(), _dict),
    "dicts with weights, thirty deep": doubled(_weights(), _dict, 30),
    "models with weights": doubled(_weights(), _named_dict("model"), 30),
    "lists with weights": doubled(_weights(), _list, 30),
    "modules": doubled(_LEAF, _module, 35),
    "objects": doubled(TENSOR, _object),
    "tuples as a key": op.EMPTY_DICT + _TUPLES + TENSOR + op.SETITEM,
    "tuples in a set": op.EMPTY_SET + op.MARK + _TUPLES + op.ADDITEMS,
    "tuples as a persistent id": _TUPLES + op.BINPERSID,
    "tuples as a storage's class": _saved(cls=_TUPLES),
    "tuples as a storage's key": _saved(key=_TUPLES),
    "tuples as a storage's place": op.EMPTY_DICT + text("w") + TENSOR.replace(text("cpu"), _TUPLES) + op.SETITEM,
    "tuples as a storage's size": _saved(size=_TUPLES),
    "tuples as a shape": call("torch", "Size", _TUPLES),
    "tuples as a dtype": call("numpy", "dtype", _TUPLES),
    "tuples as an encoding": call("_codecs", "encode", text("a"), _TUPLES),
    "tuples as a subclass": call(
        "torch._utils", "_rebuild_wrapper_subclass", _TUPLES, named("torch", "float32"), op.EMPTY_TUPLE
    ),
    "tuples as a dtype of torch's": call(
        "torch._utils", "_rebuild_meta_tensor_no_storage", _TUPLES, op.EMPTY_TUPLE, op.NONE
    ),
    "tuples as a layout": call(
        "torch._utils", "_rebuild_sparse_tensor", _TUPLES, TENSOR * 2 + op.EMPTY_TUPLE + op.TUPLE3
    ),
    "tuples as a name": _TUPLES + text("name") + op.STACK_GLOBAL,
    "tuples as an attribute": call("m", "C") + op.EMPTY_DICT + _TUPLES + TENSOR + op.SETITEM + op.BUILD,
    "tuples as a version": call("collections", "OrderedDict") + text("w") + TENSOR + op.SETITEM + op.EMPTY_DICT
    + text("_metadata") + op.EMPTY_DICT + text("") + op.EMPTY_DICT + _TUPLES + op.NONE + op.SETITEM * 3 + op.BUILD,
}.items():  # fmt: skip
    pickle_bomb(f"doubled sixty times: {_name}", PROTO + _raw + STOP)


# -- loops


for _name, _raw in {
    "a list in itself": op.EMPTY_LIST + put(0) + get(0) + op.APPEND,
    "a dict in itself": op.EMPTY_DICT + put(0) + text("a") + get(0) + op.SETITEM + text("w") + TENSOR + op.SETITEM,
    "an object in itself": call("m", "C") + put(0) + op.EMPTY_DICT + text("a") + get(0) + op.SETITEM + op.BUILD,
    "an object that is its own state": call("m", "C") + put(0) + get(0) + op.BUILD,
    "a tuple in its list": op.EMPTY_LIST + put(0) + get(0) + op.TUPLE1 + op.APPEND,
    "a module in itself": _module(op.NONE) + put(0) + op.DUP + op.EMPTY_DICT + op.MARK + text("_parameters")
    + op.EMPTY_DICT + text("w") + TENSOR + op.SETITEM + text("_modules") + op.EMPTY_DICT + text("m") + get(0)
    + op.SETITEM + op.SETITEMS + op.BUILD,
}.items():  # fmt: skip
    pickle_bomb(_name, PROTO + _raw + STOP)


# -- depth


DEPTH = 200_000
LESS = 50_000


def deep(inner: bytes, around: bytes, levels: int = DEPTH) -> bytes:
    return inner + around * levels


def _dicts_around(levels: int) -> bytes:
    return (op.EMPTY_DICT + text("a")) * levels + _weights() + op.SETITEM * levels


_SUBCLASS = named("torch._tensor", "_rebuild_from_type_v2")
_TUPLE_DEEP = deep(op.EMPTY_TUPLE, op.TUPLE1)
for _name, _raw in {
    "tuples": _TUPLE_DEEP,
    "tuples as a key": op.EMPTY_DICT + _TUPLE_DEEP + TENSOR + op.SETITEM,
    "tuples in a set": op.EMPTY_SET + op.MARK + _TUPLE_DEEP + op.ADDITEMS,
    "tuples as a persistent id": _TUPLE_DEEP + op.BINPERSID,
    "tuples as a storage's class": _saved(cls=_TUPLE_DEEP),
    "tuples as a storage's key": _saved(key=_TUPLE_DEEP),
    "tuples as a storage's place": _saved(where=_TUPLE_DEEP),
    "tuples as a dtype": call("numpy", "dtype", _TUPLE_DEEP),
    "lists": op.EMPTY_LIST * LESS + TENSOR + op.APPEND * LESS,
    "lists with a number each": (op.EMPTY_LIST + op.BININT1 + b"\x01" + op.APPEND) * LESS + op.APPEND * (LESS - 1),
    "dicts": _dicts_around(LESS),
    "dicts, forty-one deep": _dicts_around(41),
    "objects": named("m", "C") * LESS + op.NONE + (op.TUPLE1 + op.REDUCE) * LESS,
    "objects that are states": call("m", "C") * LESS + op.BUILD * (LESS - 1),
    "subclasses of tensors": (_SUBCLASS + _SUBCLASS + op.NONE) * 5000 + op.EMPTY_TUPLE + op.TUPLE3 * 5000 + op.REDUCE,
    "ordered dicts": (named("collections", "OrderedDict") + op.EMPTY_TUPLE + op.REDUCE + text("a")) * LESS + TENSOR
    + op.SETITEM * LESS,
    "modules": op.NONE + b"".join(
        put(0) + op.POP + _module(get(0)) for _ in range(3000)
    ),
}.items():  # fmt: skip
    pickle_bomb(f"nested: {_name}", PROTO + _raw + STOP)


# -- values that collide, or are used again and again


PRIME = sys.hash_info.modulus
MANY = 10_000


def _colliding(what: Callable[[int], bytes]) -> bytes:
    return b"".join(what(i * PRIME) for i in range(1, 3 * MANY))


def _again(first: bytes, use: bytes, times: int = MANY) -> bytes:
    """A long value, kept, and used many times."""
    return first + put(0) + op.POP + op.MARK + use * times + op.LIST


_LONG = text("x" * 1_000_000)
_LONG_LIST = op.EMPTY_LIST + op.MARK + op.NONE * 500_000 + op.APPENDS
_PAIRS = op.EMPTY_LIST + op.MARK + (op.NONE + op.NONE + op.TUPLE2) * 20_000 + op.APPENDS
_BIG_DICT = op.EMPTY_DICT + op.MARK + b"".join(text(str(i)) + op.NONE for i in range(50_000)) + op.SETITEMS
_DTYPE = call("numpy", "dtype", text("f4"))
for _name, _raw in {
    "keys": op.EMPTY_DICT + op.MARK + _colliding(lambda key: number(key) + op.NONE) + op.SETITEMS,
    "members of a set": op.EMPTY_SET + op.MARK + _colliding(number) + op.ADDITEMS,
    "memo entries": op.NONE + _colliding(lambda key: op.PUT + str(key).encode() + b"\n"),
    "keys that are tuples": op.EMPTY_DICT + op.MARK + _colliding(lambda key: number(key) + op.TUPLE1 + op.NONE)
    + op.SETITEMS,
    "keys that are floats": op.EMPTY_DICT + op.MARK + b"".join(
        op.BINFLOAT + struct.pack(">d", 2.0 ** (61 * i - 1000)) + op.NONE for i in range(30)
    ) * 2000 + op.SETITEMS,
}.items():  # fmt: skip
    pickle_bomb(f"of one hash: {_name}", PROTO + _raw + STOP)
pickle_bomb(
    "of one hash: storages, salvaged",
    lambda: PROTO + op.EMPTY_LIST + op.MARK + _colliding(lambda key: _saved(key=number(key))) + op.APPENDS + STOP,
    "ls", "--all", "--salvage",
)  # fmt: skip

for _name, _raw in {
    "text encoded": _again(_LONG, named("_codecs", "encode") + get(0) + op.TUPLE1 + op.REDUCE),
    "a list copied": _again(_LONG_LIST, named("builtins", "list") + get(0) + op.TUPLE1 + op.REDUCE),
    "a set of a list": _again(_LONG_LIST, named("builtins", "set") + get(0) + op.TUPLE1 + op.REDUCE),
    "a dict copied": _again(_BIG_DICT, named("collections", "OrderedDict") + get(0) + op.TUPLE1 + op.REDUCE),
    "a dict of pairs": _again(_PAIRS, named("collections", "OrderedDict") + get(0) + op.TUPLE1 + op.REDUCE),
    "a size": _again(_LONG_LIST, named("torch", "Size") + get(0) + op.TUPLE1 + op.REDUCE),
    "a long tuple of arguments": _again(op.MARK + op.NONE * 500_000 + op.TUPLE,
                                        named("collections", "defaultdict") + get(0) + op.REDUCE),
    "a scalar's bytes": _again(
        _LONG, named("numpy._core.multiarray", "scalar") + _DTYPE + get(0) + op.TUPLE2 + op.REDUCE
    ),
    "an array's bytes": _again(
        _LONG,
        call("numpy._core.multiarray", "_reconstruct") + op.MARK + op.BININT1 + b"\1" + op.BININT1 + b"\0" + op.TUPLE1
        + _DTYPE + op.NEWFALSE + get(0) + op.TUPLE + op.BUILD,
    ),
    "an array's long shape": _again(
        op.MARK + (op.BININT1 + b"\1") * 500_000 + op.TUPLE,
        call("numpy._core.multiarray", "_reconstruct") + op.MARK + op.BININT1 + b"\1" + get(0) + _DTYPE + op.NEWFALSE
        + op.SHORT_BINBYTES + b"\x04abcd" + op.TUPLE + op.BUILD, 2000,
    ),
    "a state that objects share": _again(_BIG_DICT, named("m", "C") + op.EMPTY_TUPLE + op.REDUCE + get(0) + op.BUILD),
    "a dict in many dicts": _again(_BIG_DICT, op.EMPTY_DICT + text("a") + get(0) + op.SETITEM),
    "a dict with weights in many dicts": _again(
        op.EMPTY_DICT + op.MARK + (text("w") + TENSOR) + b"".join(text(str(i)) + op.NONE for i in range(100_000))
        + op.SETITEMS,
        op.EMPTY_DICT + text("a") + get(0) + op.SETITEM,
    ),
    "a module state that modules share": _again(
        op.EMPTY_DICT + op.MARK + text("_parameters") + op.EMPTY_DICT + text("w") + TENSOR + op.SETITEM
        + text("_modules") + op.EMPTY_DICT + b"".join(text(str(i)) + op.NONE for i in range(100_000)) + op.SETITEMS,
        named("m", "C") + op.EMPTY_TUPLE + op.REDUCE + get(0) + op.BUILD,
    ),
    "a long setting that modules share": _again(
        _LONG,
        call("m", "C") + op.EMPTY_DICT + op.MARK + text("_parameters") + op.EMPTY_DICT + text("_modules")
        + op.EMPTY_DICT + text("name") + get(0) + op.SETITEMS + op.BUILD, 3000,
    ),
    "a long key": _LONG + put(0) + op.POP + op.EMPTY_DICT + get(0) + op.EMPTY_DICT + op.MARK
    + b"".join(text(str(i)) + TENSOR for i in range(2000)) + op.SETITEMS + op.SETITEM,
}.items():  # fmt: skip
    pickle_bomb(f"again and again: {_name}", PROTO + _raw + STOP)


def _storage_again() -> bytes:
    inner = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
    inner += b"\x80\x02(" + op.NONE * 1_000_000 + b"t." + pickle.dumps([], 2)
    inside = op.BINBYTES + struct.pack("<I", len(inner)) + inner
    use = named("torch.storage", "_load_from_bytes") + get(0) + op.TUPLE1 + op.REDUCE
    return PROTO + _again(inside, use, 2000) + STOP


pickle_bomb("again and again: a pickled storage", _storage_again, plain=True)


# -- tensors


def _tensor(size: bytes, stride: bytes) -> bytes:
    return call("torch._utils", "_rebuild_tensor_v2", _saved(), op.BININT1 + b"\0", size, stride, op.NEWFALSE, op.NONE)


def _held(tensor: bytes) -> bytes:
    return op.EMPTY_DICT + text("w") + tensor + op.SETITEM


_ZERO = op.BININT1 + b"\0"
_HUGE = op.BININT + struct.pack("<i", 0x7FFFFFFF)
for _name, _raw in {
    "expanded beyond counting": _held(_tensor(_HUGE * 3 + op.TUPLE3, (op.BININT1 + b"\0") * 3 + op.TUPLE3)),
    "expanded to a terabyte": _held(_tensor(_HUGE + op.BININT1 + b"\x80" + op.TUPLE2, _ZERO * 2 + op.TUPLE2)),
    "of a million dimensions": _held(_tensor(op.MARK + _HUGE * 1_000_000 + op.TUPLE,
                                             op.MARK + (op.BININT1 + b"\0") * 1_000_000 + op.TUPLE)),
    "of one size, many times": _again(op.MARK + _HUGE * 64 + op.TUPLE, _tensor(get(0), get(0)), 3),
    "meta, beyond counting": _held(call("torch._utils", "_rebuild_meta_tensor_no_storage", named("torch", "float32"),
                                        op.MARK + _HUGE * 60 + op.TUPLE, op.NONE)),
    "in a hundred thousand lists": op.EMPTY_LIST + op.MARK + (op.EMPTY_DICT + text("w") + TENSOR + op.SETITEM) * 3000
    + op.APPENDS,
}.items():  # fmt: skip
    pickle_bomb(f"a tensor: {_name}", PROTO + _raw + STOP)


# -- names


for _name, _key in {
    "digits": "model" + "1" * 5000 + "!",
    "letters": "model" + "ema" * 2000 + "!",
    "words": "model_" * 20_000 + "!",
    "separators": "_" * 100_000 + "model!",
    "dots": "a." * 200_000,
    "lines": "\n" * 100_000,
    "escapes": "\x1b[31m" * 50_000,
}.items():
    pickle_bomb(
        f"a name of many {_name}",
        PROTO + op.EMPTY_DICT + op.MARK + text(_key) + _weights() + text("b") + op.NONE + op.SETITEMS + STOP,
    )


# -- much of everything


pickle_bomb("many numbers", lambda: PROTO + op.MARK + (op.BININT1 + b"\x01") * 200_000 + op.LIST + STOP)
pickle_bomb(
    "many objects",
    lambda: PROTO + op.MARK + call("m", "C") * 101_000 + op.LIST + STOP,
    "ls",
    "--all",
)
pickle_bomb("five million lists", lambda: PROTO + op.EMPTY_LIST * 5_000_000 + STOP)


# -- zips


def _stored_zip(records: dict[str, bytes], folder: Path, method: int = zipfile.ZIP_DEFLATED) -> Path:
    path = folder / "bomb.pth"
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, raw in records.items():
            archive.writestr(name, raw)
    return path


@cache
def _packed_zeros(nbytes: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    block = bytes(1 << 20)
    return b"".join(packer.compress(block) for _ in range(nbytes >> 20)) + packer.flush()


def _claiming(folder: Path, *, packed: bytes, size: int, name: str = "archive/data.pkl") -> Path:
    """A zip of one packed record that claims to unpack to ``size`` bytes."""
    encoded = name.encode()
    fixed = (20, 0, 8, 0, 33, 0, len(packed), size)
    local = struct.pack("<4s5H3I2H", b"PK\x03\x04", *fixed, len(encoded), 0) + encoded + packed
    central = struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 20, *fixed, len(encoded), *[0] * 6) + encoded
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, len(central), len(local), 0)
    path = folder / "bomb.pth"
    path.write_bytes(local + central + end)
    return path


EIGHTH = 1 << 27


@bomb("packed: an eighth of a gigabyte of zeros")
def _zeros(folder: Path) -> Path:
    return _claiming(folder, packed=_packed_zeros(EIGHTH), size=EIGHTH)


@bomb("packed: claims little, unpacks to an eighth of a gigabyte")
def _lying(folder: Path) -> Path:
    return _claiming(folder, packed=_packed_zeros(EIGHTH), size=1000)


@bomb("stored: a gigabyte and a half of holes")
def _holes(folder: Path) -> Path:
    path = _claiming(folder, packed=b"", size=0)
    raw, size = path.read_bytes(), 3 << 29
    start = raw.index(b"PK\x01\x02")
    central = bytearray(raw[start : raw.index(b"PK\x05\x06")])
    struct.pack_into("<H", central, 10, 0)
    struct.pack_into("<2I", central, 20, size, size)
    with open(path, "wb") as file:
        file.write(raw[:start])
        file.seek(size, 1)
        file.write(central + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, len(central), start + size, 0))
    return path


@bomb("packed: claims four gigabytes, has nothing")
def _boasting(folder: Path) -> Path:
    return _claiming(folder, packed=b"\x03\x00", size=0xFFFFFFF0)


@bomb("packed: many pieces of code, each a gigabyte")
def _code(folder: Path) -> Path:
    packed = _packed_zeros(1 << 26)
    path = folder / "bomb.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", PROTO + call("__torch__", "Net") + _weights() + op.BUILD + STOP)
        archive.writestr("a/constants.pkl", PROTO + op.NONE + STOP)
        archive.writestr("a/data/0", bytes(48))
        archive.writestr("a/code/__torch__.py", packed)
    raw = path.read_bytes()
    at = raw.rindex(b"PK\x01\x02")
    fixed = struct.pack("<H", 8)
    entry = (
        raw[at : at + 10]
        + fixed
        + raw[at + 12 : at + 24]
        + struct.pack("<I", 1 << 26)
        + raw[at + 28 : raw.rindex(b"PK\x05\x06")]
    )
    many = b"".join(entry.replace(b"__torch__.py", f"{i:08}.py  ".encode()[:9] + b".py") for i in range(2000))
    start = raw.index(b"PK\x01\x02")
    directory = raw[start:at] + many
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 2003, 2003, len(directory), start, 0)
    path.write_bytes(raw[:start] + directory + end)
    return path


@bomb("zip: claims four billion records")
def _entries(folder: Path) -> Path:
    end64 = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 1 << 63, 1 << 63, 0, 4)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, 4, 1)
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path = folder / "bomb.pth"
    path.write_bytes(b"PK\x03\x04" + end64 + locator + end)
    return path


@bomb("zip: a directory that is the whole file")
def _whole_directory(folder: Path) -> Path:
    path = folder / "bomb.pth"
    body = b"PK\x03\x04" + bytes(30_000_000)
    path.write_bytes(body + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 60_000, 60_000, len(body) - 4, 4, 0))
    return path


@bomb("zip: cut off, and full of signs of a record's end", "ls", "--salvage")
def _signs(folder: Path) -> Path:
    path = save_zip({"w": ramp(3)}, folder)
    raw = path.read_bytes()
    path.write_bytes(raw[: raw.index(b"PK\x01\x02")] + raw[:30].replace(b"\x00\x00\x08\x08", b"\x00\x00\x08\x08")
                     + b"archive/data/9" + bytes(62) + b"PK\x07\x08" * 300_000)  # fmt: skip
    return path


@bomb("zip: a comment full of signs of the end")
def _ends(folder: Path) -> Path:
    path = save_zip({"w": ramp(3)}, folder)
    path.write_bytes(path.read_bytes() + b"PK\x05\x06" * 16_000)
    return path


@bomb("TorchScript: source that no expression ends on")
def _source(folder: Path) -> Path:
    lines = (
        "class Net(Module):\n" + "  __parameters__ = [\n" * 200_000 + '  __parameters__ = ["w' + ", " * 200_000 + "\n"
    )
    return _stored_zip(
        {
            "a/data.pkl": PROTO + call("__torch__", "Net") + _weights() + op.BUILD + STOP,
            "a/constants.pkl": PROTO + op.NONE + STOP,
            "a/data/0": bytes(48),
            "a/code/__torch__.py": lines.encode(),
        },
        folder,
        zipfile.ZIP_STORED,
    )


@bomb("TorchScript: doubled thirty times")
def _script_doubled(folder: Path) -> Path:
    raw = PROTO + doubled(call("__torch__", "Net") + _weights() + op.BUILD, _script, 40) + STOP
    return _stored_zip({"a/data.pkl": raw, "a/constants.pkl": PROTO + op.NONE + STOP, "a/data/0": bytes(48),
                        "a/code/__torch__.py": b'class Net(Module):\n  __parameters__ = ["w", ]\n'},
                       folder, zipfile.ZIP_STORED)  # fmt: skip


# -- JSON


def _header(raw: bytes, folder: Path) -> Path:
    path = folder / "bomb.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    return path


@bomb("safetensors: brackets")
def _brackets(folder: Path) -> Path:
    return _header(b'{"a":' + b"[" * 5_000_000, folder)


@bomb("safetensors: a shape of a million large numbers")
def _large_shape(folder: Path) -> Path:
    sizes = b",".join([b"9" * 4000] * 2000)
    return _header(b'{"a":{"dtype":"U8","shape":[' + sizes + b'],"data_offsets":[0,0]}}', folder)


@bomb("safetensors: a shape of a million ones")
def _ones(folder: Path) -> Path:
    sizes = b",".join([b"1"] * 1_000_000)
    return _header(b'{"a":{"dtype":"U8","shape":[' + sizes + b'],"data_offsets":[0,1]}}', folder)


@bomb("safetensors: twenty thousand empty tensors")
def _many_tensors(folder: Path) -> Path:
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    return _header(json.dumps({f"t{i}": entry for i in range(20_000)}).encode(), folder)


@bomb("index: one shard under a hundred thousand names")
def _aliases(folder: Path) -> Path:
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    _header(json.dumps({f"t{i}": entry for i in range(20_000)}).encode(), folder)
    path = folder / "model.safetensors.index.json"
    names = {f"t{i}": "./" * i + "bomb.safetensors" for i in range(1500)}
    path.write_text(json.dumps({"weight_map": names}))
    return path


@bomb("index: many missing shards")
def _missing(folder: Path) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {f"t{i}": f"s{i}" for i in range(20_000)}}))
    return path


@bomb("index: indexes that name each other")
def _circle(folder: Path) -> Path:
    for one, other in (("a", "b"), ("b", "a")):
        (folder / f"{one}.index.json").write_text(json.dumps({"weight_map": {"w": f"{other}.index.json"}}))
    return folder / "a.index.json"


# -- legacy and tar


@bomb("legacy: one key a hundred thousand times")
def _keys(folder: Path) -> Path:
    path = folder / "bomb.pth"
    path.write_bytes(legacy_of({"w": Part(numel=0, size=(0,), stride=(1,))}, {}, keys=["0"] * 100_000))
    return path


@bomb("legacy: one key a hundred thousand times, salvaged", "ls", "--salvage")
def _keys_salvaged(folder: Path) -> Path:
    path = folder / "bomb.pth"
    path.write_bytes(legacy_of({"w": Part(numel=1 << 62)}, {}, keys=["0"] * 100_000))
    return path


@bomb("tar: claims 2**62 storages")
def _counts(folder: Path) -> Path:
    empty = pickle.dumps({}, 2)
    return tar_of(
        {"storages": pickle.dumps(1 << 62, 2), "tensors": pickle.dumps(1 << 62, 2), "pickle": empty}, "bomb.pth", folder
    )


@bomb("tar: a storage of 2**62 elements")
def _storage(folder: Path) -> Path:
    triple = pickle.dumps((1, "cpu", torch.FloatStorage), 2)
    raw = pickle.dumps(1, 2) + triple + struct.pack("<q", 1 << 62)
    return tar_of({"storages": raw, "tensors": pickle.dumps(0, 2), "pickle": pickle.dumps({}, 2)}, "bomb.pth", folder)


@bomb("tar: a view of a view a million times")
def _views(folder: Path) -> Path:
    triple = pickle.dumps((1, "cpu", torch.FloatStorage), 2)
    views = pickle.dumps([(i + 1, i, 1 << 70, 1) for i in range(1, 100_000)], 2)
    raw = pickle.dumps(1, 2) + triple + struct.pack("<q", 0) + views
    return tar_of({"storages": raw, "tensors": pickle.dumps(0, 2), "pickle": pickle.dumps({}, 2)}, "bomb.pth", folder)


@bomb("tar: an extended header of its own size")
def _extended(folder: Path) -> Path:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 40
    path = folder / "bomb.pth"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"9" * 5_000_000)
    return path


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_takes_little_time_and_memory(name: str, limited: Run, tmp_path: Path) -> None:
    make, words = BOMBS[name]
    path = make(tmp_path)
    ran = limited(words[0], path, *words[1:])
    assert "Traceback" not in ran.err
    assert ran.status in (0, 2)
    assert (ran.err.count("\n"), ran.err.startswith("ckpt: ")) == ((1, True) if ran.status else (0, False))
    assert len(ran.err) < 10_000 or "name" in name


def test_a_pickle_of_too_many_opcodes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pkl"
    path.write_bytes(PROTO + op.NONE + (op.NONE + op.POP) * (1 << 24) + STOP)
    with pytest.raises(ckpt_surgeon.BrokenFile, match="more than 33,554,432 opcodes"):
        ckpt_surgeon.open(path)


def test_the_same_weights_come_out_of_a_hostile_file_and_a_clean_one(tmp_path: Path) -> None:
    path = hostile_zip(mkdir(str(tmp_path / "ran")), tmp_path)
    assert_same(ckpt_surgeon.load(path), {"w": ramp(3, 4)})
