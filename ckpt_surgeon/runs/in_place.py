"""Renaming keys of a run where they lie: the weights' keys, and every name that the optimizers have for them."""

from __future__ import annotations

from ..edits.change import Change
from ..errors import NEW_FILE, FileError, listed
from ..files.paths import AnyPath
from ..formats.pickle import graph_writer
from ..formats.zip import torch_zip
from ..formats.zip.whole import FreshStorage, storages_of
from ..reading.opening import index_of
from ..reading.selecting import select_state_dict
from ..tensors.checkpoint import Checkpoint
from ..writing.in_place import Edit, InPlace
from .opening import open_run_file
from .run import Run


def plan_run_in_place(path: AnyPath, edit: Edit, *, select: str | None = None) -> InPlace:
    """Plan to rename keys in a file of torch.save and in the optimizers beside them, without writing another file.

    ``param_names``, ids that are names, and twins with the same keys follow; everything else stays as it is.  Raises
    FileError where more than names would change or the new index needs more room than the old one has.

    >>> import ckpt_surgeon, torch
    >>> layer = torch.nn.Linear(2, 2)
    >>> model = torch.nn.ModuleDict({"module": layer})
    >>> optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    >>> torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "last.ckpt")
    >>> from ckpt_surgeon.writing.in_place import carry_out
    >>> carry_out(plan_run_in_place("last.ckpt", ckpt_surgeon.step("strip_prefix")))
    >>> torch.load("last.ckpt")["optimizer"]["param_groups"][0]["param_names"]
    ['weight', 'bias']
    """
    index = index_of(path)
    local = index.contents.path.local
    if not isinstance(index, torch_zip.Index) or local is None:
        raise FileError(index.contents.path, "is no file of torch.save, so there is no run in it", "leave out --whole")
    run, change = open_run_file(path, select=select).edited(edit.plan)
    _refuse_more_than_names(run, change)
    made = index.with_pickle(graph_writer.written(run.whole.root, instead=run.instead()))
    found = select_state_dict(made.contents, run.weights.selected or ".")
    if list(found) != list(run.weights):
        raise FileError(local, "would not read back as planned", NEW_FILE)
    return InPlace(local, change, made.patches if change.renamed else (), made.spare)


def _refuse_more_than_names(run: Run, change: Change[Checkpoint]) -> None:
    if change.dropped:
        raise FileError(
            run.whole.path, f"dropping keys ({listed(change.dropped, 3)}) cannot be done in place", NEW_FILE
        )
    if any(isinstance(node, FreshStorage) for node in storages_of(run.whole.root, run.instead())):
        raise FileError(run.whole.path, "only names can be changed in place, not tensors", NEW_FILE)
