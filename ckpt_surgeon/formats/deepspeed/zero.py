"""ZeRO 1, 2 and 3: weights and optimizer of a DeepSpeed training, put together out of the files of all ranks.

The layouts are those that ``deepspeed/runtime/zero`` saves and ``deepspeed/utils/zero_to_fp32.py`` reads.  Here nothing
is unpickled but as data, and a tensor that lies in several files is read from them when it is written.

- ZeRO 1 and 2 flatten each param group; rank R's file has one contiguous part of the vector, in
  ``single_partition_of_fp32_groups[g]``.  One after another they are the group, its end padded.
- ZeRO 3 cuts every parameter of n elements: rank R has ⌈n / ranks⌉ of them, from R · ⌈n / ranks⌉ on, the end padded;
  they lie one after another in its ``fp32_flat_groups``.

``param_shapes`` beside the module gives names and shapes in that order.  The optimizer's slots lie as the weights do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

from ...errors import BrokenFile
from ...files.paths import FilePath, prefetch_heads
from ...text import plural
from ..contents import Contents
from ..pickle.values import Ordered, Value
from ..sharded import Reader
from .cut import stage_1_2, stage_3
from .files import ZeroFiles, files_in
from .model import AGAIN, Model, as_trained, buffers, frozen_parameters, in_order, model_of, tie
from .optimizer import optimizer_state

CONTAINER = "DeepSpeed ZeRO"
ENGINE = frozenset({  # entries that say how the parts fit, or that are empty
    "module", "param_shapes", "frozen_param_shapes", "frozen_param_fragments", "shared_params", "buffer_names",
    "optimizer",
})  # fmt: skip


def read(folder: FilePath, names: Sequence[str], read_file: Reader, *, salvage: bool = False) -> Contents:
    """Read the folder of one step: ``module`` (as trained), ``fp32`` and ``optimizer``, by the parameters' names.

    Raises BrokenFile where a rank's file is missing, or the parts do not make up the parameters; with ``salvage`` what
    is there of ZeRO 1 and 2 is the module alone.
    """
    files = files_in(folder, names)
    if not files.models:
        problem = "has the optimizer of a DeepSpeed training, and no file …_model_states.pt with the names of its parts"
        raise BrokenFile(folder, problem, "fetch that file too")
    prefetch_heads([folder / name for name in (*files.models.values(), *files.optimizers.values())])
    models = {rank: read_file(folder / name, salvage=salvage) for rank, name in sorted(files.models.items())}
    model = model_of(models[min(models)])
    try:
        root, count, optimizers = _joined(files, model, models, read_file, salvage=salvage)
        notes: tuple[str, ...] = ()
    except BrokenFile as error:
        if not salvage or files.is_stage_3 or not model.module:
            raise
        root, count, optimizers, notes = {}, 0, [], (f"fp32 and optimizer are lost: {error.problem}",)
    whole: dict[Value, Value] = {"module": root.pop("module", model.module), **root}
    container = f"{CONTAINER}-{3 if files.is_stage_3 else '1/2'}, {plural(count, 'rank')}" if count else CONTAINER
    return gathered(folder, container, whole, model, [*models.values(), *optimizers], notes)


def gathered(
    folder: FilePath, container: str, root: dict[Value, Value], model: Model, every: Sequence[Contents],
    notes: Iterable[str] = (),
) -> Contents:  # fmt: skip
    """The contents of a folder: what was put together, and the entries beside the module that are no part of it."""
    root |= {name: value for name, value in model.root.items() if name not in ENGINE and name not in root}
    return Contents(
        folder,
        container,
        root,
        notes=(*notes, *(note for contents in every for note in contents.notes)),
        globals=tuple(dict.fromkeys(name for contents in every for name in contents.globals)),
        globals_inside=lambda: chain.from_iterable(contents.globals_inside() for contents in every),
    )


def _joined(
    files: ZeroFiles, model: Model, models: Mapping[int, Contents], read_file: Reader, *, salvage: bool
) -> tuple[dict[Value, Value], int, list[Contents]]:
    """The entries that are put together, the number of ranks, and what the optimizer's files hold."""
    if not files.optimizers:
        problem = "has one rank's part of the module, and no file …_optim_states.pt, where the weights are"
        raise BrokenFile(files.folder, problem, "fetch the missing files")
    optimizers = [read_file(files.folder / name, salvage=salvage) for name in files.optimizers.values()]
    states = [_optimizer_of(contents) for contents in optimizers]
    ranks = _ranks(optimizers[0].path, states[0])
    files.check_count(ranks, of_optimizer=True)
    if files.is_stage_3:
        files.check_count(ranks, of_optimizer=False)
    key = "fp32_flat_groups" if files.is_stage_3 else "single_partition_of_fp32_groups"
    weights = [_list(contents.path, state.get(key), key) for contents, state in zip(optimizers, states, strict=True)]
    cut = stage_3(files.folder, model, weights) if files.is_stage_3 else stage_1_2(files.folder, model, weights)
    trained = cut.tensors(weights, "fp32 weights")
    frozen = frozen_parameters(model, models, ranks if files.is_stage_3 else 1)
    fp32 = in_order(model, {**buffers(model), **frozen, **trained})
    root: dict[Value, Value] = {"fp32": fp32}
    if files.is_stage_3:
        root["module"] = Ordered({name: as_trained(tensor, model.module.get(name)) for name, tensor in fp32.items()})
        tie(root["module"], model)
    name = "optimizer_state_dict" if files.is_stage_3 else "base_optimizer_state"
    root["optimizer"] = optimizer_state(model, cut, [state.get(name) for state in states])
    return root, ranks, optimizers


def _optimizer_of(contents: Contents) -> Mapping[Value, Value]:
    state = contents.root.get("optimizer_state_dict") if isinstance(contents.root, dict) else None
    if not isinstance(state, dict):
        raise BrokenFile(contents.path, "has no optimizer_state_dict", AGAIN)
    return state


def _ranks(path: FilePath, state: Mapping[Value, Value]) -> int:
    count = state.get("partition_count")
    counts = count if isinstance(count, list) else [count]
    known = [one for one in counts if type(one) is int and 0 < one <= 1 << 20]
    if not known or len(known) < len(counts):
        raise BrokenFile(path, "does not say over how many ranks it is cut (partition_count)", AGAIN)
    return max(known)


def _list(path: FilePath, found: Value, what: str) -> list[Value]:
    if isinstance(found, (list, tuple)):
        return list(found)
    raise BrokenFile(path, f"has no {what}", AGAIN)
