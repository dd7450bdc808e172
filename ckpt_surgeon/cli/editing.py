"""One command per edit, made from the edit itself: its name, arguments and help are the edit's."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import cast

import click

from ..edits import change, recipe
from ..errors import FileError
from ..files import journal
from ..files.paths import FilePath, LocalPath
from ..formats import registry
from ..report import outputs
from ..writing import in_place
from . import torchrun
from .options import FILE_PATH, OPTIONAL_OUT, OUT, SOURCE, STAY, opened, output, output_options

# What only renames and so can be done in place, too.
IN_PLACE = ("strip_prefix", "add_prefix", "rename")

# What a new user can paste, after `ckpt NAME `.
EXAMPLES = {
    "strip_prefix": (
        "parallel.pth clean.pth",
        "compiled.pth clean.safetensors --wrappers",
        "--in-place training.ckpt",
    ),
    "add_prefix": ("backbone.pth wrapped.pth --prefix model.",),
    "rename": (
        "old.pth new.pth 'layers.{n}=blocks.{n+1}' 'gamma$=weight'",
        r"old.pth new.pth --regex '(.*)\.attn\.(\w+)=\1.attention.\2'",
    ),
    "keep": ("model.pth backbone.pth 'layer*.*' 'conv1.*'",),
    "drop": ("model.pth headless.pth 'fc.*' --derivable",),
    "select": ("moco.pth encoder.pth --prefix encoder_q.",),
    "cast": ("model.safetensors half.safetensors --dtype bf16 --except '*norm*'",),
    "reshape": ("vgg.pth fcn.pth 'classifier.0.weight' --shape 4096,512,7,7",),
    "transpose": ("gpt2.pth linear.pth '*.c_attn.weight'",),
    "slice": ("model.pth cut.pth 'fc.*' --start 0 --stop 10",),
    "pad": ("model.pth padded.pth 'embed.weight' --after 2",),
    "concat": ("model.pth fused.pth --sources 'l.{n}.q,l.{n}.k,l.{n}.v' --into 'l.{n}.qkv'",),
    "split": ("model.pth parts.pth --source 'l.{n}.qkv' --into 'l.{n}.q,l.{n}.k,l.{n}.v'",),
    "scale": ("model.pth scaled.pth 'logit_scale' --factor 0.5",),
    "fold": ("vocoder.pth plain.pth",),
    "resize_rows": ("llm.pth grown.pth 'embed_tokens.weight' 'lm_head.weight' --rows 32002 --fill mean",),
    "map_classes": ("model.pth mapped.pth 'fc.*' --old cat,dog,bird --new dog,fish --fill zero",),
    "resize_channels": ("rgb.pth grey.pth 'conv1.weight' --channels 1 --mode sum",),
    "resize_grid": ("vit.pth large.pth 'pos_embed' --grid 14x14:24x24 --prefix-tokens 1",),
    "resize_bias_table": ("swin.pth large.pth '*relative_position_bias_table' --window 7x7:12x12",),
}

# What `ckpt --help` says of each.
SAID = {
    "strip_prefix": "Take module. and other prefixes off the keys.",
    "add_prefix": "Put a prefix in front of the keys.",
    "rename": "Rename keys by components, indices, patterns.",
    "keep": "Keep some keys only.",
    "drop": "Drop some keys.",
    "select": "Take one sub-tree, its prefix stripped.",
    "cast": "Convert to another dtype.",
    "reshape": "Give tensors another shape.",
    "transpose": "Permute dimensions.",
    "slice": "Take some indices of a dimension.",
    "pad": "Add indices to a dimension.",
    "concat": "Join tensors (q, k, v into qkv).",
    "split": "Take tensors apart (qkv into q, k, v).",
    "scale": "Multiply by a factor.",
    "fold": "Fold weight norm, spectral norm, masks.",
    "resize_rows": "Cut or pad rows (vocabularies, class heads).",
    "map_classes": "Reorder a head's rows by class name.",
    "resize_channels": "Change the input channels of convolutions.",
    "resize_grid": "Interpolate position embeddings.",
    "resize_bias_table": "Interpolate relative-position tables.",
}

OPTION_HELP = {
    "allow_unmatched": "A pattern or prefix that no key answers to is no error.",
    "on_collision": "Which key stays when two become one: error (default), first, last.",
    "wrappers": "Peel every known wrapper (module, _orig_mod …), anywhere in the keys.",
    "regex": "OLD is a regular expression for whole keys, NEW may have its groups.",
    "derivable": "Also drop the buffers that models make themselves (num_batches_tracked …).",
    "integers": "Cast integer and bool tensors too.",
    "statistics": "Cast running means and variances to float16 too.",
    "allow_inf": "Values that become inf are no error.",
    "only": "Only keys that match this glob (repeatable).",
    "except": "No key that matches this glob (repeatable).",
    "groups": "Interleave in so many groups (attention heads).  [default: 1]",
    "dim": "The dimension.  [default: 0]",
    "dims": "The new order of the dimensions, as 0,2,1.  [default: swap the two of a matrix]",
    "shape": "The new shape, as 4096,512,7,7; one size may be -1.",
    "sizes": "The parts' sizes, as 64,64,128.  [default: equal]",
    "fill": "What new rows get: zero, mean, normal.",
    "rows": "How many rows there should be.",
    "old": "The class names in the order of the rows, comma-separated.",
    "new": "The class names in the order that is wanted.",
    "mode": "resize-channels: sum, mean, repeat, copy; resize-grid: bicubic, bilinear.",
    "grid": "OLD:NEW, as 14x14:32x32.",
    "window": "OLD:NEW, as 7x7:12x12.",
    "prefix_tokens": "Class tokens in front of the grid.  [default: 0]",
    "seed": "Of the random fill.  [default: 0]",
    "dtype": "bf16, fp16, fp32 or any torch dtype.",
}


def _integers(_context: click.Context, _option: click.Parameter, value: str | None) -> list[int] | None:
    if value is None:
        return None
    try:
        return [int(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list of integers; write it like 64,3,7,7") from None


def _names(_context: click.Context, _option: click.Parameter, value: str | None) -> list[str] | None:
    return value.split(",") if value is not None else None


def _option(name: str, parameter: inspect.Parameter) -> click.Parameter:
    """The option or arguments for one parameter of an edit."""
    kind = parameter.annotation
    required = parameter.default is inspect.Parameter.empty
    said = OPTION_HELP.get(name)
    flag = "--" + name.replace("_", "-")
    if name in ("patterns", "pairs"):
        return click.Argument([name], nargs=-1, metavar="[OLD=NEW]..." if name == "pairs" else "[PATTERN]...")
    if kind == "bool":
        return click.Option([flag, name], is_flag=True, help=said)
    if kind == "Patterns":
        shown = f"[default: {parameter.default}]" if parameter.default else ""
        return click.Option([flag, name], multiple=True, metavar=name.upper(), help=said or f"Repeatable.  {shown}")
    if kind == "Sequence[int]":
        return click.Option([flag, name], metavar="N,N", callback=_integers, required=required, help=said)
    if kind == "Sequence[str]":
        return click.Option([flag, name], metavar="KEY,KEY", callback=_names, required=required, help=said)
    types: dict[str, click.ParamType | type] = {"int": int, "float": float, "str": str}  # type: ignore[type-arg,unused-ignore]
    return click.Option([flag, name], type=types[kind], required=required, help=said)


def _command(name: str) -> click.Command:
    """The command for one edit."""
    found = change.EDITS[name]
    parameters = recipe.parameters(name)
    takes_lists = bool({"patterns", "pairs"} & set(parameters))
    options = [_option(argument, parameter) for argument, parameter in parameters.items()]
    arguments = [one for one in options if isinstance(one, click.Argument)]
    others = [one for one in options if isinstance(one, click.Option)]
    if takes_lists:
        others.insert(0, click.Option(["--from", "from_file"], type=FILE_PATH, metavar="FILE",
                                      help="Read more of them from a file, one a line."))  # fmt: skip

    can_stay = name in IN_PLACE

    def run(from_file: FilePath | None = None, in_place: bool = False, **values: object) -> None:
        if from_file is not None:
            _extend(values, from_file)
        if in_place:
            _run_in_place(name, values)
            return
        if values["out"] is None:
            raise click.UsageError("Missing argument 'OUT'; give it, or --in-place.")
        written, checkpoint = output(values), opened(values)
        written.write(_step(name, values).plan(checkpoint))

    shown = "\n".join(f"  ckpt {name.replace('_', '-')} {example}" for example in EXAMPLES[name])
    return click.Command(
        name.replace("_", "-"),
        params=[
            SOURCE,
            OUT if not can_stay else OPTIONAL_OUT,
            *arguments,
            *others,
            *([STAY] if can_stay else []),
            *output_options(),
        ],
        callback=run,
        short_help=SAID[name],
        help=f"{_summary(found)}\n\n\b\nExample:\n{shown}",
    )


def _step(name: str, values: dict[str, object]) -> recipe.Step:
    return recipe.step(name, **{key: value for key, value in values.items() if value not in (None, ())})


def _run_in_place(name: str, values: dict[str, object]) -> None:
    """Rename in IN itself; what stands where OUT would is the first pair of ``rename``, or one too many."""
    taken = {option: values.pop(option) for option in ("in_path", "out", "select", "dry_run", "quiet")}
    refused = [option for option in ("force", "salvage", "max_shard_size", "threads") if values.pop(option)]
    if refused:
        raise click.UsageError(f"--in-place and --{refused[0].replace('_', '-')} exclude each other")
    if taken["out"] is not None:
        given = values.get("pairs")
        if not isinstance(given, tuple) or "=" not in str(taken["out"]):
            raise click.UsageError("--in-place changes IN itself: give OUT or --in-place, not both")
        values["pairs"] = (taken["out"], *given)
    if torchrun.rank() > 0:  # of several processes, one does it
        return
    where, select = taken["in_path"], taken["select"]
    planned = in_place.plan_in_place(
        cast(FilePath, where), _step(name, values), select=None if select is None else str(select)
    )
    if taken["dry_run"]:
        click.echo(outputs.in_place_plan_text(planned))
        return
    in_place.carry_out(planned)
    if not taken["quiet"]:
        click.echo(outputs.in_place_summary(planned))


def _extend(values: dict[str, object], path: FilePath) -> None:
    """Add the lines of a file to the patterns or pairs; empty lines and ``#`` comments are skipped."""
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(path, f"cannot be read ({error})", "check the name") from error
    listed = [line for line in lines if line and not line.startswith("#")]
    name = "pairs" if "pairs" in values else "patterns"
    given = values[name]
    assert isinstance(given, tuple)
    values[name] = (*given, *listed)


