"""Commands on a checkpoint and a model: align, fit."""

from __future__ import annotations

import math

import click

from ..edits.kernels import INFLATE_MODES, KERNEL_MODES
from ..edits.recipe import Recipe, Step, step
from ..edits.resize import ANTIALIAS, CHANNEL_MODES, FILLS
from ..errors import FileError, OutputExists
from ..files import small
from ..files.paths import FilePath, file_path
from ..models.adapting import norm_eps
from ..models.align import CERTAINTIES
from ..models.align import align as align_checkpoint
from ..models.align_recipe import alignment_recipe, commented
from ..models.fit import INITIALISATIONS, POLICIES
from ..models.fit import fit as fit_checkpoint
from ..models.targets import is_model, refuse_misspelled, resolve
from ..reading.opening import open as open_checkpoint
from ..report import alignments
from ..tensors.records import Shaped
from ..text import command, document, plural
from . import torchrun
from .options import FILE_PATH, OUT, SELECT, SOURCE, output_options
from .pictures import HTML, files_of, refuse_own, refuse_page, write_page
from .terminal import echo
from .whole import whole_options, work_of


@click.command(short_help="Find the renames that fit a checkpoint to a model.")
@click.argument("checkpoint", type=FILE_PATH)
@click.argument("target")
@click.option("--out", "-o", type=FILE_PATH, metavar="RECIPE", help="Write the recipe to a file.")
@click.option("--force", "-f", is_flag=True, help="Replace an existing recipe, or page.")
@click.option(
    "--min-certainty",
    type=click.Choice(CERTAINTIES),
    default="likely",
    show_default=True,
    help="The least certainty of what the recipe renames.",
)
@click.option(
    "--source",
    metavar="MODEL",
    help="The model that the checkpoint was saved from, spelled as TARGET is: both are run, which proves keys.",
)
@click.option("--full", is_flag=True, help="List every key, however many.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def align(
    context: click.Context,
    checkpoint: FilePath,
    target: str,
    select: str | None,
    out: FilePath | None,
    force: bool,
    min_certainty: str,
    source: str | None,
    full: bool,
    as_json: bool,
    html: FilePath | None,
) -> None:
    """Propose the renames that turn a checkpoint's keys into those of a model or of another checkpoint.

    Every proposal has its reason and its certainty: certain where names say so and nothing else fits, likely where
    order and structure fit all round, possible where only the shape does.  Where several keys fit equally well, the
    choice is left open.  The recipe is what ckpt apply runs: review it first.

    With --source, copies of both models are run with random weights on the same random input.  Proven is a key where
    the target, filled with the source's weights, gives the same output: renamed, reshaped, fused or taken apart.

    Exit status: 0 when every key of the target is settled, 1 when some are open or missing, 2 on trouble.

    \b
    Example:
      ckpt align resnet50.pth 'models.py:Regrouped()' -o recipe.toml
      ckpt apply recipe.toml resnet50.pth regrouped.pth
      ckpt align resnet50.pth 'models.py:Regrouped()' --source torchvision.models:resnet50
      ckpt align resnet50.pth 'models.py:Regrouped()' --html names.html
    """
    if source is not None and not (is_model(source) and is_model(target)):
        raise click.UsageError("--source runs two models: give it and TARGET as package.module:factory or timm:NAME")
    if out is not None and not force and out.lexists():
        raise OutputExists(out)
    refuse_page(html, force=force and html is not None, beside=[checkpoint, target, *filter(None, [out])])
    if not is_model(target):
        refuse_misspelled(target)
    ours = open_checkpoint(checkpoint, select=select)
    refuse_own(html, files_of(ours))
    theirs: dict[str, Shaped] = dict(resolve(target)) if is_model(target) else dict(open_checkpoint(target))
    found = align_checkpoint(ours, theirs, source_model=source, target_model=target).at_least(min_certainty)
    echo(alignments.alignment_json(found) if as_json else alignments.alignment_text(found, full=full))
    if out is not None:
        recipe = alignment_recipe(found, ours)
        small.write_text(out, commented(recipe, found))
        if not as_json:
            what = f"{plural(len(recipe.steps), 'edit')}; run: {command('apply', out, checkpoint, 'OUT')}"
            echo(document(["", f"wrote {out}: {what}"]))
    if html is not None:
        from ..report.pages.fits import alignment_page

        title = f"{checkpoint.name} → {_short(target)}"
        write_page(html, alignment_page(found, title=title, keys=ours), say=not as_json)
    context.exit(0 if found.complete else 1)


def _short(target: str) -> str:
    """How a page's title calls a target."""
    return target.rpartition(":")[2] if is_model(target) else file_path(target).name


