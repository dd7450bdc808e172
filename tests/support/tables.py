"""One table of state_dicts that runs through every reader and every writer, and what compares and saves them."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import safetensors.torch
import torch

StateDict: TypeAlias = dict[str, torch.Tensor]

# Every dtype that torch.save takes.  Those without a storage class of their own are saved as bytes; torch writes
# them into its legacy container but cannot read them back.
WITH_STORAGE_CLASS = (
    "float64", "float32", "float16", "bfloat16", "complex128", "complex64",
    "int64", "int32", "int16", "int8", "uint8", "bool",
)  # fmt: skip
WITHOUT_STORAGE_CLASS = (
    "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2",
    "complex32", "bcomplex32", "uint64", "uint32", "uint16",
    "bits1x8", "bits2x4", "bits4x2", "bits8", "bits16",
)  # fmt: skip
DTYPES = WITH_STORAGE_CLASS + WITHOUT_STORAGE_CLASS
NOT_IN_SAFETENSORS = frozenset(
    ["complex128", "complex32", "bcomplex32", "float4_e2m1fn_x2", "bits1x8", "bits2x4", "bits4x2", "bits8", "bits16"]
)


def noise(dtype: str, *shape: int) -> torch.Tensor:
    """Any bit pattern of a dtype, NaNs included; the same at every call."""
    size = getattr(torch, dtype).itemsize
    count = size * torch.Size(shape).numel()
    if dtype == "bool":
        return (torch.arange(count) % 3 == 0).reshape(shape)
    generator = torch.Generator().manual_seed(count)
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
    return raw.view(getattr(torch, dtype)).reshape(shape)


def ramp(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


def _tied() -> StateDict:
    weight = ramp(6, 4)
    return {"embed.weight": weight, "other.weight": ramp(2), "head.weight": weight}


def _first_rows() -> StateDict:
    table = ramp(10, 4)
    return {"table": table, "first": table[:3]}


def _views_alone() -> StateDict:
    table = ramp(1000, 4)
    return {"rows": table[10:12], "column": table[:5, 1]}


def _reshaped_tie() -> StateDict:
    weight = ramp(6, 4)
    return {"matrix": weight, "vector": weight.view(24), "transposed": weight.t()}


def _versioned() -> StateDict:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(ramp(*parameter.shape))
    return model.state_dict()


def _conjugate() -> StateDict:
    weight = torch.complex(ramp(3, 2), ramp(3, 2) + 1)
    return {"plain": weight, "conjugate": weight.conj(), "transposed": weight.conj().t()}


def _negative() -> StateDict:
    weight = ramp(3, 2) + 1
    return {"plain": weight, "negative": torch._neg_view(weight), "column": torch._neg_view(weight)[:, 1]}


def _odd_keys() -> StateDict:
    keys = [
        "a.b.c",
        "it's",
        'say "hi"',
        "two words",
        "größe.重み",
        "line\nbreak",
        "tab\t",
        "\\back\\slash",
        "",
        ".",
        "a",
    ]
    return {key: ramp(2) + index for index, key in enumerate(keys)}


def _many_ranks() -> StateDict:
    return {f"rank{rank}": ramp(*range(1, rank + 1)) for rank in range(6)}


TABLE: dict[str, Callable[[], StateDict]] = {
    "dense": lambda: {"fc.weight": ramp(3, 4), "fc.bias": ramp(3)},
    "0-d": lambda: {"steps": torch.tensor(7), "scale": torch.tensor(0.5)},
    "transposed": lambda: {"weight": ramp(3, 4).t()},
    "step 2": lambda: {"weight": ramp(10)[::2], "rows": ramp(6, 4)[::2], "columns": ramp(6, 4)[:, ::2]},
    "expanded": lambda: {"weight": ramp(3, 1).expand(3, 5), "scalar": torch.tensor(2.0).expand(2, 3)},
    "overlapping": lambda: {"windows": ramp(10).unfold(0, 4, 2)},
    "channels last": lambda: {"conv.weight": ramp(4, 3, 2, 2).to(memory_format=torch.channels_last)},
    "permuted": lambda: {"conv.weight": ramp(2, 3, 4, 5).permute(3, 0, 2, 1)},
    "diagonal": lambda: {"weight": ramp(5, 5).diagonal()},
    "tied": _tied,
    "first rows": _first_rows,
    "views alone": _views_alone,
    "reshaped tie": _reshaped_tie,
    "offset": lambda: {"tail": ramp(10)[3:], "block": ramp(6, 6)[2:4, 1:5]},
    "empty": lambda: {"none": torch.empty(0), "rows": torch.empty(0, 3), "columns": torch.empty(3, 0, 2)},
    "empty view": lambda: {"none": ramp(6)[6:], "full": ramp(2)},
    "ranks": _many_ranks,
    "conjugate": _conjugate,
    "negative": _negative,
    "parameter": lambda: {"weight": torch.nn.Parameter(ramp(2, 3)), "frozen": torch.nn.Parameter(ramp(2), False)},
    "versioned": _versioned,
    "odd keys": _odd_keys,
    "large strided": lambda: {"weight": ramp(1200, 1000).t(), "stepped": ramp(700, 1001)[:, ::2]},
    **{dtype: lambda dtype=dtype: {"weight": noise(dtype, 3, 4), "scalar": noise(dtype, 1)[0]} for dtype in DTYPES},  # type: ignore[misc]
    **{f"{dtype} stepped": lambda dtype=dtype: {"weight": noise(dtype, 6, 4)[::2, 1:]} for dtype in DTYPES},  # type: ignore[misc]
}

NAMES = tuple(TABLE)
SHARING = frozenset({"tied", "first rows", "reshaped tie", "conjugate", "negative"})  # storages, between keys


def dtype_of(name: str) -> str | None:
    """The dtype that an entry of the table is about, if it is about one."""
    return name.removesuffix(" stepped") if name.removesuffix(" stepped") in DTYPES else None


def in_safetensors(name: str) -> bool:
    """Whether safetensors has a code for all the dtypes of an entry."""
    return dtype_of(name) not in NOT_IN_SAFETENSORS


# -- comparing


def elements(tensor: torch.Tensor) -> bytes:
    """The elements of any tensor, row-major."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def assert_same(
    found: Mapping[str, torch.Tensor],
    wanted: Mapping[str, torch.Tensor],
    *,
    order: bool = True,
    strides: bool = False,
    ties: bool = False,
) -> None:
    """Compare state_dicts bit for bit; NaNs are as good as any other bits."""
    if order:
        assert list(found) == list(wanted)
    else:
        assert sorted(found) == sorted(wanted)
    for key, tensor in wanted.items():
        ours = found[key]
        assert (key, ours.dtype, ours.shape) == (key, tensor.dtype, tensor.shape)
        assert elements(ours) == elements(tensor), key
        if strides:
            assert (key, ours.stride()) == (key, tensor.stride())
    if ties:
        assert groups(found) == groups(wanted)


