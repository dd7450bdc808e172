"""Renaming keys where they lie: only a file's index is rewritten, in its own room, whatever the size of the rest.

An edit that renames and does nothing else says which keys change.  Here each of them is led back to the names in the
file that it is made of (a dict's, where dicts are nested also those of the dicts around it; torch's ``_metadata`` has
module paths of its own), the container's :class:`~ckpt_surgeon.formats.contents.Index` says them anew, and what a
reader would then find is compared with what was asked for, before :mod:`ckpt_surgeon.files.journal` touches the file.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from ..edits.change import Change
from ..errors import NEW_FILE, EditError, FileError, NoRoom, SelectionError, listed
from ..files import journal
from ..files.journal import Patch
from ..files.local import LocalPath
from ..files.paths import AnyPath, FilePath
from ..formats.contents import Contents, Index, Reindexed
from ..formats.pickle.torch_objects import TypedStorage
from ..formats.pickle.values import Object, Ordered, Value, spelled
from ..reading.opening import INTERRUPTED, index_of
from ..reading.selecting import select_state_dict
from ..reading.tree import CONTAINERS, TENSORS, Step, Trail, children, followed
from ..reading.whole_modules import LACKING, PACKED
from ..tensors.checkpoint import Checkpoint
from ..tensors.extra_state import digest
from ..tensors.records import ExtraState, OpaqueTensor
from ..tensors.stored import StoredTensor
from ..text import Shown
from .index_names import IndexNames, joined_path

KEPT = "rename in Python: load it with torch, and save its state_dict() with other keys"


class Edit(Protocol):
    """What can be planned on a checkpoint: a :class:`~ckpt_surgeon.edits.recipe.Step` or a ``Recipe``."""

    def plan(self, state_dict: Checkpoint, /) -> Change[Checkpoint]: ...


@dataclass(frozen=True, slots=True, repr=False)
class InPlace(Shown):
    """What a renaming in place will do: the change, the bytes to rewrite, and how many bytes of room are left then."""

    path: Path
    change: Change[Checkpoint]
    patches: tuple[Patch, ...]
    spare: int
    written: bool = False  # whether it was carried out

    @property
    def nbytes(self) -> int:
        """How many bytes will be rewritten."""
        return sum(len(patch.new) for patch in self.patches)


def plan_in_place(path: AnyPath, edit: Edit, *, select: str | None = None) -> InPlace:
    """Plan to rename keys in a file without writing another one; nothing is touched.

    ``edit`` is a step or a recipe that renames and does nothing else; ``select`` the dotted path of the state_dict
    where the file holds several.  Everything else in the file stays as it is.  Raises FileError where the container
    or the room that its index has does not allow it, and what the edit raises.

    >>> import ckpt_surgeon, torch
    >>> torch.save({"module.fc.bias": torch.ones(3)}, "parallel.pth")
    >>> plan = ckpt_surgeon.plan_in_place("parallel.pth", ckpt_surgeon.step("strip_prefix"))
    >>> dict(plan.change.origins), plan.spare
    ({'fc.bias': ('module.fc.bias',)}, 7)
    """
    index = index_of(path)
    contents, here = index.contents, _local(index.contents.path)
    checkpoint = select_state_dict(contents, select)
    if checkpoint.part.startswith((PACKED, LACKING)):
        raise FileError(here, f"is {checkpoint.part}, whose names would stay", KEPT)
    change = _change(edit, checkpoint)
    names = _names(here, change)
    if all(old == new for old, new in names.items()):
        return InPlace(here, change, (), 0)
    if (links := here.stat().st_nlink) > 1:  # whoever opens another of its names finds no journal
        raise FileError(here, f"has {links} names (hard links), and all would change", NEW_FILE)
    place = followed(contents.root, checkpoint.selected)
    if place is None:
        raise FileError(here, f"has {checkpoint.selected!r} in a place that cannot be told", NEW_FILE)
    made = _rewritten(index, IndexNames(index, names, _modules(change)).below(place[0]), names, place[1])
    problem = _problem(change, made.contents, select)
    if not problem and place[1]:
        differs = _first_difference(contents.root, made.contents.root, place[1][-1])
        problem = f"{differs} in it has the same dict, and would change too" if differs is not None else ""
    if problem:
        raise FileError(here, problem, NEW_FILE)
    return InPlace(here, change, made.patches, made.spare)


def rename_in_place(path: AnyPath, edit: Edit, *, select: str | None = None) -> InPlace:
    """Rename keys in a file without writing another one; returns the plan that was carried out.

    See :func:`plan_in_place` for the arguments and errors.  A crash on the way leaves a journal beside the file, with
    which the next :func:`ckpt_surgeon.open` or :func:`ckpt_surgeon.recover` finishes it.

    >>> import ckpt_surgeon, torch
    >>> torch.save({"model": {"module.fc.bias": torch.ones(3)}, "epoch": 7}, "training.pth")
    >>> plan = ckpt_surgeon.rename_in_place("training.pth", ckpt_surgeon.step("strip_prefix"))
    >>> torch.load("training.pth")
    {'model': {'fc.bias': tensor([1., 1., 1.])}, 'epoch': 7}
    """
    planned = plan_in_place(path, edit, select=select)
    carry_out(planned)
    return replace(planned, written=True)


def _local(path: FilePath) -> LocalPath:
    assert path.local is not None  # index_of takes no other
    return path.local


def carry_out(planned: InPlace) -> None:
    """Do what :func:`plan_in_place` planned.  Raises FileError where the file has changed since or may not be written.

    >>> carry_out(InPlace(Path("as-it-is.pth"), Change(Checkpoint({}), Checkpoint({}), {}), (), 0))
    """
    if planned.patches:
        journal.apply(planned.path, planned.patches)


def _rewritten(index: Index, texts: Mapping[Hashable, str], names: Mapping[str, str], trail: Trail) -> Reindexed:
    """The rewritten index.  Raises NoRoom, which tells where else names are said, and so have to stay."""
    try:
        return index.rewritten(texts)
    except NoRoom as error:
        changed = {old for old, new in names.items() if old != new}
        also = _saying(index.contents.root, changed, trail[-1]) if trail else []
        why = f"because its names are also in {listed(also, 3)}, where they stay" if also else ""
        raise NoRoom(error.path, error.needed, error.room, why) from None


def _change(edit: Edit, checkpoint: Checkpoint) -> Change[Checkpoint]:
    """What an edit does; where it cannot, and a rename that was interrupted has been finished, that may be why."""
    try:
        return edit.plan(checkpoint)
    except EditError as error:
        for note in checkpoint.notes:
            if note.startswith(INTERRUPTED):
                error.inside(note)
        raise


def _names(path: Path, change: Change[Checkpoint]) -> dict[str, str]:
    """The new name of each key.  Raises FileError for a change that is more than names."""
    if change.dropped:
        raise FileError(path, f"dropping keys ({listed(change.dropped, 3)}) cannot be done in place", NEW_FILE)
    if change.edited:
        raise FileError(path, "only names can be changed in place, not tensors", NEW_FILE)
    names = {olds[0]: new for new, olds in change.origins.items()}
    return {old: names[old] for old in change.before}


def _modules(change: Change[Checkpoint]) -> dict[str, str]:
    """The new path of each module in torch's ``_metadata`` that stays: edits move the versions as they are."""
    paths = {id(version): path for path, version in (change.before.versions or {}).items()}
    return {paths[id(version)]: path for path, version in (change.result.versions or {}).items()}


