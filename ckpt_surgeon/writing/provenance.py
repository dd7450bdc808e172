"""Where an output comes from, on request: in a safetensors header, and as an in-toto statement beside the output.

The statement (https://in-toto.io/Statement/v1) is unsigned.  It has the predicate type and the form that OpenSSF's
model-signing reads: one subject, whose digest is SHA-256 over the digests of all files in the order of their names.
What that form does not know stands in the predicate under ``ckpt_surgeon``, which its verifiers leave aside.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import FileError, OutputExists
from ..files.paths import FilePath
from ..reading.comparing import hash as hash_of
from ..text import Shown
from .plan import Plan

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://model_signing/signature/v1.0"
SUFFIX = ".intoto.json"
BLOCK = 1 << 20


@dataclass(frozen=True, slots=True, repr=False)
class Origin(Shown):
    """What an output was made of: the recipe, SHA-256 of each source file, and the hash of the tensors that it has."""

    recipe: str
    recipe_digest: str
    version: str
    sources: tuple[tuple[str, str], ...]
    result: str

    @property
    def metadata(self) -> Mapping[str, str]:
        """What a safetensors header says of it; a file's own hash cannot stand in the file."""
        return {
            "ckpt_surgeon.version": self.version,
            "ckpt_surgeon.recipe": f"sha256:{self.recipe_digest}",
            "ckpt_surgeon.recipe_toml": self.recipe,
            "ckpt_surgeon.sources": json.dumps([{"name": name, "sha256": found} for name, found in self.sources]),
            "ckpt_surgeon.result": f"sha256:{self.result}",
        }


def origin(planned: Plan, recipe: str, digest: str, version: str) -> Origin:
    """Read the sources of a plan and compute its tensors, for their hashes; nothing is written."""
    sources = {path.name: sha256(path) for path in planned.sources()}
    return Origin(recipe, digest, version, tuple(sorted(sources.items())), hash_of(planned.checkpoint).whole)


def beside(planned: Plan) -> FilePath:
    """Where the statement goes: beside a file, the index of shards, or a folder."""
    out = planned.model_folder or planned.out
    return out.parent / f"{out.name}{SUFFIX}"


def refuse_existing(planned: Plan, *, force: bool) -> None:
    """Raise OutputExists where another statement is there, FileError where none can be written."""
    if planned.out.local is None:
        raise FileError(planned.out, "is at a URL, where no statement is written", "write here, then send both")
    if not force and beside(planned).lexists():
        raise OutputExists(beside(planned))


def write_statement(planned: Plan, made: Origin) -> FilePath:
    """Hash the files of an output that was written, and write the statement."""
    path = beside(planned)
    path.write_text(json.dumps(statement(planned, made), indent=2) + "\n", "utf-8")
    return path


def statement(planned: Plan, made: Origin) -> dict[str, object]:
    """The statement on the files of an output that was written."""
    files = [*(file.path for file in planned.files), *([planned.index] if planned.index is not None else [])]
    is_alone = len(files) == 1 and not planned.is_folder and planned.model_folder is None
    found = sorted(("." if is_alone else path.name, sha256(path)) for path in files)  # "." is a file by itself
    resources = [{"name": name, "algorithm": "sha256", "digest": digest} for name, digest in found]
    whole = hashlib.sha256(b"".join(bytes.fromhex(digest) for _, digest in found)).hexdigest()
    return {
        "_type": STATEMENT,
        "subject": [{"name": (planned.model_folder or planned.out).name, "digest": {"sha256": whole}}],
        "predicateType": PREDICATE,
        "predicate": {
            "serialization": {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": []},
            "resources": resources,
            "ckpt_surgeon": {
                "version": made.version,
                "recipe": made.recipe,
                "recipe_sha256": made.recipe_digest,
                "sources": [{"name": name, "sha256": digest} for name, digest in made.sources],
                "result": made.result,
            },
        },
    }


def sha256(path: FilePath) -> str:
    """The hash of a file's bytes."""
    found = hashlib.sha256()
    with path.opened() as file:
        while block := file.read(BLOCK):
            found.update(block)
    return found.hexdigest()