def _adaptations(
    rows: tuple[tuple[str, str], ...],
    classes: tuple[tuple[str, str], ...],
    channels: tuple[tuple[str, int], ...],
    grids: tuple[tuple[str, str], ...],
    tables: tuple[tuple[str, str], ...],
    kernels: tuple[tuple[str, str], ...],
    inflated: tuple[tuple[str, int], ...],
    *,
    fill: str,
    mode: str,
    prefix_tokens: int,
    antialias: str,
    kernel_mode: str,
    inflate_mode: str,
) -> Recipe | None:
    """The edits that the options for shapes ask for."""
    steps: list[Step] = [step("resize_rows", patterns=key, **_counts(counts), fill=fill) for key, counts in rows]
    for key, files in classes:
        old, colon, new = files.partition(":")
        if not colon:
            raise click.UsageError(f"--class-map takes OLD.txt:NEW.txt, not {files!r}")
        steps.append(step("map_classes", patterns=key, old=_lines(old), new=_lines(new), fill=fill))
    steps += [step("resize_channels", patterns=key, channels=count, mode=mode) for key, count in channels]
    steps += [
        step("resize_grid", patterns=key, grid=grid, prefix_tokens=prefix_tokens, antialias=antialias)
        for key, grid in grids
    ]
    steps += [step("resize_bias_table", patterns=key, window=window) for key, window in tables]
    steps += [step("resize_kernel", patterns=key, size=size, mode=kernel_mode) for key, size in kernels]
    steps += [step("inflate", patterns=key, frames=frames, mode=inflate_mode) for key, frames in inflated]
    return Recipe(tuple(steps)) if steps else None


def _counts(text: str) -> dict[str, object]:
    """The rows wanted, and those that there are: 32002, 32000:32002."""
    old, colon, new = text.rpartition(":")
    if not new.isdecimal() or (colon and not old.isdecimal()):
        raise click.UsageError(f"--rows takes a number of rows or OLD:NEW, not {text!r}")
    return {"rows": int(new), "old": int(old)} if colon else {"rows": int(new)}


def _prepared(recipe: FilePath | None, eps: str | None) -> Recipe | None:
    """What is done before keys are renamed: a recipe, then folding norms with an eps, or with that of a model."""
    steps = list(Recipe.load(recipe).steps) if recipe else []
    if eps is not None:
        try:
            number = float(eps)
        except ValueError:
            number = norm_eps(eps) if is_model(eps) else math.nan
        if math.isnan(number):
            raise click.UsageError(f"--fold-norm takes an eps as 1e-5, or the model that IN is of, not {eps!r}")
        steps.append(step("fold_norm", eps=number))
    return Recipe(tuple(steps)) if steps else None


