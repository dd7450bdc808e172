"""The command that checks files by rules: check."""

from __future__ import annotations

import click

from ..errors import OutputExists, listed
from ..files.paths import FilePath
from ..reading.opening import open as open_checkpoint
from ..text import document, plural, visible
from .options import FILE_PATH, SELECT, progress
from .terminal import echo, say_done

FORMATS = ("text", "json", "github", "junit")  # of report.checks, which is imported where something is checked


@click.command(short_help="Check files by rules: keys, shapes, values, size.")
@click.argument("paths", metavar="FILE...", type=FILE_PATH, nargs=-1, required=True)
@click.option("--rules", type=FILE_PATH, metavar="RULES", help="The rules that every FILE has to keep, in TOML.")
@click.option(
    "--write-rules",
    type=FILE_PATH,
    metavar="RULES",
    help="Write rules that FILE keeps and others of its model have to, instead.",
)
@click.option("--force", "-f", is_flag=True, help="With --write-rules: replace an existing file.")
@click.option(
    "--format",
    "as_format",
    type=click.Choice(FORMATS),
    default="text",
    show_default=True,
    help="What to print: text, JSON, annotations for GitHub's actions, or JUnit's XML for GitLab and Jenkins.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: the same as --format json.")
@click.option("--full", is_flag=True, help="List everything that breaks a rule, however much.")
@click.pass_context
def check(
    context: click.Context,
    paths: tuple[FilePath, ...],
    select: str | None,
    rules: FilePath | None,
    write_rules: FilePath | None,
    force: bool,
    as_format: str,
    as_json: bool,
    full: bool,
) -> None:
    """Check files by rules: format and size, keys, shapes and dtypes, values that are finite, pickles that name plain
    data alone, a strict load into a model.

    Everything that breaks a rule is listed, of every FILE.  Naming a model in the rules imports and runs that code of
    yours; a checkpoint runs nothing.

    Exit status: 0 when every FILE keeps every rule, 1 when not, 2 on trouble, also where a FILE cannot be read.

    \b
    Example:
      ckpt check model.pth --write-rules check.toml
      ckpt check model.pth downloaded.pth --rules check.toml
    """
    if (rules is None) == (write_rules is None):
        raise click.UsageError("give --rules to check by, or --write-rules to make some")
    if write_rules is not None:
        if as_json or full or as_format != "text":
            raise click.UsageError("--format, --json and --full go with --rules")
        _write(paths, write_rules, select, force=force)
        return
    if force:
        raise click.UsageError("--force goes with --write-rules")
    from ..models.check_rules import CheckRules
    from ..models.checking import check as check_file
    from ..report import checks

    assert rules is not None
    wanted = CheckRules.load(rules)
    found = []
    for path in paths:
        with progress(_bytes_to_read(path) if wanted.finite else 0, doing="checking") as tell:
            found.append(check_file(path, wanted, select=select, progress=tell))
    made = {"json": checks.checks_json, "github": checks.checks_github, "junit": checks.checks_junit}
    as_format = "json" if as_json else as_format
    echo(made[as_format](found) if as_format in made else checks.checks_text(found, full=full))
    if unread := [one for one in found if one.error]:
        names = listed([visible(str(one.path)) for one in unread])
        echo(f"ckpt: {plural(len(unread), 'file')} could not be checked: {names}", err=True)
    context.exit(2 if any(one.error for one in found) else 0 if all(one.passed for one in found) else 1)


def _bytes_to_read(path: FilePath) -> int:
    """About how many bytes will be read, for the bar alone; what cannot be told is told later, as trouble."""
    from ..errors import CheckpointError

    try:
        return path.size if path.local is not None and path.local.is_file() else 0
    except (OSError, CheckpointError, ValueError):
        return 0


def _write(paths: tuple[FilePath, ...], out: FilePath, select: str | None, *, force: bool) -> None:
    """Write rules that the only file keeps."""
    from ..models.check_rules import FORMATS, CheckRules

    if len(paths) > 1:
        raise click.UsageError("--write-rules takes one FILE")
    if out.lexists() and not force:
        raise OutputExists(out)
    checkpoint = open_checkpoint(paths[0], select=select)
    kinds = [name for name in FORMATS if checkpoint.container.startswith(name)]
    made = CheckRules.of(checkpoint.tensors, format=max(kinds, key=len, default=""))
    out.write_text(made.dumps(), "utf-8")
    say_done(document([f"wrote {out}: {plural(len(made.asked), 'rule')} for {plural(len(checkpoint), 'key')}"]))


check.params.append(SELECT)

command_of = {"check": check}.get
