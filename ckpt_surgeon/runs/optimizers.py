"""What optimizers keep for each parameter, and which of it follows when the parameter is edited.

The slots are those of ``torch.optim`` (torch 2.14), of transformers' Adafactor and of bitsandbytes; an optimizer is
recognised by the options in its groups and the slots in its state, since ``state_dict()`` does not say its class.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Optimizer:
    """One known kind: slots in the parameter's shape, slots of another shape, and options that only it has.

    ``elementwise`` says whether each element's update depends on that element alone: only then is the kept part of a
    parameter that was cut or grown proven to train on as it would have.  ``joint`` says that the state under the first
    id is that of all parameters together, in their order.
    """

    name: str
    shaped: frozenset[str]
    others: frozenset[str] = frozenset()
    options: frozenset[str] = frozenset()
    elementwise: bool = True
    joint: bool = False


def _kind(
    name: str, shaped: str, others: str = "", options: str = "", *, elementwise: bool = True, joint: bool = False
) -> Optimizer:  # fmt: skip
    first, second, third = (frozenset(text.split()) for text in (shaped, others, options))
    return Optimizer(name, first, second, third, elementwise, joint)


# The first that fits is taken: those with options of their own come first.
KNOWN = (
    _kind("Muon", "momentum_buffer", "", "ns_steps ns_coefficients", elementwise=False),
    _kind("LBFGS", "", "func_evals n_iter d t old_dirs old_stps ro H_diag prev_flat_grad prev_loss al",
          "history_size line_search_fn", elementwise=False, joint=True),
    _kind("Adafactor", "variance exp_avg exp_avg_sq", "step row_var col_var exp_avg_sq_row exp_avg_sq_col RMS",
          "beta2_decay", elementwise=False),
    _kind("Adafactor (transformers)", "exp_avg exp_avg_sq", "step exp_avg_sq_row exp_avg_sq_col RMS", "clip_threshold",
          elementwise=False),
    _kind("Shampoo", "momentum_buffer", "step precond inv_precond preconditioners", "update_freq", elementwise=False),
    _kind("NAdam", "exp_avg exp_avg_sq", "step mu_product", "momentum_decay"),
    _kind("Adadelta", "square_avg acc_delta", "step", "rho"),
    _kind("RMSprop", "square_avg momentum_buffer grad_avg", "step", "centered"),
    _kind("Adagrad", "sum", "step", "lr_decay"),
    _kind("Rprop", "prev step_size", "step", "etas step_sizes"),
    _kind("ASGD", "ax", "step eta mu", "lambd t0"),
    _kind("SGD", "momentum_buffer", "", "dampening nesterov"),
    _kind("Adamax", "exp_avg exp_inf", "step"),
    _kind("Adam", "exp_avg exp_avg_sq max_exp_avg_sq", "step"),
)  # fmt: skip

BITSANDBYTES = frozenset({"state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2", "__bnb_optimizer_quant_state__"})
_EIGHT_BIT = Optimizer("bitsandbytes", frozenset(), BITSANDBYTES | {"step"}, elementwise=False)


def kind_of(options: Iterable[str], slots: Iterable[str]) -> Optimizer | None:
    """The kind of optimizer that has these options and slots; None where none is known.

    >>> kind_of({"lr", "betas", "amsgrad"}, {"step", "exp_avg", "exp_avg_sq"}).name
    'Adam'
    >>> kind_of({"lr"}, {"secret"}) is None
    True
    """
    has, keeps = set(options), set(slots)
    if keeps & BITSANDBYTES:
        return _EIGHT_BIT
    for kind in KNOWN:
        if keeps <= kind.shaped | kind.others and kind.options <= has and (kind.options or keeps):
            return kind
    return None
