"""Edits as options of ``ckpt edit``: the forms that edits declare, and the steps that their values stand for."""

from __future__ import annotations

import re
from collections.abc import Mapping

import click

from ..edits.change import EDITS, Edit, Inline
from ..edits.recipe import Step, step
from .editing import metavar_of

_FIELD = re.compile(r"\{(\w+)\}")


def forms() -> Mapping[str, tuple[Edit[...], Inline]]:
    """Every option, ``--`` apart, with its edit and its form."""
    return {form.option or edit.name: (edit, form) for edit in EDITS.values() for form in _forms_of(edit)}


def _forms_of(edit: Edit[...]) -> tuple[Inline, ...]:
    """The forms of an edit; one that declares none takes its first argument."""
    if edit.declaration.inline:
        return edit.declaration.inline
    first = next(iter(edit.arguments.values()), None)
    return (Inline(f"{{{first.name}}}" if first else ""),)


def parameter_name(option: str) -> str:
    """The name of an option's value among a command's parameters."""
    return "edit_" + option.replace("-", "_")


def options() -> list[click.Option]:
    """The options of all edits."""
    return [_option(option, edit, form) for option, (edit, form) in forms().items()]


def _option(option: str, edit: Edit[...], form: Inline) -> click.Option:
    text = form.help or edit.declaration.short_help
    if not form.form:
        return click.Option([f"--{option}", parameter_name(option)], count=True, help=text)
    words = {argument.name: metavar_of(argument) for argument in edit.arguments.values()}
    metavar = _FIELD.sub(lambda field: words[field[1]], form.form)
    needed = [
        argument
        for argument in edit.arguments.values()
        if argument.is_required and f"{{{argument.name}}}" not in form.form
    ]
    metavar = " ".join([metavar, *(f"{argument.name}={metavar_of(argument)}" for argument in needed)])
    return click.Option(
        [f"--{option}", parameter_name(option)], multiple=True, metavar=repr(metavar) if needed else metavar, help=text
    )


def step_of(option: str, text: str) -> Step:
    """The step that an option and its value stand for.  Raises UsageError for a value of another form.

    >>> step_of("slice", "fc.*=0:10 dim=1").arguments
    {'patterns': 'fc.*', 'start': 0, 'stop': 10, 'dim': 1}
    """
    edit, form = forms()[option]
    known = {argument.name: argument for argument in edit.arguments.values()}
    main, *others = re.split(rf"\s+({'|'.join(map(re.escape, known))})=", text)
    texts = {**_fields(form.form, main, option), **dict(zip(others[::2], others[1::2], strict=True))}
    values = dict(form.fixed)
    for name, given in texts.items():
        try:
            values[name] = known[name].kind.from_text(given)
        except ValueError as error:
            raise click.UsageError(f"--{option}: {name} should be {known[name].kind.title}, not {given!r}") from error
    return step(edit.name, **values)


def _fields(form: str, text: str, option: str) -> dict[str, str]:
    """The texts of a form's arguments; each ends at the first separator behind it."""
    separators = _FIELD.sub("\0", form).split("\0")
    pattern = "(.+?)".join(map(re.escape, separators))
    found = re.fullmatch(pattern, text, re.DOTALL)
    if found is None:
        raise click.UsageError(
            f"--{option}: {text!r} is not of the form {_FIELD.sub(lambda field: field[1].upper(), form)}"
        )
    return dict(zip(_FIELD.findall(form), found.groups(), strict=True))