# -- what a reader would find


def _problem(change: Change[Checkpoint], contents: Contents, select: str | None) -> str:
    """What is not as it was asked for in the checkpoint that the new index would give; empty where all is."""
    asked = change.result
    try:
        made = select_state_dict(contents, select)
    except SelectionError:
        return "with these names, it would be open which state_dict in it is meant"
    if made.selected != asked.selected:
        return f"with these names, {made.selected or 'the whole'!r} in it would be taken for the state_dict"
    if list(asked) != list(made):
        odd = next((f"{a!r} became {b!r}" for a, b in zip(asked, made, strict=False) if a != b), "keys are missing")
        return f"its index cannot be rewritten: {odd}"
    moved = [key for key in asked if _facts(asked[key]) != _facts(made[key])]
    if moved:
        return f"its index cannot be rewritten: {listed(moved)} would be other tensors"
    if _version_numbers(asked) != _version_numbers(made):
        return "torch's _metadata in it cannot follow the names"
    if [(left.what, left.nbytes) for left in asked.left_out] != [(left.what, left.nbytes) for left in made.left_out]:
        return "what lies beside its tensors would change"
    return ""


def _version_numbers(checkpoint: Checkpoint) -> dict[str, object]:
    return {module: version.get("version") for module, version in (checkpoint.versions or {}).items()}


def _first_difference(old: Value, new: Value, apart: Step) -> str | None:
    """The path of something that differs between two object trees, outside what one step leads to."""
    seen: set[tuple[int, int]] = set()
    ahead = [("", old, new)]
    while ahead:
        path, one, other = ahead.pop()
        if (id(one), id(other)) in seen:
            continue
        if isinstance(one, CONTAINERS):
            seen.add((id(one), id(other)))
        ours, theirs = list(_inside(one)), list(_inside(other))
        if _facts(one) != _facts(other) or [name for name, _ in ours] != [name for name, _ in theirs]:
            return path or "the rest"
        pairs = zip(ours, theirs, strict=True)
        ahead += [(joined_path(path, name), a, b) for (name, a), (_, b) in pairs if (id(one), name) != apart]
    return None


def _saying(root: Value, names: Collection[str], apart: Step) -> list[str]:
    """What of a file's outermost entries says some names, as keys or strings, outside what one step leads to."""
    found: dict[str, None] = {}
    seen: set[int] = set()
    ahead = [("", root)]
    while ahead:
        top, node = ahead.pop()
        if isinstance(node, str) and node in names:
            found[top] = None
        if not isinstance(node, CONTAINERS) or id(node) in seen:
            continue
        seen.add(id(node))
        for name, child in _inside(node):
            if (id(node), name) != apart:
                if name in names:
                    found[top or name] = None
                ahead.append((top or name, child))
    return sorted(found)


def _inside(node: Value) -> Iterator[tuple[str, Value]]:
    yield from children(node)
    if isinstance(node, Ordered) and node.attributes is not None:
        yield "(attributes)", node.attributes


def _facts(node: Value) -> tuple[object, ...]:
    """What is to be said of a node without its children."""
    if isinstance(node, StoredTensor):
        place = (node.stride, node.offset, node.storage.span, node.conjugate, node.negative)
        return (node.dtype, node.shape, node.device, *place)
    if isinstance(node, OpaqueTensor):
        return (node.dtype, node.shape, node.device, node.kind, *(_facts(node.local) if node.local else ()))
    if isinstance(node, ExtraState):
        return (node.kind, digest(node.value))
    if isinstance(node, TypedStorage):
        return (node.dtype, node.base, node.storage.span)
    if isinstance(node, Object):
        plain = [spelled(arg) for arg in node.args if not isinstance(arg, (*CONTAINERS, *TENSORS))]
        return (type(node), node.class_name, *plain)
    if isinstance(node, (set, frozenset)):
        return (type(node), *sorted(map(spelled, node)))
    if isinstance(node, CONTAINERS):
        return (type(node),)
    return (str, str(node)) if isinstance(node, str) else (type(node), repr(node))
