"""What commands print of training checkpoints: ``ckpt ls --training``, ``resume-check``, ``set``, ``--whole``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..edits.change import Change
from ..key_patterns import FEW, folded
from ..runs.describe import ListedGroup, ListedOptimizer, Parameter, Training
from ..runs.folder import RunFolder
from ..runs.nodes import followed
from ..runs.resume_check import ResumeCheck
from ..runs.run import Run
from ..tensors.checkpoint import Checkpoint
from ..text import as_json, document, html, plural, table, visible
from .outputs import change_rows

_COLUMNS = ("group", "ids", "key", "known", "slots", "step")
_PARTS = ("entry", "what", "value")


def training_text(found: Training, *, full: bool = False) -> str:
    """Optimizers with the parameter behind each id, then whatever else training goes on from."""
    where = f"weights at {visible(found.weights or '.')}" if found.has_weights else "no weights"
    lines = [f"{found.path}: {where}"]
    lines += [f"  the same keys, edited alike: {visible(twin)}" for twin in found.twins]
    lines += [f"  note: {note}" for note in found.notes]
    for optimizer in found.optimizers:
        lines += ["", optimizer_head(optimizer), table(_COLUMNS, _rows(optimizer, full=full))]
        lines += [f"  group {number}: {_options(group)}" for number, group in enumerate(optimizer.groups)]
    if not found.optimizers:
        lines += ["", "no optimizer's state"]
    if found.parts:
        lines += ["", table(_PARTS, [(part.path, part.kind, part.value) for part in found.parts])]
    return document(lines)


def training_html(found: Training) -> str:
    """The tables as a notebook shows them."""
    tables = [html(_COLUMNS, _rows(optimizer, full=False), optimizer_head(optimizer)) for optimizer in found.optimizers]
    rows = [(part.path, part.kind, part.value) for part in found.parts]
    return "\n".join([*tables, html(_PARTS, rows, str(found.path))])


def optimizer_head(optimizer: ListedOptimizer) -> str:
    """An optimizer in a line: where it is, its kind, its groups, how its ids are known."""
    count = sum(len(group.parameters) for group in optimizer.groups)
    how = f"ids told by {optimizer.how}" if optimizer.how else "nothing tells which parameter is behind each id"
    kind = f"looks like {optimizer.kind}" if optimizer.kind else "of no kind that is known"
    groups = plural(len(optimizer.groups), "group")
    return f"{visible(optimizer.path or '.')}: {kind}, {groups}, {plural(count, 'parameter')}; {how}"


def _options(group: ListedGroup) -> str:
    return ", ".join(f"{name} {value}" for name, value in group.options if name in ("lr", "weight_decay", "initial_lr"))


def _rows(optimizer: ListedOptimizer, *, full: bool) -> list[Sequence[object]]:
    rows: list[Sequence[object]] = []
    for number, group in enumerate(optimizer.groups):
        alike: dict[tuple[str, str, str], list[Parameter]] = {}
        for parameter in group.parameters:
            known = "yes" if parameter.is_certain else "by order only" if parameter.key else "no"
            slots = ", ".join(name for name, _ in parameter.slots) or "none"
            alike.setdefault((known, slots, "" if parameter.step is None else f"{parameter.step:g}"), []).append(
                parameter
            )
        for (known, slots, step), parameters in alike.items():
            keys = (
                folded([parameter.key for parameter in parameters], limit=None if full else FEW)
                if parameters[0].key
                else [("?", len(parameters))]
            )
            for pattern, count in keys:
                ids = _ids(parameters) if len(keys) == 1 else plural(count, "id")
                rows.append((number, ids, pattern, known, slots, step))
    return rows


def _ids(parameters: Iterable[Parameter]) -> str:
    """Ids as a range where they are one.

    >>> _ids([Parameter(number, "", True, (), None) for number in (3, 4, 5)])
    '3–5'
    """
    ids = [parameter.id for parameter in parameters]
    numbers = [number for number in ids if isinstance(number, int)]
    if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}–{numbers[-1]}"
    return ", ".join(map(str, ids)) if len(ids) <= 4 else plural(len(ids), "id")


def training_json(found: Training) -> str:
    """What ``ckpt ls --training --json`` prints."""
    return as_json(
        "training",
        {
            "path": str(found.path),
            "weights": found.weights if found.has_weights else None,
            "twins": list(found.twins),
            "notes": list(found.notes),
            "optimizers": [
                {
                    "path": optimizer.path,
                    "kind": optimizer.kind or None,
                    "names": optimizer.how or None,
                    "groups": [
                        {
                            "options": dict(group.options),
                            "parameters": [_parameter(parameter) for parameter in group.parameters],
                        }
                        for group in optimizer.groups
                    ],
                }
                for optimizer in found.optimizers
            ],
            "parts": [{"path": part.path, "kind": part.kind, "value": part.value} for part in found.parts],
        },
    )


def _parameter(parameter: Parameter) -> dict[str, object]:
    return {
        "id": parameter.id,
        "key": parameter.key or None,
        "certain": parameter.is_certain,
        "slots": {name: list(shape) for name, shape in parameter.slots},
        "step": parameter.step,
    }


# -- resume-check

_OUTCOMES = (
    ("equal", "go on bit for bit"),
    ("kept_part", "go on bit for bit on the part that both have"),
    ("fresh", "start afresh"),
    ("different", "go on differently"),
    ("new", "are new"),
    ("gone", "are gone"),
)


def resume_text(found: ResumeCheck) -> str:
    """What became of every parameter, and the verdict."""
    rows = [
        (outcome, count, pattern)
        for name, outcome in _OUTCOMES
        for pattern, count in folded(getattr(found, name))
    ]  # fmt: skip
    lines: list[str] = [table(("parameters that", "keys", "which"), rows), ""]
    return document([*lines, _verdict(found)])


def _verdict(found: ResumeCheck) -> str:
    if found.is_same_run:
        return f"same run: after {plural(found.steps, 'step')} weights and state are equal bit for bit"
    if found.holds:
        return f"kept part: what both have is equal bit for bit after {plural(found.steps, 'step')}"
    return "NOT the same: training goes on differently"


def resume_html(found: ResumeCheck) -> str:
    """The table as a notebook shows it."""
    rows = [(outcome, count, which) for name, outcome in _OUTCOMES for which, count in folded(getattr(found, name))]
    return html(("parameters that", "keys", "which"), rows, _verdict(found))


def resume_json(found: ResumeCheck) -> str:
    """What ``ckpt resume-check --json`` prints."""
    keys = {name: list(getattr(found, name)) for name, _ in _OUTCOMES}
    return as_json("resume-check", {"steps": found.steps, "same_run": found.is_same_run, "holds": found.holds, **keys})


# -- written whole


def run_notes(run: Run | RunFolder) -> list[str]:
    """The notes of a run's edits, and the class of proof."""
    proofs = {
        "same run": "same run: training goes on bit for bit as it would have",
        "kept part": "kept part: what was kept trains on as it would have, given the same gradients",
        "no proof": "no proof: values were computed, so training goes on from others",
    }
    has_optimizer = bool(run.optimizers)
    return [*run.notes, *([proofs[run.proof]] if has_optimizer else [])]


