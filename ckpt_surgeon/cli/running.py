"""Commands on training checkpoints as a whole: set, resume-check."""

from __future__ import annotations

from dataclasses import replace

import click

from ..files.paths import FilePath
from .options import FILE_PATH, OUT, SELECT, SOURCE, Output, progress
from .terminal import echo, say_done


@click.command("set", params=[SOURCE, OUT], short_help="Set single values of a training checkpoint.")
@click.argument("values", metavar="PATH=VALUE...", nargs=-1, required=True)
@click.option("--dry-run", "-n", is_flag=True, help="Print what would be set, write nothing.")
@click.option("--force", "-f", is_flag=True, help="Replace an existing OUT; OUT may be IN.")
@click.option("--quiet", "-q", is_flag=True, help="Print nothing unless something is wrong.")
def set_(
    in_path: FilePath,
    out: FilePath,
    values: tuple[str, ...],
    select: str | None,
    dry_run: bool,
    force: bool,
    quiet: bool,
) -> None:
    """Set single values of a training checkpoint, and keep everything else: epochs, learning rates, arguments.

    A PATH is dotted, * stands for one of its parts; a VALUE is spelled as in TOML (0, 1e-4, true, "text"; a bare
    word is text, none is None) and has to have the type of what was there.

    \b
    Example:
      ckpt set last.ckpt from0.ckpt epoch=0 'optimizer.param_groups.*.lr=1e-4'
    """
    from ..report import trainings
    from ..runs.opening import open_run_file
    from ..runs.saving import plan_run
    from ..runs.values import with_values
    from ..writing import write

    run = with_values(open_run_file(in_path, select=select), values)
    run = replace(run, weights=replace(run.weights, part=""))  # the file stays what it is, be it a part
    planned = plan_run(run, out, force=force or dry_run)
    asked = Output(out, dry_run, force, None, None, quiet)
    if not asked.dry_run:
        with progress(planned.nbytes, asked.quiet) as tell:
            write.write(planned, progress=tell)
    if not asked.quiet:
        say_done(trainings.values_set_text(run, out, was_written=not dry_run))


@click.command("resume-check", short_help="Prove that training goes on after an edit.")
@click.argument("before", type=FILE_PATH)
@click.argument("after", type=FILE_PATH)
@click.argument("factory", metavar="FILE.py:FACTORY")
@click.option("--steps", type=click.IntRange(1), default=5, show_default=True, help="How many steps to train.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def resume_check(
    context: click.Context,
    before: FilePath,
    after: FilePath,
    factory: str,
    select: str | None,
    steps: int,
    as_json: bool,
) -> None:
    """Resume both files by torch's own loading, train on the same gradients, and compare bit for bit.

    FACTORY builds what AFTER is resumed in: it takes nothing and returns (model, optimizer).  Naming it imports and
    runs that code of yours.

    Exit status: 0 when everything that both files have goes on as it was, 1 when not, 2 on trouble.

    \b
    Example:
      ckpt resume-check last.ckpt clean.ckpt train.py:make_run
    """
    from ..report import trainings
    from ..runs.resume_check import resume_check as check

    found = check(before, after, factory, steps=steps, select=select)
    echo(trainings.resume_json(found) if as_json else trainings.resume_text(found))
    context.exit(0 if found.holds else 1)


set_.params.append(SELECT)
resume_check.params.append(SELECT)

command_of = {"set": set_, "resume-check": resume_check}.get
