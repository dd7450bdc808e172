"""Random files made by structure, and what torch and safetensors make of them: the oracle of the differential test."""

from __future__ import annotations

import json
import pickle as op
import random
import struct
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from broken_files.by_hand import counted
from payloads import call, named, text
from structures import HOOKS, Record, dict_of, integer, program, sizes, zip_bytes_of

import ckpt_surgeon
from ckpt_surgeon.tensors.records import OpaqueTensor

CLASSES = {"FloatStorage": 4, "HalfStorage": 2, "LongStorage": 8, "ByteStorage": 1, "BoolStorage": 1, "ShortStorage": 2,
           "ComplexFloatStorage": 8, "DoubleStorage": 8, "BFloat16Storage": 2, "UntypedStorage": 1}  # fmt: skip
DTYPES = ["float32", "uint16", "uint32", "float8_e4m3fn", "int16", "complex64", "bfloat16", "bool", "uint64"]
NBYTES = {"0": 48, "1": 24, "2": 0, "3": 64}

EXTRA_RECORDS = [
    ".format_version", ".storage_alignment", ".data/version", "constants.pkl", "archive_format", "BYTEORDER",
    ".data/extern_modules", "DATA/0", "Data.pkl", "data/9", "data/weights/x_weights_config.json", "é",
]  # fmt: skip

# Why torch may refuse what this reader reads: for safety, or because of what says nothing of values.
ALLOWED = (
    "Unsupported operand", "Unsupported global", "GLOBAL", "Can only", "Only persistent_load",
    "reduce for unrecognized",
    "floating point and complex dtype can require gradients", "TorchScript", "not in a subdirectory", "file not found",
    "backward_hooks", "must be imported",
    "leaf Variable that requires grad", "requires_grad must be", "restore data location", "source code",
    'hasRecord("version")', "'meta' device", "has no attribute 'dtype'", "attribute 'dtype'",
    "Cannot use ``weights_only=True``",
)  # fmt: skip


