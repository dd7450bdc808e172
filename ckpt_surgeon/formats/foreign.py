"""Files that are no checkpoint of ours, recognised by their first bytes: what they are and what to do."""

from __future__ import annotations

import re

from ..errors import FileError, NotACheckpoint, listed
from ..files.paths import FilePath

_SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (b"lmgg", "is a GGML file (llama.cpp)", "convert it with llama.cpp's tools"),
    (b"tjgg", "is a GGML file (llama.cpp)", "convert it with llama.cpp's tools"),
    (b"fmgg", "is a GGML file (llama.cpp)", "convert it with llama.cpp's tools"),
    (b"\x89HDF\r\n\x1a\n", "is an HDF5 file (Keras)", "open it with h5py or keras"),
    (b"\x1f\x8b", "is a gzip archive", "unpack it with gunzip or tar -xzf"),
    (b"BZh", "is a bzip2 archive", "unpack it with bunzip2"),
    (b"\xfd7zXZ\x00", "is an xz archive", "unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "is a zstd archive", "unpack it with unzstd"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive", "unpack it with 7z x"),
    (b"Rar!", "is a RAR archive", "unpack it with unrar x"),
    (b"%PDF", "is a PDF document", "fetch the checkpoint itself"),
    (b"\x89PNG", "is a PNG picture", "fetch the checkpoint itself"),
    (b"\xff\xd8\xff", "is a JPEG picture", "fetch the checkpoint itself"),
    (b"\x7fELF", "is a program", "fetch the checkpoint itself"),
    (b"\x08", "is an ONNX model", "open it with onnx.load"),
    (b"\n", "may be a TensorFlow graph (.pb)", "open it with tensorflow"),
)
_MSGPACK = re.compile(rb"[\x81-\x8f][\xa1-\xbf][\w/ ]+")  # a small map whose first key is a short string
_PROTOBUF = re.compile(rb"\x08[\x01-\x20][\x12\x1a\x3a]|\n[\x05-\xff][\x01\x02]?\n", re.DOTALL)
_LFS = b"version https://git-lfs"


# Folders that other tools leave, by the names in them: how many of those there must be, what it is, what to do.
_LAYOUTS: tuple[tuple[re.Pattern[str], int, str, str], ...] = (
    (
        re.compile(r"global_step\d+|zero_to_fp32\.py"),
        1,
        "is a folder of DeepSpeed ZeRO checkpoints, and none is in it",
        "name the folder of one step, global_step…",
    ),
    (
        re.compile(r"latest_checkpointed_iteration\.txt|iter_\d{7}"),
        1,
        "is a folder of Megatron-LM checkpoints, one for each iteration",
        "name the folder of one iteration, iter_…",
    ),
    (
        re.compile(r"__\d+\.metadata"),
        1,
        "is a distributed checkpoint whose processes wrote their metadata each for itself",
        "save it with use_collectives=True, or name the metadata of one process",
    ),
    (
        re.compile(r".+\.distcp"),
        1,
        "has the files of a distributed checkpoint without its .metadata",
        "copy .metadata too (ls -a shows it); if there is none, the save did not finish",
    ),
    (
        re.compile(r"(.*[_.-])?rank[_-]?\d+([_.-].*)?\.(pt|pth|bin|ckpt)"),
        2,
        "has a file of each process (FSDP's local or sharded state_dicts), in which each has a part of the weights",
        "load them as they were saved and save with torch.distributed.checkpoint, or name one file",
    ),
)


def refuse_folder(folder: FilePath, names: list[str]) -> NotACheckpoint | None:
    """The error for a folder of another tool's, None for any other folder."""
    for pattern, least, what, remedy in _LAYOUTS:
        if sum(pattern.fullmatch(name) is not None for name in names) >= least:
            return NotACheckpoint(folder, what, remedy)
    return None


def refuse_megatron_core(folder: FilePath) -> NotACheckpoint:
    """The error for a folder of Megatron-Core's whose weights are not in files of torch's."""
    what = "is a Megatron-Core checkpoint without .metadata: its weights are in another format (zarr), or not here"
    return NotACheckpoint(
        folder, what, "copy .metadata too (ls -a shows it), or convert it with Megatron to torch_dist"
    )


def refuse(path: FilePath, head: bytes, broken: FileError | None = None) -> FileError:
    """The error for a file that no reader knows: names it, as far as its first bytes tell.

    ``broken`` is the error for one that these do not tell, where there is a guess.
    """
    if not head:
        return NotACheckpoint(path, "is empty", "fetch it again")
    if head.startswith(_LFS):
        found = re.search(rb"^size (\d+)$", head, re.MULTILINE)
        size = f"; the real file has {int(found[1]):,} bytes" if found else ""
        return NotACheckpoint(path, f"is a git-lfs pointer{size}", "run: git lfs pull")
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head")):
        return NotACheckpoint(path, "is an HTML page", "the download met a login or quota page: fetch the file itself")
    if start.startswith((b"<?xml", b"<error")):
        return NotACheckpoint(path, "is an XML page", "the download met an error page: fetch the file itself")
    if head[4:8] == b"TFL3":
        return NotACheckpoint(path, "is a TensorFlow Lite model", "open it with tensorflow")
    if _MSGPACK.match(head):
        return NotACheckpoint(path, "is a msgpack file (Flax)", "open it with flax.serialization.msgpack_restore")
    if not _PROTOBUF.match(head) and head[:1] in b"\x08\n":
        return broken or _unknown(path, head)
    for magic, what, remedy in _SIGNATURES:
        if head.startswith(magic):
            return NotACheckpoint(path, what, remedy)
    return broken or _unknown(path, head)


def refuse_zip(path: FilePath, names: list[str]) -> NotACheckpoint:
    """The error for a zip that is none of torch's."""
    if "model.weights.h5" in names:
        return NotACheckpoint(path, "is a Keras archive (.keras)", "open it with keras")
    if "serialized_state_dict.pt" in names:
        what = "is a torch.export archive of torch before 2.8; its weights are a checkpoint inside"
        return NotACheckpoint(path, what, "unpack it and give serialized_state_dict.pt")
    shown = listed(names, 3) if names else "nothing"
    return NotACheckpoint(path, f"is a zip, but no checkpoint: it has no data.pkl (it holds {shown})", "unpack it")


def _is_text(head: bytes) -> bool:
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":  # a character that the head's end has cut
            return False
    return all(byte >= 32 or byte in b"\t\r\n\f" for byte in head)


def _unknown(path: FilePath, head: bytes) -> NotACheckpoint:
    if not head.strip(b"\x00"):
        return NotACheckpoint(
            path, "begins with zeros only", "the download or disk image is incomplete: fetch it again"
        )
    if _is_text(head):
        words = head.decode("utf-8", "replace").strip()[:40]
        return NotACheckpoint(path, f"is a text file (it begins {words!r})", "give a checkpoint")
    return NotACheckpoint(
        path,
        f"is no checkpoint that is known here (it begins {head[:8].hex(' ')})",
        "known are torch's .pth/.pt/.bin/.ckpt, safetensors, and their index files",
    )
