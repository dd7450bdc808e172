"""What Python 2 wrote; its opcodes are put together by hand."""

from __future__ import annotations

import pickle
import struct
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tables import ramp

from unusual_files.registry import UnusualFile, unusual


def python2_array(data: bytes, shape: tuple[int, ...], code: str, protocol: int) -> bytes:
    """numpy.ndarray as Python 2 pickled it: the elements are a str."""
    word = _python2_word_0 if protocol == 0 else _python2_word
    head = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\nt" + word(b"b") + b"tR"
    dtype = b"cnumpy\ndtype\n(" + word(code.encode()) + b"I0\nI1\ntR(I3\n" + word(b"<") + b"NNNI-1\nI-1\nI0\ntb"
    sizes = b"".join(f"I{size}\n".encode() for size in shape)
    return head + b"(I1\n(" + sizes + b"t" + dtype + b"I00\n" + word(data) + b"tb"


def _python2_word(raw: bytes) -> bytes:
    return (b"U" + bytes((len(raw),)) if len(raw) < 256 else b"T" + struct.pack("<i", len(raw))) + raw


def _python2_word_0(raw: bytes) -> bytes:
    return b"S" + repr(raw)[1:].encode() + b"\n"


def _python2(folder: Path, *, protocol: int) -> UnusualFile:
    arrays = {
        b"conv1_w": np.arange(6, dtype="f4").reshape(2, 3),
        b"ascii": np.frombuffer(b"ABCDEFGH", dtype="f4"),
        b"large": np.arange(2000, dtype="f8"),
        "größe".encode(): np.arange(2, dtype="i8"),
    }
    word = _python2_word_0 if protocol == 0 else _python2_word
    raw = (b"\x80\x02" if protocol == 2 else b"") + b"(dp0\n" + word(b"epoch") + b"I3\ns"
    for name, array in arrays.items():
        raw += word(name) + python2_array(array.tobytes(), array.shape, array.dtype.str[1:], protocol) + b"s"
    path = folder / "python2.pkl"
    path.write_bytes(raw + b".")
    oracle = pickle.loads(path.read_bytes(), encoding="latin1")
    del oracle["epoch"]
    state = {key.encode("latin1").decode(): torch.from_numpy(np.array(array)) for key, array in oracle.items()}
    return UnusualFile(path, state, {"epoch": "int 3"})


for _protocol in (0, 1, 2):
    unusual("Python 2", f"arrays, protocol {_protocol}")(partial(_python2, protocol=_protocol))


@unusual("Python 2", "old-style class")
def _old_style(folder: Path) -> UnusualFile:
    array = python2_array(np.ones(2, "f4").tobytes(), (2,), "f4", 0)
    path = folder / "instance.pkl"
    path.write_bytes(b"(iold.models\nNet\n(dS'rate'\nF0.5\nsS'w'\n(dS'fc'\n" + array + b"ssb.")
    return UnusualFile(path, {"fc": torch.ones(2)}, {".": "old.models.Net", "rate": "float 0.5"}, suspect=True)


@unusual("Python 2", "legacy torch file")
def _python2_torch(folder: Path) -> UnusualFile:
    """torch 0.4 under Python 2: words are byte strings."""
    word = _python2_word
    raw = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    raw += b"\x80\x02}(" + word(b"little_endian") + b"\x88" + word(b"protocol_version") + b"M\xe9\x03u."
    saved = b"(" + word(b"storage") + b"ctorch\nFloatStorage\n" + word(b"94") + word(b"cpu") + b"K\x06NtQ"
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + saved
        + b"K\x00K\x02K\x03\x86K\x03K\x01\x86\x89ccollections\nOrderedDict\n]\x85RtR"
    )
    raw += b"\x80\x02ccollections\nOrderedDict\n](](" + word(b"fc.weight") + tensor + b"ee\x85R."
    raw += b"\x80\x02](" + word(b"94") + b"e." + struct.pack("<q", 6) + ramp(6).numpy().tobytes()
    path = folder / "python2.pth"
    path.write_bytes(raw)
    state = torch.load(path, weights_only=False, encoding="latin1")
    return UnusualFile(path, state)