def groups(state: Mapping[str, torch.Tensor]) -> set[frozenset[str]]:
    """The keys of each storage that is shared."""
    shared: dict[int, set[str]] = {}
    for key, tensor in state.items():
        if tensor.numel():
            shared.setdefault(tensor.untyped_storage().data_ptr(), set()).add(key)
    return {frozenset(keys) for keys in shared.values() if len(keys) > 1}


# -- saving in every container


def save_zip(state: object, folder: Path) -> Path:
    path = folder / "model.pth"
    torch.save(state, path)
    return path


def save_legacy(state: object, folder: Path) -> Path:
    path = folder / "legacy.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


def save_deflated(state: object, folder: Path) -> Path:
    return rewritten(save_zip(state, folder), folder / "deflated.pth", method=zipfile.ZIP_DEFLATED)


def save_without_checksums(state: object, folder: Path) -> Path:
    torch.serialization.set_crc32_options(False)
    try:
        return save_zip(state, folder)
    finally:
        torch.serialization.set_crc32_options(True)


def save_big_endian(state: StateDict, folder: Path) -> Path:
    """What a big-endian machine writes: the storages in its byte order, and a record that says so."""
    copies: dict[int, torch.UntypedStorage] = {}
    turned = type(state)()
    for key, tensor in state.items():
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in copies:
            copy = copies[storage.data_ptr()] = storage.clone()
            part = tensor.dtype.itemsize // (2 if tensor.dtype.is_complex else 1)
            if part > 1:
                copy.byteswap({2: torch.int16, 4: torch.int32, 8: torch.int64}[part])
        made = torch.empty(0, dtype=tensor.dtype).set_(
            copies[storage.data_ptr()], int(tensor.storage_offset()), tensor.shape, tensor.stride()
        )
        made = made.conj() if tensor.is_conj() else made
        turned[key] = torch._neg_view(made) if tensor.is_neg() else made
    if hasattr(state, "_metadata"):
        turned._metadata = state._metadata  # type: ignore[attr-defined]
    return rewritten(save_zip(turned, folder), folder / "big.pth", records={"byteorder": b"big"})


def save_from(device: str, state: StateDict, folder: Path, *, legacy: bool = False) -> Path:
    """A file as saved on a machine where the tensors lived on ``device`` (of as many letters as it takes)."""
    was, now = b"X\x03\x00\x00\x00cpu", struct.pack("<cI", b"X", len(device)) + device.encode()
    if legacy:
        path = save_legacy(state, folder)
        raw = path.read_bytes()
        assert raw.count(was) == 1
        path.write_bytes(raw.replace(was, now))
        return path
    path = save_zip(state, folder)
    return rewritten(path, folder / "elsewhere.pth", records={"data.pkl": pickle_of(path).replace(was, now)})


def rewritten(
    source: Path, target: Path, *, method: int = zipfile.ZIP_STORED, records: Mapping[str, bytes] | None = None
) -> Path:
    """A zip written anew by Python's zipfile, some records replaced (named without the archive's folder)."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", method) as new:
        for info in old.infolist():
            raw = (records or {}).get(info.filename.partition("/")[2])
            new.writestr(
                zipfile.ZipInfo(info.filename), old.read(info) if raw is None else raw, method, compresslevel=1
            )
    return target


def pickle_of(path: Path) -> bytes:
    """The data.pkl of a torch zip."""
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def standalone(state: StateDict) -> StateDict:
    """What safetensors' own serializer takes: contiguous tensors that share nothing."""
    return {key: tensor.detach().resolve_conj().resolve_neg().clone().contiguous() for key, tensor in state.items()}


def save_safetensors(state: StateDict, folder: Path) -> Path:
    path = folder / "model.safetensors"
    safetensors.torch.save_file(standalone(state), path)
    return path


def save_shards(state: StateDict, folder: Path, suffix: str) -> Path:
    """Two shards and their index, as transformers writes them; returns the index."""
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    weight_map = {}
    for number, keys in enumerate(_halves(list(state)), start=1):
        name = f"{stem}-{number:05d}-of-00002{suffix}"
        part = {key: state[key] for key in keys}
        if suffix == ".safetensors":
            safetensors.torch.save_file(standalone(part), folder / name)
        else:
            torch.save(part, folder / name)
        weight_map.update(dict.fromkeys(keys, name))
    path = folder / f"{stem}{suffix}.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}), encoding="utf-8")
    return path


def _halves(keys: list[str]) -> Iterator[list[str]]:
    middle = (len(keys) + 1) // 2
    yield from filter(None, (keys[:middle], keys[middle:]))
