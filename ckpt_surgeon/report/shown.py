"""Which record has which text and which table: what ``str()`` and notebooks show."""

from __future__ import annotations

from ..edits.change import Change
from ..edits.recipe import Recipe
from ..models.align import Alignment
from ..models.check_rules import CheckRules
from ..models.checking import Check
from ..models.diff import Diff
from ..models.fit import Fit
from ..models.load_into import LoadReport
from ..reading.comparing import Hashes, StatsByKey, ValueDiff
from ..reading.listing import Listing, ls
from ..reading.scanning import Scan
from ..reading.sizes import Sizes
from ..runs.describe import Training, training_of
from ..runs.folder import RunFolder
from ..runs.resume_check import ResumeCheck
from ..runs.run import Run
from ..tensors.checkpoint import Checkpoint
from ..text import command, look
from ..training.freezing import Trainable
from ..training.grouping import ParamGroups
from ..training.initializing import Initialized
from ..writing.in_place import InPlace
from ..writing.plan import Plan
from . import notebook
from .alignments import alignment_text, fit_text
from .checks import check_html, checks_text, rules_html
from .differences import diff_text, hashes_text
from .listings import listing_text, scan_text, stats_text
from .outputs import change_rows, change_text, in_place_text, plan_line
from .pages import fragments
from .sizes import sizes_html, sizes_text
from .training_plans import groups_html, groups_text, initialized_html, initialized_text, trainable_html, trainable_text
from .trainings import folder_text, resume_html, resume_text, training_html, training_text
from .values import values_text


def register() -> None:
    """Give every record that has a text its text and its table."""
    _register_what_reads()
    _register_what_writes()
    look(Alignment, alignment_text, fragments.alignment_fragment)
    look(Fit, fit_text, fragments.fit_fragment)
    look(LoadReport, lambda report: fit_text(report.fit), notebook.load_html)
    look(Trainable, trainable_text, trainable_html)
    look(ParamGroups, groups_text, groups_html)
    look(Initialized, initialized_text, initialized_html)
    look(Training, training_text, training_html)
    look(Run, lambda run: training_text(training_of(run)), lambda run: training_html(training_of(run)))
    look(RunFolder, folder_text)
    look(ResumeCheck, resume_text, resume_html)


def _register_what_reads() -> None:
    look(
        Checkpoint,
        lambda checkpoint: listing_text(ls(checkpoint)),
        lambda checkpoint: fragments.listing_fragment(ls(checkpoint)),
    )
    look(Listing, listing_text, fragments.listing_fragment)
    look(Sizes, sizes_text, sizes_html)
    look(Scan, scan_text, notebook.scan_html)
    look(Diff, _diff_text, fragments.diff_fragment)
    look(ValueDiff, values_text, fragments.values_fragment)
    look(Hashes, hashes_text, notebook.hashes_html)
    look(Check, lambda found: checks_text([found]), check_html)
    look(CheckRules, CheckRules.dumps, rules_html)
    look(StatsByKey, stats_text, notebook.stats_html)


def _register_what_writes() -> None:
    look(Plan, plan_line, lambda plan: notebook.plan_html(plan, plan_line(plan)))
    look(InPlace, in_place_text, lambda plan: notebook.change_html(plan.change, change_rows(plan.change)))
    look(Change, change_text, lambda change: notebook.change_html(change, change_rows(change)))
    look(Recipe, Recipe.dumps)


def _diff_text(found: Diff) -> str:
    hint = command(*found.hint.command) if found.hint is not None else ""
    return diff_text(found, *found.names, hint=hint, has_values=found.has_values)
