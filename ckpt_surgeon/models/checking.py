"""Whether a checkpoint keeps rules: its file, keys, tensors and values, and the model that it should load into.

Every broken rule is named, not the first alone.  Nothing in a file is run; a model that a rule names is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..errors import BrokenFile, CheckpointError
from ..files.paths import AnyPath, FilePath, file_path
from ..files.sinks import Progress
from ..key_patterns import pattern_instead
from ..reading.listing import Listing, ls
from ..reading.opening import open as open_checkpoint
from ..reading.scanning import scan
from ..tensors.checkpoint import Checkpoint
from ..tensors.records import ExtraState, OpaqueTensor, Tensor
from ..text import Shown, plural, size
from .check_rules import ANY, CheckRules, Shape


@dataclass(frozen=True, slots=True, repr=False)
class BrokenRule(Shown):
    """One thing that breaks a rule: the rule's name, what is wrong, and the key that it is about, where it is one."""

    rule: str
    message: str
    key: str = ""


@dataclass(frozen=True, slots=True, repr=False)
class Check(Shown):
    """What became of the rules for one file: those that were tried, and all that breaks them.

    ``error`` says why the file, or the model that it should load into, could not be read; then nothing is known of
    the rules, and ``rules`` and ``broken`` are what was found before.
    """

    path: FilePath
    rules: tuple[str, ...]
    broken: tuple[BrokenRule, ...] = ()
    error: str = ""

    @property
    def passed(self) -> bool:
        """Whether the file keeps every rule."""
        return not (self.broken or self.error)


def check(
    path: AnyPath, rules: CheckRules | AnyPath, *, select: str | None = None, progress: Progress | None = None
) -> Check:
    """Try rules on a checkpoint's file; ``rules`` are given as such, or as the path of their TOML file.

    ``select`` is the dotted path of the state_dict where the file holds several; ``progress`` is told the bytes whose
    values were read.  What is wrong with a file is in the result, its ``error`` too.  Raises RecipeError for rules
    that cannot be read.

    >>> import ckpt_surgeon, torch
    >>> from ckpt_surgeon import CheckRules
    >>> torch.save({"module.fc.bias": torch.tensor([1.0, float("nan")])}, "bad.pth")
    >>> found = ckpt_surgeon.check("bad.pth", CheckRules(forbidden=("module.*",), finite=("*",)))
    >>> [(one.rule, one.message) for one in found.broken]
    [('keys.forbidden', "matches 'module.*'"), ('tensors.finite', '1 of 2 values is not finite (1 NaN, 0 inf)')]
    """
    wanted = rules if isinstance(rules, CheckRules) else CheckRules.load(rules)
    where = file_path(path)
    broken: list[BrokenRule] = []
    try:
        for one in _broken(where, wanted, select, progress):
            broken.append(one)
    except CheckpointError as error:
        return Check(where, wanted.asked, tuple(broken), str(error))
    return Check(where, wanted.asked, tuple(broken))


def _broken(path: FilePath, rules: CheckRules, select: str | None, progress: Progress | None) -> Iterator[BrokenRule]:
    """Everything that breaks a rule, the file's own rules first."""
    if rules.plain_data:
        for name in scan(path).suspects:
            yield BrokenRule("file.plain_data", f"a full torch.load would import {name}, and may run it")
    checkpoint = open_checkpoint(path, select=select, allow_part=False)
    listing = ls(checkpoint)
    yield from _of_the_file(path, rules, checkpoint, listing)
    yield from _of_the_keys(rules, list(checkpoint))
    yield from _of_the_tensors(rules, checkpoint)
    yield from _of_the_values(rules, checkpoint, progress)
    if rules.loads_into:
        yield from _of_the_model(rules.loads_into, checkpoint)


def _of_the_file(path: FilePath, rules: CheckRules, checkpoint: Checkpoint, listing: Listing) -> Iterator[BrokenRule]:
    if rules.format and not any(checkpoint.container.startswith(name) for name in rules.format):
        yield BrokenRule("file.format", f"is {checkpoint.container}, not {' or '.join(rules.format)}")
    if rules.max_bytes is not None and listing.file_bytes > rules.max_bytes:
        yield BrokenRule("file.max_bytes", _more(listing.file_bytes, rules.max_bytes))
    for name in rules.metadata:
        if not any(fnmatchcase(there, name) for there in checkpoint.metadata):
            yield BrokenRule("file.metadata", f"has no metadata {name!r}")
    if rules.checksums:
        try:
            ls(path, select=checkpoint.selected or None, check=True)
        except BrokenFile as error:
            yield BrokenRule("file.checksums", error.problem)


def _of_the_keys(rules: CheckRules, keys: list[str]) -> Iterator[BrokenRule]:
    for pattern in rules.required:
        if not _matching(keys, pattern):
            yield BrokenRule("keys.required", *_matches_nothing(pattern, keys))
    for key in keys:
        if (found := _first(rules.forbidden, key)) is not None:
            yield BrokenRule("keys.forbidden", f"matches {found!r}", key)
    for key in keys if rules.only else []:
        if _first(rules.only, key) is None:
            yield BrokenRule("keys.only", "matches none of the patterns", key)