def _lines(path: str) -> list[str]:
    try:
        return [line.strip() for line in file_path(path).read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(path, f"cannot be read ({error})", "give a text file with one class name a line") from error


def _fit(
    target: str,
    recipe: FilePath | None,
    no_align: bool,
    min_certainty: str,
    on_mismatch: str,
    allow_missing: tuple[str, ...],
    allow_codes: bool,
    min_match: float,
    seed: int,
    full: bool,
    as_json: bool,
    rows: tuple[tuple[str, str], ...],
    class_map: tuple[tuple[str, str], ...],
    channels: tuple[tuple[str, int], ...],
    grid: tuple[tuple[str, str], ...],
    bias_table: tuple[tuple[str, str], ...],
    kernel: tuple[tuple[str, str], ...],
    inflate: tuple[tuple[str, int], ...],
    fill: str,
    mode: str,
    prefix_tokens: int,
    antialias: str,
    kernel_mode: str,
    inflate_mode: str,
    prepare: FilePath | None,
    fold_norm: str | None,
    html: FilePath | None,
    **values: object,
) -> None:
    if html is not None and values["dry_run"]:
        raise click.UsageError("--html writes a page, --dry-run writes nothing: leave one of them out")
    beside = [values["in_path"], target, values["out"], *filter(None, [recipe, prepare])]
    refuse_page(html, force=bool(values["force"]) and html is not None, beside=beside)
    title = str(values["in_path"])
    work = work_of(values)
    refuse_own(html, files_of(work.checkpoint))
    work.out.refuse_existing()
    found = fit_checkpoint(
        work.checkpoint,
        target,
        recipe=Recipe.load(recipe) if recipe else None,
        adapt=_adaptations(
            rows,
            class_map,
            channels,
            grid,
            bias_table,
            kernel,
            inflate,
            fill=fill,
            mode=mode,
            prefix_tokens=prefix_tokens,
            antialias=antialias,
            kernel_mode=kernel_mode,
            inflate_mode=inflate_mode,
        ),
        prepare=_prepared(prepare, fold_norm),
        align=not no_align,
        min_certainty=min_certainty,
        on_mismatch=on_mismatch,
        allow_missing=allow_missing,
        allow_codes=allow_codes,
        min_match=min_match,
        seed=seed,
    )
    report = ""
    if torchrun.rank() == 0 and not work.out.quiet:
        report = alignments.fit_json(found) if as_json else alignments.fit_text(found, full=full)
    work.fit(found, report=report, say=not as_json)
    if html is not None and torchrun.rank() == 0:
        from ..report.pages.fits import fit_page

        write_page(html, fit_page(found, title=f"{title} → {_short(target)}"), say=not (as_json or work.out.quiet))


fit = click.Command(
    "fit",
    params=[
        SOURCE,
        click.Argument(["target"]),
        OUT,
        click.Option(["--recipe"], type=FILE_PATH, metavar="FILE", help="Renames; instead of align."),
        click.Option(["--prepare"], type=FILE_PATH, metavar="FILE",
                     help="A recipe that is done first, before keys are aligned (stack, sum …)."),
        click.Option(["--fold-norm"], metavar="EPS|MODEL",
                     help="Fold batch norms first, with this eps or that of the model that IN was saved from."),
        click.Option(["--min-certainty"], type=click.Choice(CERTAINTIES), default="certain", show_default=True,
                     help="The least certainty of a rename that is done."),
        click.Option(["--no-align"], is_flag=True, help="Rename nothing: the keys are the model's already."),
        click.Option(["--on-mismatch"], type=click.Choice([*POLICIES, *INITIALISATIONS]), default="error",
                     show_default=True, help="Keys of another shape: drop keeps the model's own initialisation."),
        click.Option(["--allow-missing"], multiple=True, metavar="GLOB", help="Keys that may be missing (repeatable)."),
        click.Option(["--allow-codes"], is_flag=True,
                     help="Take codes of quantised weights without their scales as plain numbers."),
        click.Option(["--min-match"], type=float, default=0.0, metavar="SHARE",
                     help="Least share of parameters (0 to 1) that has to come from IN."),
        click.Option(["--rows"], type=(str, str), multiple=True, metavar="GLOB [OLD:]NEW", help="Cut or pad rows."),
        click.Option(["--class-map"], type=(str, str), multiple=True, metavar="GLOB OLD.txt:NEW.txt",
                     help="Reorder a head's rows by class name."),
        click.Option(["--fill"], type=click.Choice(FILLS), default="error", show_default=True,
                     help="What new rows get; error refuses to make any."),
        click.Option(["--channels"], type=(str, int), multiple=True, metavar="GLOB N",
                     help="Change input channels."),
        click.Option(["--mode"], type=click.Choice(("error", *CHANNEL_MODES)), default="error", show_default=True,
                     help="How --channels makes the new ones."),
        click.Option(["--grid"], type=(str, str), multiple=True, metavar="GLOB 14x14:32x32",
                     help="Interpolate position embeddings; auto reads square grids from IN and the model."),
        click.Option(["--prefix-tokens"], type=int, default=0, help="Class tokens in front of the grid."),
        click.Option(["--antialias"], type=click.Choice(ANTIALIAS), default="shrinking", show_default=True,
                     help="When --grid antialiases: timm always, transformers never."),
        click.Option(["--bias-table"], type=(str, str), multiple=True, metavar="GLOB 7x7:12x12",
                     help="Interpolate relative-position tables; auto reads square windows from IN and the model."),
        click.Option(["--kernel"], type=(str, str), multiple=True, metavar="GLOB 32x32",
                     help="Resize patch embeddings; auto is the model's size."),
        click.Option(["--kernel-mode"], type=click.Choice(KERNEL_MODES), default=KERNEL_MODES[0], show_default=True,
                     help="How --kernel resizes: by pseudo-inverse, or as a picture."),
        click.Option(["--inflate"], type=(str, int), multiple=True, metavar="GLOB T",
                     help="Inflate 2D convolutions to T frames; 0 is the model's number."),
        click.Option(["--inflate-mode"], type=click.Choice(INFLATE_MODES), default=INFLATE_MODES[0], show_default=True,
                     help="Where --inflate has the kernel: in every frame, or in the middle one."),
        click.Option(["--seed"], type=int, default=0, help="Of everything that is drawn."),
        click.Option(["--full"], is_flag=True, help="List every key, dropped ones too."),
        click.Option(["--json", "as_json"], is_flag=True, help="Print JSON."),
        HTML,
        *output_options(),
        *whole_options(),
    ],
    callback=_fit,
    short_help="Write a checkpoint that loads strictly into a model.",
    help="""Fit a checkpoint to a model: find the renames, settle every shape, prove that it loads strictly, write it.

Every missing, unused and mismatched key is settled by a stated policy, never silently; the outcome is a table.
TARGET is a model as package.module:factory or path/file.py:factory, timm:NAME, torchvision:NAME or hf:FOLDER; naming
it runs that code.

\b
Example:
  ckpt fit imagenet.pth 'torchvision.models:resnet18(num_classes=10)' fitted.pth --on-mismatch drop
  ckpt fit vit.pth 'models.py:vit_384()' large.pth --grid pos_embed 14x14:24x24 --prefix-tokens 1
  ckpt fit vit.pth 'models.py:vit_384()' large.pth --grid pos_embed auto --antialias always
  ckpt fit imagenet.pth 'torchvision.models:resnet18(num_classes=10)' fitted.pth --on-mismatch drop --html fit.html
""",
)  # fmt: skip
align.params += [SELECT, HTML]

command_of = {"align": align, "fit": fit}.get
