"""Which record has which text: what ``str()`` and notebooks show."""

from __future__ import annotations

from ..models.load_into import LoadReport
from ..runs.describe import Training
from ..runs.resume_check import ResumeCheck
from ..text import look
from ..training.freezing import Trainable
from ..training.grouping import ParamGroups
from ..training.initializing import Initialized
from .alignments import fit_text
from .training_plans import groups_html, groups_text, initialized_html, initialized_text, trainable_html, trainable_text
from .trainings import resume_html, resume_text, training_html, training_text


def register() -> None:
    """Give every record that has a text its text and its table."""
    look(LoadReport, lambda report: fit_text(report.fit))
    look(Trainable, trainable_text, trainable_html)
    look(ParamGroups, groups_text, groups_html)
    look(Initialized, initialized_text, initialized_html)
    look(Training, training_text, training_html)
    look(ResumeCheck, resume_text, resume_html)