def values_set_text(run: Run, out: object, *, was_written: bool) -> str:
    """What ``ckpt set`` prints: every value, old and new."""
    rows = [
        (".".join(path), _shown(followed(run.whole.root, path)), "→", _shown(value))
        for path, value in run.values.items()
    ]
    end = f"wrote {out}" if was_written else "nothing was written (--dry-run)"
    return document([table(["path", "was", "", "is"], rows), "", end])


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, (bool, int, float, str, type(None))) else "(a tensor)"


def folder_text(run: RunFolder) -> str:
    """What a run that is a folder holds."""
    lines = [f"{run.folder}: {plural(len(run.weights), 'tensor')} in {', '.join(map(visible, run.weight_files))}"]
    for file in run.optimizers:
        names = run.names(file.state)
        how = f"ids told by {names.how}" if names is not None else "nothing tells which parameter is behind each id"
        lines.append(f"  {visible(file.name)}: {plural(len(file.state.ids), 'parameter')}; {how}")
    return document([*lines, *(f"  {visible(name)}" for name in run.others)])


def folder_plan_text(run: RunFolder, change: Change[Checkpoint], out: object) -> str:
    """What ``--dry-run`` prints for a run that is a folder."""
    lines: list[str] = [table(["old", "", "new", "dtype", "shape", "bytes"], change_rows(change)), ""]
    lines += [f"note: {note}" for note in (*change.notes, *run_notes(run))]
    files = [*run.weight_files, *(file.name for file in run.optimizers)]
    lines.append(f"would write {out}: {', '.join(files)}, and {plural(len(run.others), 'file')} as they are")
    return document([*lines, "nothing was written (--dry-run)"])


def folder_summary(run: RunFolder, change: Change[Checkpoint], out: object) -> str:
    """The line after a folder was written, and a line for each thing worth knowing."""
    what = [plural(len(change.result), "tensor"), f"{change.renamed:,} renamed", f"{len(change.dropped):,} dropped"]
    files = f"{plural(len(run.optimizers), 'optimizer')}, {plural(len(run.others), 'file')} as they were"
    lines = [f"wrote {out}: {', '.join(what)}; {files}"]
    return document([*lines, *(f"note: {note}" for note in (*change.notes, *run_notes(run)))])