class Maker:
    """Makes one file of each seed: sound for the most part, with a few things done to its structure."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.odds = self.random.choice([0.0, 0.02, 0.1, 0.3])

    def odd(self) -> bool:
        """Whether something unusual is done here."""
        return self.random.random() < self.odds

    # -- pickles

    def storage(self, *, view: bool = False) -> tuple[bytes, int, int]:
        """A persistent id, and about how many elements of how many bytes it has."""
        pick = self.random.choice
        key = pick(list(NBYTES))
        name = pick(list(CLASSES)) if self.random.random() < 0.5 else "FloatStorage"
        numel = NBYTES[key] // CLASSES[name] + (pick([-1, 1, 5]) if self.odd() else 0)
        module = (
            "torch.storage"
            if name == "UntypedStorage"
            else pick(["torch", "torch", "torch.cuda"] if self.odd() else ["torch"])
        )
        saved_key = pick([integer(0), b"U\x010", text(key + "\0"), op.NONE, text("9")]) if self.odd() else text(key)
        device = pick(["cpu", "meta"]) if self.odd() and not view else "cpu"
        tag = pick([text("module"), text("Storage"), b"U\x07storage"]) if self.odd() else text("storage")
        parts = tag + named(module, name) + saved_key + text(device) + integer(numel)
        if view:
            offset, size = self.random.randint(0, 3), self.random.randint(0, 6)
            parts += (
                (op.MARK + text(pick(["v", "w"])) + integer(offset) + integer(size) + op.TUPLE)
                if self.odd()
                else op.NONE
            )
        elif self.odd():
            parts += op.NONE
        return op.MARK + parts + op.TUPLE + op.BINPERSID, max(numel, 0), CLASSES[name]

    def metadata(self) -> bytes:
        pick = self.random.choice
        flags = {
            name: pick([op.NEWTRUE, op.NEWFALSE, integer(1), op.NONE])
            for name in ("conj", "neg", "other")
            if self.odd()
        }
        return pick([op.NONE, integer(0), op.EMPTY_TUPLE]) if self.odd() else dict_of(flags) if flags else op.EMPTY_DICT

    def tensor(self, *, view: bool = False, depth: int = 0) -> bytes:
        pick = self.random.choice
        saved, numel, width = self.storage(view=view)
        version = pick(["_rebuild_tensor_v2"] * 4 + ["_rebuild_tensor_v3", "_rebuild_tensor"])
        dtype = pick(DTYPES)
        if version.endswith("v3"):
            numel = numel * width // torch.empty(0, dtype=getattr(torch, dtype)).element_size()
        shape = pick([[numel], [max(numel // 2, 0)], [numel // 2, 2], [], [0], [1, 2], [2, 0, 3]])
        stride = (
            list(torch.empty(shape, device="meta").stride())
            if not self.odd()
            else [self.random.randint(-1, 3) for _ in shape]
        )
        offset = self.random.randint(-1, 3) if self.odd() else 0
        args = [saved, integer(offset), sizes(shape), sizes(stride)]
        if version != "_rebuild_tensor":
            args += [pick([op.NEWTRUE, op.NEWFALSE] if self.odd() else [op.NEWFALSE]), pick([op.NONE, HOOKS])]
        args += [named("torch", dtype)] if version.endswith("v3") else []
        args += [self.metadata()] if version != "_rebuild_tensor" and self.odd() else []
        made = call("torch._utils", version, *args)
        if self.odd():
            made = (
                named("torch._utils", version)
                + op.MARK
                + b"".join(args)
                + op.TUPLE
                + pick([op.NEWOBJ, op.REDUCE, op.OBJ])
            )
        state = (
            dict_of(
                {pick(["data", "real", "imag", "group", "__class__", "requires_grad"]): self.tensor(depth=depth + 1)}
            )
            if depth < 2 and self.odd()
            else op.EMPTY_DICT
        )
        if self.odd():
            made = call("torch._utils", "_rebuild_parameter", made, op.NEWFALSE, HOOKS)
        elif self.odd():
            made = call("torch._utils", "_rebuild_parameter_with_state", made, op.NEWFALSE, HOOKS, state)
        elif self.odd():
            made = call("torch.nn.parameter", "Parameter", made, op.NEWFALSE)
        elif self.odd():
            inner = op.MARK + b"".join(args) + op.TUPLE
            made = call(
                "torch._tensor",
                "_rebuild_from_type_v2",
                named("torch._utils", version),
                named("torch", "Tensor"),
                inner,
                state,
            )
        if depth < 2 and self.odd():
            made += self.after(depth)
        return made

    def after(self, depth: int) -> bytes:
        """Something done to what is on top."""
        saved, numel, _ = self.storage()
        return self.random.choice([
            op.MARK + saved + integer(0) + sizes([numel]) + sizes([1]) + op.TUPLE + op.BUILD,
            dict_of({"data": self.tensor(depth=depth + 1)}) + op.BUILD, op.EMPTY_DICT + op.BUILD, op.NONE + op.BUILD,
            integer(0) + self.tensor(depth=depth + 1) + op.SETITEM, integer(0) + op.APPEND, op.MARK + op.APPENDS,
            op.MARK + op.NEWFALSE + op.NONE + HOOKS + op.TUPLE + op.BUILD, b"2" + op.POP,
        ])  # fmt: skip

    def key(self, index: int) -> bytes:
        pick = self.random.choice
        return (
            pick([integer(index), text("k0"), op.NONE, op.NEWTRUE, b"U\x02k1", op.EMPTY_TUPLE, op.EMPTY_LIST])
            if self.odd()
            else text(f"k{index}")
        )

    def value(self, *, view: bool) -> bytes:
        if self.odd():
            return self.random.choice(
                [integer(3), text("x"), op.NONE, op.EMPTY_LIST, op.EMPTY_DICT, call("torch", "Size", sizes([2]))]
            )
        return self.tensor(view=view)

    def state(self, *, view: bool = False) -> bytes:
        pick = self.random.choice
        count = self.random.randint(1, 4)
        items = b"".join(self.key(index) + self.value(view=view) for index in range(count))
        if self.odd():
            pairs = dict_of({"first": self.tensor(view=view)})
            start = pick(
                [named("collections", "OrderedDict"), named("collections", "Counter"), named("UserDict", "OrderedDict")]
            )
            start += op.MARK + pairs + op.TUPLE + pick([op.NEWOBJ, op.REDUCE])
        else:
            start = pick([op.EMPTY_DICT, HOOKS])
        body = start + op.MARK + items + op.SETITEMS
        if self.odd():
            body += pick([op.EMPTY_DICT, dict_of({"_metadata": HOOKS}), op.NONE, op.EMPTY_TUPLE]) + op.BUILD
        return program(body, pick([0, 2, 3, 4]) if self.odd() else 2)

    # -- containers

    def zip(self) -> bytes:
        pick = self.random.choice
        root = pick(["{}", "best-{epoch:02d}", "a b", "größe"]) if self.odd() else "archive"
        storages = {key: self.random.randbytes(nbytes) for key, nbytes in NBYTES.items()}
        records = [
            Record(f"{root}/data.pkl", self.state()),
            Record(f"{root}/byteorder", pick([b"big", b"Little", b""]) if self.odd() else b"little"),
        ]
        records += [Record(f"{root}/data/{key}", raw) for key, raw in storages.items()]
        records += [
            Record(f"{root}/version", pick([b"0", b"99", b"10\n", b" 3", b"3x", b"x"]) if self.odd() else b"3\n")
        ]
        while self.odd():
            name = pick(EXTRA_RECORDS)
            records.insert(
                self.random.randint(0, len(records)),
                Record(f"{root}/{name}", pick([b"1", b"64", b"big", b"x", storages["0"]])),
            )
        changed = []
        for record in records:
            if self.random.random() < 0.05 or self.odd():
                record = replace(record, deflated=True)
            if self.odd():
                record = replace(record, **pick([  # type: ignore[arg-type]
                    {"flags": 1 << self.random.randint(0, 15)}, {"disk": pick([0, 1, 2, 0xFFFF])}, {"attributes": 0x10},
                    {"crc32": 5}, {"local_name": "x"}, {"size": 0xFFFFFFFF}, {"size": len(record.raw) + 1},
                    {"in_directory": False}, {"name": record.name.upper()}, {"name": record.name.partition("/")[2]},
                    {"name": f"other/{record.name}"},
                    {"size": 0xFFFFFFFF, "packed": 0xFFFFFFFF, "extra": self.extra(len(record.raw))},
                ]))  # fmt: skip
            if not self.odd() or self.random.random() < 0.7:
                changed.append(record)
        listed = [index for index, record in enumerate(r for r in changed if r.in_directory)]
        if self.odd():
            self.random.shuffle(listed)
        return zip_bytes_of(changed, order=listed or None, wide=pick([True, False]))

    def extra(self, nbytes: int) -> bytes:
        fields = [
            struct.pack("<2H2Q", 1, 16, nbytes, nbytes),
            struct.pack("<2H2Q", 1, 16, 8, 8),
            struct.pack("<2HQ", 1, 8, nbytes),
            b"FB\0\0",
        ]
        return b"".join(self.random.sample(fields, self.random.randint(1, 3)))

    def legacy(self) -> bytes:
        pick = self.random.choice
        raw = op.dumps(0x1950A86A20F9469CFC6C, 2) + op.dumps(pick([1001, 1002]) if self.odd() else 1001, 2)
        body = self.state(view=True)
        used = [key for key in NBYTES if text(key) in body]
        keys = self.random.sample(list(NBYTES), 2) if self.odd() else used
        raw += op.dumps({"little_endian": True}, 2) + body + op.dumps(keys, 2)
        for key in keys:
            count, nbytes = self.first_size(body, key)
            raw += counted(count, 0) + self.random.randbytes(nbytes)
        return raw

    def first_size(self, body: bytes, key: str) -> tuple[int, int]:
        """Elements and bytes of a storage, in the class that names it first."""
        named_by = {name: body.find(named("torch", name) + text(key)) for name in CLASSES}
        found = {name: at for name, at in named_by.items() if at >= 0}
        width = CLASSES[min(found, key=lambda name: found[name]) if found else "FloatStorage"]
        return NBYTES[key] // width, NBYTES[key] // width * width

    def safetensors(self) -> bytes:
        pick = self.random.choice
        widths = {"F32": 4, "F16": 2, "I64": 8, "BOOL": 1, "U8": 1, "BF16": 2, "F8_E4M3": 1, "C64": 8, "U16": 2}
        header: dict[str, object] = {}
        at = 0
        for index in range(self.random.randint(0, 4)):
            code = pick(list(widths))
            shape = pick([[2], [0], [], [2, 3], [1, 0]])
            count = 1
            for size in shape:
                count *= size
            start, stop = at, at + count * widths[code]
            if self.odd():
                start, stop = start + pick([-1, 1, 0]), stop + pick([-1, 1, 8])
            entry: dict[str, object] = {
                "dtype": pick(["F33", "f32", 5]) if self.odd() else code,
                "shape": shape,
                "data_offsets": [start, stop],
            }
            if self.odd():
                entry[pick(["extra", "shape", "data_offsets", "dtype"])] = pick(
                    [None, 1.0, [1.0], [True], [-1], "x", [2]]
                )
            header[f"k{index}"] = entry
            at += count * widths[code]
        if self.odd():
            header["__metadata__"] = pick([None, {}, {"a": "b"}, {"a": 1}, [], "x"])
        raw = json.dumps(header).encode()
        if self.odd():
            raw = pick(
                [
                    b" " + raw,
                    raw + b"  ",
                    raw + b"\0",
                    raw.replace(b"}", b",}", 1),
                    raw.replace(b"{", b'{"k0":1,', 1),
                    b"\xef\xbb\xbf" + raw,
                    raw + b"{}",
                ]
            )
        return (
            struct.pack("<Q", len(raw) + (pick([-1, 1]) if self.odd() else 0))
            + raw
            + bytes(range(256))[: at + (pick([-1, 1]) if self.odd() else 0)]
        )


# -- what they mean


Meaning = dict[str, tuple[str, tuple[int, ...], bytes]]


def flattened(value: object, prefix: str = "", depth: int = 0) -> dict[str, torch.Tensor]:
    """The tensors of torch's object, by dotted keys."""
    if isinstance(value, torch.Tensor):
        return {prefix or "tensor": value}
    found: dict[str, torch.Tensor] = {}
    if isinstance(value, Mapping) and depth < 5:
        for key, inner in value.items():
            name = key.decode("utf-8", "replace") if isinstance(key, bytes) else str(key)
            found |= flattened(inner, f"{prefix}.{name}" if depth else name, depth + 1)
    return found


