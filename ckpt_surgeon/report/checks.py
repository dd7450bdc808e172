"""What ``ckpt check`` says: for people, as JSON, as commands of GitHub's workflows, as JUnit's XML.

Names and messages come from files.  Whatever is written for another reader is escaped by that reader's rules, after
:func:`~ckpt_surgeon.text.visible` has left nothing in it that acts on a terminal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..key_patterns import FEW
from ..safe_text import url_without_secrets
from ..text import Lines, as_json, document, html, plural, styled, table, visible

if TYPE_CHECKING:
    from ..models.check_rules import CheckRules
    from ..models.checking import BrokenRule, Check

FORMATS = ("text", "json", "github", "junit")


def checks_text(found: Sequence[Check], *, full: bool = False) -> Lines:
    """A verdict for each file, and below it all that breaks a rule; without ``full``, a dozen lines for each rule."""
    lines: list[str] = []
    for one in found:
        lines += [""] * bool(lines) + [styled(_verdict(one), "good" if one.passed else "bad")]
        if one.broken:
            rows = [(each.rule, each.key, each.message) for each in _shown(one, full)]
            lines.append(table(["rule", "key", "what is wrong"], rows).indented())
    return document(lines)


def _verdict(one: Check) -> str:
    if one.error:
        return f"{one.path}: not checked; {one.error}"
    if one.broken:
        return f"{one.path}: {len({each.rule for each in one.broken}):,} of {plural(len(one.rules), 'rule')} broken"
    return f"{one.path}: keeps {plural(len(one.rules), 'rule')}"


def _shown(one: Check, full: bool) -> list[BrokenRule]:
    """What breaks rules, the first of each; the rest as one line."""
    from ..models.checking import BrokenRule

    found: list[BrokenRule] = []
    for rule in one.rules:
        broken = [each for each in one.broken if each.rule == rule]
        cut = len(broken) if full or len(broken) <= FEW else FEW - 1
        found += broken[:cut]
        if len(broken) > cut:
            found.append(BrokenRule(rule, f"… and {len(broken) - cut:,} more (--full lists all)"))
    return found


def check_html(found: Check) -> str:
    """The table as a notebook shows it."""
    rows = [(each.rule, each.key, each.message) for each in _shown(found, full=False)]
    return html(["rule", "key", "what is wrong"], rows, _verdict(found))


def rules_html(rules: CheckRules) -> str:
    """A row for each rule that is asked for, as a notebook shows it."""
    return html(["rule", "asks"], [(name, shown) for name, shown in rules.summary()])


def checks_json(found: Sequence[Check]) -> Lines:
    """What ``ckpt check --format json`` prints."""
    files = [
        {
            "path": str(one.path),
            "passed": one.passed,
            "rules": list(one.rules),
            "broken": [
                {"rule": each.rule, "message": each.message} | ({"key": each.key} if each.key else {})
                for each in one.broken
            ],
            "error": one.error or None,
        }
        for one in found
    ]
    return as_json("check", {"passed": all(one.passed for one in found), "files": files})


# -- GitHub


def checks_github(found: Sequence[Check]) -> Lines:
    """Workflow commands: an annotation for everything that breaks a rule, and a line for each file that keeps all.

    The form is that of https://docs.github.com/actions/reference/workflow-commands-for-github-actions.
    """
    lines: list[Lines] = []
    for one in found:
        if one.error:
            lines.append(_command(one, "ckpt check", one.error))
        lines += [_command(one, each.rule, _said(each)) for each in one.broken]
        if one.passed:
            lines.append(Lines(_data(_verdict(one))))
    return document(lines)


def _command(one: Check, title: str, message: str) -> Lines:
    return Lines(f"::error file={_property(str(one.path))},title={_property(title)}::{_data(message)}")


def _said(each: BrokenRule) -> str:
    return f"{each.key}: {each.message}" if each.key else each.message


def _data(text: str) -> str:
    """A text behind ``::``.  One that stands at the beginning of a line must be no command itself."""
    shown = visible(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return f" {shown}" if shown.lstrip().startswith(("::", "##[")) else shown


def _property(text: str) -> str:
    """A value between ``::NAME`` and ``::``, where colons and commas end it."""
    return _data(url_without_secrets(text)).replace(":", "%3A").replace(",", "%2C")


# -- JUnit


def checks_junit(found: Sequence[Check]) -> Lines:
    """JUnit's XML: a test suite for each file, a test case for each rule, a failure for all that breaks it.

    The elements and attributes are those that Jenkins, GitLab and GitHub's readers share.
    """
    from xml.etree import ElementTree

    suites = ElementTree.Element("testsuites", {"name": "ckpt check"})
    for one in found:
        path = _xml(url_without_secrets(str(one.path)))
        broken = {rule: [each for each in one.broken if each.rule == rule] for rule in one.rules}
        cases = {} if one.error else broken
        counts = {
            "tests": len(cases) + bool(one.error),
            "failures": sum(map(bool, cases.values())),
            "errors": int(bool(one.error)),
            "skipped": 0,
        }
        suite = ElementTree.SubElement(suites, "testsuite", {"name": path, **{k: str(v) for k, v in counts.items()}})
        if one.error:
            case = ElementTree.SubElement(suite, "testcase", {"classname": path, "name": "can be read", "time": "0"})
            message = _xml("\n".join([one.error, *(f"{each.rule}: {_said(each)}" for each in one.broken)]))
            ElementTree.SubElement(case, "error", {"message": _xml(one.error), "type": "error"}).text = message
        for rule, each in cases.items():
            case = ElementTree.SubElement(suite, "testcase", {"classname": path, "name": rule, "time": "0"})
            if each:
                first = {"message": _xml(_said(each[0])), "type": rule}
                ElementTree.SubElement(case, "failure", first).text = "\n".join(_xml(_said(one)) for one in each)
    ElementTree.indent(suites)
    text = ElementTree.tostring(suites, encoding="unicode")
    return Lines(f'<?xml version="1.0" encoding="utf-8"?>\n{text}')


def _xml(text: str) -> str:
    """A text of characters that XML allows: those that are escaped for a terminal are the others, and a few more."""
    return "\n".join(visible(line) for line in text.split("\n")).replace("\ufffe", "?").replace("\uffff", "?")