def _summary(found: Callable[..., object]) -> str:
    """The docstring without its examples, its errors and its markup, as Click wraps it."""
    text = inspect.cleandoc(found.__doc__ or "").partition(">>>")[0]
    text = re.sub(r"Raises [^.]*\.", "", text)
    return re.sub(r"``|:\w+:|`", "", text).strip()


def _convert() -> click.Command:
    def run(**values: object) -> None:
        written, checkpoint = output(values), opened(values)
        written.write(change.rekeyed(checkpoint, {key: key for key in checkpoint}))

    text = """Write any checkpoint as .pth, .safetensors or .dcp, by OUT's extension; only the weights, all on the cpu.

    A .dcp is a folder for torch.distributed.checkpoint.

    \b
    Example:
      ckpt convert training.ckpt model.safetensors
      ckpt convert model.safetensors model.pth
      ckpt convert big.pth big.safetensors --max-shard-size 5GB
    """
    return click.Command(
        "convert",
        short_help="Write .pth, .safetensors or .dcp from anything.",
        params=[SOURCE, OUT, *output_options()],
        callback=run,
        help=inspect.cleandoc(text),
    )


@click.command(short_help="Finish a rename in place that was interrupted.")
@click.argument("path", metavar="FILE", type=click.Path(path_type=LocalPath))
@click.option("--roll-back", is_flag=True, help="Take it back instead.")
def recover(path: LocalPath, roll_back: bool) -> None:
    """Finish a rename in place that was interrupted; any other command on the file does so, too.

    \b
    Example:
      ckpt recover training.ckpt
      ckpt recover training.ckpt --roll-back
    """
    if not path.exists():
        raise FileError(path, "does not exist", "check the name")
    outcome = journal.recover(registry.located(path), roll_back=roll_back)
    said = {"finished": "the rename in place is finished", "rolled back": "rolled back, it is as it was before"}
    click.echo(f"{path}: {said[outcome] if outcome else 'nothing to recover'}")


COMMANDS = {name.replace("_", "-"): _command(name) for name in EXAMPLES} | {
    "convert": _convert(),
    "recover": recover,
}