def _of_the_tensors(rules: CheckRules, tensors: Mapping[str, Tensor]) -> Iterator[BrokenRule]:
    names = [("tensors.finite", rules.finite), ("tensors.dtypes", rules.dtypes), ("tensors.shapes", rules.shapes)]
    for rule, patterns in names:
        for pattern in patterns:
            if not _matching(tensors, pattern):
                yield BrokenRule(rule, *_matches_nothing(pattern, tensors))
    for key, tensor in tensors.items():
        if rules.max_tensor_bytes is not None and tensor.nbytes > rules.max_tensor_bytes:
            yield BrokenRule("tensors.max_bytes", _more(tensor.nbytes, rules.max_tensor_bytes), key)
    if rules.max_parameters is not None:
        numel = sum({tensor.tie: tensor.numel for tensor in tensors.values()}.values())
        if numel > rules.max_parameters:
            message = f"has {plural(numel, 'parameter')}, more than {rules.max_parameters:,}"
            yield BrokenRule("tensors.max_parameters", message)
    yield from _tied(tensors) if rules.untied else ()
    for key, tensor in tensors.items():
        if isinstance(tensor, ExtraState):
            continue
        if (found := _first(rules.dtypes, key)) is not None and tensor.dtype.name not in rules.dtypes[found]:
            message = f"is {tensor.dtype}, not {' or '.join(rules.dtypes[found])} ({found})"
            yield BrokenRule("tensors.dtypes", message, key)
        if (found := _first(rules.shapes, key)) is not None and not _has_shape(tensor, rules.shapes[found]):
            message = f"has shape {list(tensor.shape)}, not {_spelled(rules.shapes[found])} ({found})"
            yield BrokenRule("tensors.shapes", message, key)


def _tied(tensors: Mapping[str, Tensor]) -> Iterator[BrokenRule]:
    firsts: dict[object, str] = {}
    for key, tensor in tensors.items():
        if firsts.setdefault(tensor.tie, key) != key:
            yield BrokenRule("tensors.untied", f"is the same tensor as {firsts[tensor.tie]!r}", key)


def _of_the_values(rules: CheckRules, tensors: Mapping[str, Tensor], progress: Progress | None) -> Iterator[BrokenRule]:
    """What is not finite; values are streamed, those of tied tensors once."""
    from ..files.prefetch import reading_ahead
    from ..reading.comparing import tensor_stats
    from ..tensors.records import spans_of

    chosen = {key: tensor for key, tensor in tensors.items() if _first(rules.finite, key) is not None
              and not isinstance(tensor, ExtraState)}  # fmt: skip
    seen: set[object] = set()
    with reading_ahead(spans_of(chosen.values())):
        for key, tensor in chosen.items():
            if isinstance(tensor, OpaqueTensor) or not tensor.dtype.is_computable:
                kind = tensor.kind if isinstance(tensor, OpaqueTensor) else tensor.dtype
                yield BrokenRule("tensors.finite", f"is a {kind} tensor, whose values are not read", key)
            elif tensor.tie not in seen:
                seen.add(tensor.tie)
                found = tensor_stats(tensor)
                if odd := found.nan + found.inf:
                    verb = "is" if odd == 1 else "are"
                    message = f"{odd:,} of {plural(tensor.numel, 'value')} {verb} not finite"
                    yield BrokenRule("tensors.finite", f"{message} ({found.nan:,} NaN, {found.inf:,} inf)", key)
                if progress is not None:
                    progress(tensor.nbytes)


def _of_the_model(target: str, checkpoint: Checkpoint) -> Iterator[BrokenRule]:
    """Why a strict load into a target would fail."""
    from .diff import diff
    from .targets import refuse_misspelled

    refuse_misspelled(target)
    found = diff(checkpoint, target, hints=False)
    rule = "model.loads_into"
    yield from (BrokenRule(rule, f"is missing, {target} has it", key) for key in found.missing)
    yield from (BrokenRule(rule, f"is unexpected, {target} has no such key", key) for key in found.unused)
    yield from (BrokenRule(rule, f"has shape {one.ours}, {target} wants {one.theirs}", one.key)
                for one in found.mismatched)  # fmt: skip
    yield from (BrokenRule(rule, "is more than plain elements, which no plain parameter takes", key)
                for key in found.opaque)  # fmt: skip
    if found.refused:
        yield BrokenRule(rule, f"the model's own code refuses it: {found.refused}")
    if found.part:
        yield BrokenRule(rule, f"is no whole model: it is {found.part}")


# -- patterns and words


def _first(patterns: Iterable[str], key: str) -> str | None:
    return next((pattern for pattern in patterns if fnmatchcase(key, pattern)), None)


def _matching(keys: Iterable[str], pattern: str) -> bool:
    return pattern in keys or any(fnmatchcase(key, pattern) for key in keys)


def _matches_nothing(pattern: str, keys: Iterable[str]) -> tuple[str]:
    hint = pattern_instead(pattern, keys)
    return (f"{pattern!r} matches no key" + (f"; {hint}" if hint else ""),)


def _has_shape(tensor: Tensor, wanted: Shape) -> bool:
    return len(tensor.shape) == len(wanted) and all(
        want in (None, there) for there, want in zip(tensor.shape, wanted, strict=True)
    )


def _spelled(shape: Shape) -> str:
    return f"[{', '.join(ANY if one is None else str(one) for one in shape)}]"


def _more(nbytes: int, limit: int) -> str:
    return f"has {size(nbytes)}, more than {size(limit)}"
