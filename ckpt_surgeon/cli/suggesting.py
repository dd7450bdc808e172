"""What was probably meant by the name of a command that there is not."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

# What other tools, and other words, call it.
CALLED_ELSEWHERE = {
    "ls": ("list", "show", "inspect", "info", "print", "view", "cat", "head", "summary", "keys", "open", "stats", "du",
           "describe", "tree"),
    "check": ("validate", "verify", "lint", "assert", "test"),
    "diff": ("compare", "cmp", "missing"),
    "hash": ("sha256", "sha256sum", "checksum", "digest", "fingerprint"),
    "scan": ("fickling", "picklescan", "audit", "globals"),
    "strip-prefix": ("strip", "unwrap", "remove-prefix", "strip-module", "remove-module"),
    "add-prefix": ("prefix", "wrap"),
    "rename": ("rename-keys", "mv", "remap", "map-keys", "convert-keys", "sub", "replace-keys", "move"),
    "keep": ("filter", "include", "only"),
    "drop": ("rm", "remove", "delete", "del", "exclude"),
    "select": ("extract", "subtree", "sub-tree", "pick"),
    "cast": ("dtype", "to", "half", "bf16", "fp16", "to-half", "to-bf16"),
    "dequantize": ("dequant", "unquantize"),
    "transpose": ("permute",),
    "reshape": ("view-as", "resize"),
    "concat": ("cat-tensors", "fuse", "fuse-qkv"),
    "split": ("chunk", "unfuse", "split-qkv"),
    "fold-norm": ("fuse-bn", "fold-bn", "fuse-conv-bn"),
    "resize-rows": ("resize-token-embeddings", "resize-embeddings", "resize-vocab", "pad-vocab", "add-tokens"),
    "resize-grid": ("resize-pos-embed", "interpolate-pos-embed"),
    "resize-channels": ("in-chans", "adapt-input-conv", "channels"),
    "average": ("avg", "mean", "soup", "model-soup", "swa"),
    "join": ("combine", "union", "merge-files", "concat-files"),
    "merge": ("mergekit", "task-arithmetic", "ties", "dare"),
    "merge-lora": ("merge-adapter", "merge-and-unload", "bake", "lora", "peft"),
    "subtract": ("sub-model", "task-vector", "delta"),
    "convert": ("save", "export", "safetensors", "shard", "unshard", "reshard", "to-safetensors", "rewrite", "slim",
                "strip-optimizer", "consolidate"),
    "align": ("match", "map"),
    "fit": ("load", "adapt", "transfer", "load-into"),
    "set": ("set-epoch", "set-lr"),
    "freeze-plan": ("freeze", "trainable"),
    "groups": ("param-groups", "optimizer-groups"),
    "apply": ("run", "patch"),
    "recover": ("resume", "repair", "fsck"),
}  # fmt: skip


def meant(word: str, commands: Iterable[str]) -> list[str]:
    """The commands that a word may stand for, the likeliest first: by another tool's name, by likeness.

    >>> meant("inspect", ["ls", "diff"]), meant("lss", ["ls", "diff"]), meant("xyzzy", ["ls", "diff"])
    (['ls'], ['ls'], [])
    """
    there = list(commands)
    plain = word.lower().replace("_", "-")
    if plain in there:
        return [plain]
    called = {name: command for command, names in CALLED_ELSEWHERE.items() for name in names if command in there}
    if plain in called or plain in CALLED_ELSEWHERE:  # a word that is known says what is meant, be it there or not
        return [called[plain]] if plain in called else []
    found = get_close_matches(plain, there, n=3, cutoff=0.6)
    parts = set(plain.split("-"))
    found += [name for name in there if name in parts] if len(parts) > 1 else []
    found += [called[name] for name in get_close_matches(plain, called, n=1, cutoff=0.8)] if not found else []
    return list(dict.fromkeys(found))[:3]