def meaning(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    """Dtype, shape and elements."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    flat = torch.empty(plain.numel(), dtype=plain.dtype).copy_(plain.reshape(-1))
    raw = bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""
    return comparable(str(plain.dtype).removeprefix("torch."), tuple(plain.shape), raw)


def comparable(dtype: str, shape: tuple[int, ...], raw: bytes) -> tuple[str, tuple[int, ...], bytes]:
    """A bool is true by any byte but zero; torch writes it as 1 whenever it copies one."""
    return dtype, shape, bytes(map(bool, raw)) if dtype == "bool" else raw


def theirs(path: Path) -> tuple[dict[str, torch.Tensor] | None, str]:
    """What the oracle reads, or why it refuses."""
    try:
        with warnings.catch_warnings(action="ignore"):
            if path.suffix == ".safetensors":
                return safetensors.torch.load_file(path), ""
            return flattened(torch.load(path, weights_only=True)), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def ours(path: Path) -> tuple[Meaning | None, set[str], str]:
    """What this reader reads, the keys that it only names, or why it refuses."""
    try:
        opened = ckpt_surgeon.open(path)
        named_only = {key for key, tensor in opened.items() if isinstance(tensor, OpaqueTensor)}
        found = {
            key: comparable(tensor.dtype.name, tensor.shape, b"".join(map(bytes, tensor.blocks())))
            for key, tensor in opened.items()
            if key not in named_only
        }
    except ckpt_surgeon.CheckpointError as error:
        return None, set(), str(error)
    return found, named_only, ""


def disagreement(path: Path) -> str:
    """How the two differ in a way that must not be, "" where they do not."""
    read, only_named, _ = ours(path)
    if read is None:
        return ""
    expected, why = theirs(path)
    if expected is None:
        return "" if any(reason in why for reason in ALLOWED) or not read else f"torch refuses, this reads: {why[:400]}"
    wanted = {key: tensor for key, tensor in expected.items() if key not in only_named}
    if missing := expected.keys() - read.keys() - only_named:
        return f"not read: {missing}"
    if more := read.keys() - expected.keys():
        return f"read, and not there: {more}"
    different = [(key, meaning(tensor), read[key]) for key, tensor in wanted.items() if meaning(tensor) != read[key]]
    return f"other values: {different}" if different else ""
