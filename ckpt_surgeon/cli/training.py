"""Commands that show how a model would be trained, without training anything: freeze-plan, groups."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import TargetError
from ..models.targets import build
from ..report import training_plans
from ..training.freezing import NORMS
from ..training.freezing import freeze as freeze_model
from ..training.grouping import OVERLAPS, param_groups
from ..training.rules import Rules
from .terminal import echo

if TYPE_CHECKING:
    import torch

_NORM = click.option("--norm", type=click.Choice(NORMS), help="What the running statistics of frozen BatchNorm do: "
                     "eval, they stay; train, they move.")  # fmt: skip
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _model(target: str) -> torch.nn.Module:
    """The model that a target names, without values where it allows that."""
    import torch

    built = build(target)
    if not isinstance(built, torch.nn.Module):
        raise TargetError(target, "is a state_dict", remedy="give a model, whose modules can be told apart")
    return built


@click.command("freeze-plan", short_help="Show what freezing would leave trainable.")
@click.argument("target")
@click.argument("what", nargs=-1, metavar="[SELECTOR]...")
@click.option("--except", "except_", multiple=True, metavar="SELECTOR", help="Stays trainable (repeatable).")
@_NORM
@_JSON
def freeze_plan(target: str, what: tuple[str, ...], except_: tuple[str, ...], norm: str | None, as_json: bool) -> None:
    """Show what of a model is trained once some of it is frozen (without a SELECTOR, all of it).

    A SELECTOR is a key or a glob on keys, module:PATH, class:NAME, role:bias, role:norm, role:head or role:backbone;
    one that chooses nothing is an error.  It is ckpt_surgeon.freeze of Python, and trains nothing.

    \b
    Example:
      ckpt freeze-plan 'torchvision.models:resnet18()' --except 'fc.*' --norm eval
      ckpt freeze-plan 'torchvision.models:resnet18()' class:BatchNorm2d --norm eval
    """
    found = freeze_model(_model(target), what or "*", except_=except_, norm=norm)
    echo(training_plans.trainable_json(found) if as_json else str(found))


@click.command(short_help="Show the parameter groups that rules make.")
@click.argument("target")
@click.option("--rules", type=click.Path(path_type=Path), metavar="FILE", help="The rules, as TOML.")
@click.option("--lr", type=float, help="The base learning rate, instead of the file's.")
@click.option("--weight-decay", type=float, help="The base weight decay, instead of the file's.")
@click.option("--layer-decay", type=float, help="The factor for each layer towards the input, 0 to 1.")
@click.option("--on-overlap", type=click.Choice(OVERLAPS), help="Which rule holds where several catch a parameter.")
@click.option("--freeze", "frozen", multiple=True, metavar="SELECTOR", help="Freeze this before (repeatable).")
@_NORM
@_JSON
def groups(
    target: str,
    rules: Path | None,
    lr: float | None,
    weight_decay: float | None,
    layer_decay: float | None,
    on_overlap: str | None,
    frozen: tuple[str, ...],
    norm: str | None,
    as_json: bool,
) -> None:
    """Show the parameter groups that an optimizer would get: learning rates, weight decay, and what each holds.

    Rules are [[group]] tables with name, match (selectors, see ckpt freeze-plan), lr and weight_decay, each a number
    or a multiple of the base like '10x'; above them lr, weight_decay, layer_decay, layers, only, on_overlap.  It is
    ckpt_surgeon.param_groups of Python, and trains nothing.

    \b
    Example:
      ckpt groups 'torchvision.models:resnet18()' --rules rules.toml
      ckpt groups 'torchvision.models:vit_b_16()' --lr 1e-3 --layer-decay 0.75
    """
    model = _model(target)
    if frozen:
        freeze_model(model, frozen, norm=norm)
    found = param_groups(
        model,
        Rules.load(rules) if rules else (),
        lr=lr,
        weight_decay=weight_decay,
        layer_decay=layer_decay,
        on_overlap=on_overlap,
    )
    echo(training_plans.groups_json(found) if as_json else str(found))


command_of = {"freeze-plan": freeze_plan, "groups": groups}.get
