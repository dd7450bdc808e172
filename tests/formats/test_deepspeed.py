"""A folder of DeepSpeed's is one checkpoint: weights as trained, fp32 weights, the optimizer by the parameters' names.

``fixtures/deepspeed`` was made by DeepSpeed, with what its own scripts make of it (fixtures/make_deepspeed.py); other
folders are made here by the same layout.
"""

from __future__ import annotations

import shutil
import tracemalloc
from collections import OrderedDict
from math import ceil
from pathlib import Path

import pytest
import torch
from command_line import Run
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import assert_same

import ckpt_surgeon
from ckpt_surgeon.errors import BrokenFile, CheckpointError, NotACheckpoint

MADE = Path(__file__).parents[2] / "fixtures" / "deepspeed"
NAMES = ["zero1", "zero2", "zero3", "zero3_float"]
SLOTS = ("exp_avg", "exp_avg_sq")
State = dict[str, torch.Tensor]


def loaded(path: Path, select: str | None = None) -> State:
    return dict(ckpt_surgeon.load(ckpt_surgeon.open(path, select=select)))


def copied(name: str, to: Path) -> Path:
    return Path(shutil.copytree(MADE / name, to / name)) / "global_step2"


# -- what DeepSpeed made


@pytest.mark.parametrize("name", NAMES)
def test_the_fp32_weights_are_those_that_zero_to_fp32_makes(name: str) -> None:
    found, expected = loaded(MADE / name, "fp32"), torch.load(MADE / f"{name}.fp32.pth")
    if name == "zero1":  # the script forgets frozen parameters of ZeRO 1
        assert found.pop("stem.weight").dtype == torch.bfloat16
    assert_same(found, expected, order=False, ties=False)
    opened = ckpt_surgeon.open(MADE / name, select="fp32")
    assert opened["head.weight"].tie == opened["embed.weight"].tie


@pytest.mark.parametrize("name", ["zero3", "zero3_float"])
def test_the_weights_of_zero_3_are_those_that_save_16bit_model_gathers(name: str) -> None:
    assert_same(loaded(MADE / name), torch.load(MADE / f"{name}.16bit.pth"), ties=False)


@pytest.mark.parametrize("name", ["zero1", "zero2"])
def test_the_weights_of_zero_1_and_2_are_the_module_of_their_file(name: str) -> None:
    file = MADE / name / "global_step2" / "mp_rank_00_model_states.pt"
    assert_same(loaded(MADE / name), loaded(file))
    assert not ckpt_surgeon.open(MADE / name).part


@pytest.mark.parametrize(("name", "universal"), [("zero1", "zero1_universal"), ("zero3", "zero3_universal")])
def test_the_slots_are_those_that_ds_to_universal_cuts_out(name: str, universal: str) -> None:
    found = loaded(MADE / name, "optimizer")
    folder = MADE / universal / "global_step2_universal" / "zero"
    names = [path.name for path in folder.iterdir() if (path / "exp_avg.pt").exists()]
    assert len(names) == 6
    for key in names:
        for slot in SLOTS:
            expected = torch.load(folder / key / f"{slot}.pt")
            expected = expected["param"] if isinstance(expected, dict) else expected
            assert torch.equal(found[f"state.{key}.{slot}"].flatten(), expected.flatten())
        assert found[f"state.{key}.step"].item() == 2


@pytest.mark.parametrize(("name", "universal"), [("zero1", "zero1_universal"), ("zero3", "zero3_universal")])
@pytest.mark.parametrize("select", ["module", "fp32", "optimizer"])
def test_a_universal_checkpoint_is_what_it_was_made_of(name: str, universal: str, select: str) -> None:
    assert_same(loaded(MADE / universal, select), loaded(MADE / name, select), order=False, ties=False)


def test_a_universal_checkpoint_that_lacks_a_weight_names_it(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(MADE / "zero3_universal", tmp_path / "u")) / "global_step2_universal"
    (folder / "zero" / "fc.bias" / "fp32.pt").unlink()
    with pytest.raises(BrokenFile, match=r"fc\.bias: has no fp32\.pt"):
        ckpt_surgeon.open(folder)
    shutil.rmtree(folder / "zero" / "fc.bias")
    with pytest.raises(BrokenFile, match=r"lacks 1 parameter: 'fc\.bias'"):
        ckpt_surgeon.open(folder)
    torch.save(torch.zeros(3), folder / "zero" / "fc.weight" / "exp_avg.pt")
    (folder / "zero" / "fc.bias").mkdir()
    torch.save(torch.zeros(6), folder / "zero" / "fc.bias" / "fp32.pt")
    with pytest.raises(BrokenFile, match=r"exp_avg\.pt: has 3 elements, and its parameter is \[6, 5\]"):
        ckpt_surgeon.open(folder)


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_the_whole_run_is_written_with_the_optimizer_by_name(name: str, ckpt: Run, tmp_path: Path) -> None:
    out = tmp_path / "run.pth"
    ran = ckpt("convert", "--whole", MADE / name, out)
    assert ran.status == 0
    assert "nor is the engine's loss scaler" in ran.out + ran.err
    assert "bit for bit" not in ran.out + ran.err
    run = torch.load(out)
    assert run["epoch"] == 3
    assert_same(run["fp32"], loaded(MADE / name, "fp32"), order=False)
    assert_same(run["module"], loaded(MADE / name), order=False)
    groups = run["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.01]
    assert groups[0]["params"] == ["embed.weight", "fc.weight"]
    slots = loaded(MADE / name, "optimizer")
    assert torch.equal(run["optimizer"]["state"]["fc.bias"]["exp_avg"], slots["state.fc.bias.exp_avg"])
    shown = ckpt("ls", "--training", MADE / name).out
    assert "2 groups, 6 parameters; ids told by its ids are names" in shown


def test_classes_of_deepspeed_are_named_by_scan_and_imported_by_nothing(ckpt: Run) -> None:
    assert "deepspeed.runtime" in ckpt("scan", MADE / "zero3").out


# -- which folder


def test_a_folder_of_steps_is_the_step_that_latest_names(tmp_path: Path) -> None:
    step = copied("zero2", tmp_path)
    shutil.copytree(step, step.parent / "global_step9")
    assert str(ckpt_surgeon.open(step.parent).path) == str(step)
    (step.parent / "latest").write_text("global_step7")
    with pytest.raises(NotACheckpoint, match="names 'global_step7', which is not there"):
        ckpt_surgeon.open(step.parent)
    (step.parent / "latest").write_bytes(b"\xff\xfe" * 5000)
    with pytest.raises(NotACheckpoint, match="which is not there"):
        ckpt_surgeon.open(step.parent)
    (step.parent / "latest").unlink()
    with pytest.raises(NotACheckpoint, match=r"2 steps .*name one: 'global_step2', 'global_step9'"):
        ckpt_surgeon.open(step.parent)


def test_weights_beside_the_steps_are_what_their_folder_means(tmp_path: Path) -> None:
    step = copied("zero2", tmp_path)
    torch.save({"w": torch.ones(2)}, step.parent / "pytorch_model.bin")
    opened = ckpt_surgeon.open(step.parent)
    assert list(opened) == ["w"]
    assert any(f"{step} is the training that these weights are of" in note for note in opened.notes)


def test_folders_that_lead_to_each_other_are_refused(ckpt: Run, tmp_path: Path) -> None:
    (tmp_path / "global_step1").symlink_to(tmp_path, target_is_directory=True)
    ran = ckpt("ls", tmp_path)
    assert (ran.status, ran.err.count("\n")) == (2, 1)
    assert "without end" in ran.err


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["mp_rank_01_model_states.pt", "zero_pp_rank_0_mp_rank_01_optim_states.pt"], "2 model-parallel ranks"),
        (["layer_00-model_00-model_states.pt"], "pipeline stages or experts"),
    ],
)
def test_layouts_that_are_not_joined_are_named(names: list[str], words: str, tmp_path: Path) -> None:
    step = copied("zero2", tmp_path)
    for name in names:
        (step / name).touch()
    with pytest.raises(NotACheckpoint, match=words):
        ckpt_surgeon.open(step)


# -- what does not fit


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_float"])
def test_a_missing_rank_is_named(name: str, tmp_path: Path) -> None:
    step = copied(name, tmp_path)
    path = next(step.glob("*zero_pp_rank_1_*_optim_states.pt"))
    path.unlink()
    with pytest.raises(BrokenFile, match=rf"of the files of \d ranks; missing: '{path.name}'"):
        ckpt_surgeon.open(step)


def test_a_missing_part_of_the_module_is_named(tmp_path: Path) -> None:
    step = copied("zero3", tmp_path)
    (step / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(BrokenFile, match=r"missing: .zero_pp_rank_1_mp_rank_00_model"):
        ckpt_surgeon.open(step)


def test_the_module_of_zero_2_can_be_had_without_the_optimizer(tmp_path: Path) -> None:
    step = copied("zero2", tmp_path)
    next(step.glob("*rank_1*optim*")).unlink()
    opened = ckpt_surgeon.open(step, salvage=True)
    assert any("fp32 and optimizer are lost" in note for note in opened.notes)
    assert_same(dict(ckpt_surgeon.load(opened)), loaded(MADE / "zero2"))


def test_a_file_of_another_save_is_named(tmp_path: Path) -> None:
    step = copied("zero2", tmp_path)
    name = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"
    shutil.copy(step / name.format(1), step / name.format(2))
    with pytest.raises(BrokenFile, match=f"saved by 2 ranks and has '{name.format(2)}' too"):
        ckpt_surgeon.open(step)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    step = copied("zero3", tmp_path)
    path = next(step.glob("*rank_1*optim*"))
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(BrokenFile, match=path.name):
        ckpt_surgeon.open(step)


# -- folders made by the layout


def folder_of(weights: State, ranks: int, stage: int, folder: Path, *, groups: int = 1, lying: int = 0) -> Path:
    """What a training of some ranks leaves, with ``exp_avg`` twice the weights; ``lying`` elements are not there."""
    names = [list(weights)[number::groups] for number in range(groups)]
    shapes = [OrderedDict((name, weights[name].shape) for name in group) for group in names]
    shared = {"buffer_names": [], "shared_params": {}, "param_shapes": shapes, "ds_version": "0.14"}
    module = {name: tensor.half() if stage < 3 else torch.empty(0).half() for name, tensor in weights.items()}
    if stage < 3:
        torch.save({"module": module, **shared}, folder / "mp_rank_00_model_states.pt")
    for rank in range(ranks):
        if stage == 3:
            torch.save({"module": module, **shared}, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        flats = [part([weights[name] for name in group], rank, ranks, stage) for group in names]
        flats = [one[: max(len(one) - lying, 0)] for one in flats]
        slots = {number: {"step": torch.tensor(3.0), "exp_avg": 2 * flat} for number, flat in enumerate(flats)}
        inner = {"state": slots, "param_groups": [{"lr": 0.5, "params": [number]} for number in range(groups)]}
        key, base = (("fp32_flat_groups", "optimizer_state_dict") if stage == 3
                     else ("single_partition_of_fp32_groups", "base_optimizer_state"))  # fmt: skip
        state = {key: flats, base: inner, "partition_count": ranks if stage == 3 else [ranks] * groups}
        torch.save({"optimizer_state_dict": state}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return folder


def part(tensors: list[torch.Tensor], rank: int, ranks: int, stage: int) -> torch.Tensor:
    """Rank R's elements of a group: a slice of all, or a slice of each."""
    if stage < 3:
        whole = torch.cat([tensor.flatten() for tensor in tensors])
        share = ceil(len(whole) / (2 * ranks)) * 2
        return torch.cat([whole, torch.zeros(share * ranks - len(whole))])[rank * share : (rank + 1) * share].clone()
    pieces = []
    for tensor in tensors:
        share = ceil(tensor.numel() / ranks)
        padded = torch.cat([tensor.flatten(), torch.zeros(share * ranks - tensor.numel())])
        pieces.append(padded[rank * share : (rank + 1) * share])
    return torch.cat(pieces)


def weights_of(shapes: list[tuple[int, ...]]) -> State:
    made: State = {}
    for number, shape in enumerate(shapes):
        made[f"layer.{number}.weight"] = torch.arange(float(torch.Size(shape).numel())).reshape(shape) + 100 * number
    return made


SHAPES = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=2, max_size=5)


@settings(max_examples=12, deadline=None)
@given(shapes=SHAPES, ranks=st.integers(1, 5), stage=st.sampled_from([2, 3]), groups=st.integers(1, 2))
def test_parameters_of_any_shape_come_back_from_any_number_of_ranks(
    shapes: list[tuple[int, ...]], ranks: int, stage: int, groups: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    weights = weights_of(shapes)
    folder = folder_of(weights, ranks, stage, tmp_path_factory.mktemp("zero"), groups=groups)
    assert_same(loaded(folder, "fp32"), weights, order=False)
    assert_same(loaded(folder), {name: tensor.half() for name, tensor in weights.items()}, order=False, ties=False)
    slots = ckpt_surgeon.open(folder, select="optimizer")
    for name, tensor in weights.items():
        assert torch.equal(slots[f"state.{name}.exp_avg"].load(), 2 * tensor)


@pytest.mark.parametrize("stage", [2, 3])
def test_parts_that_do_not_sum_up_are_refused(stage: int, ckpt: Run, tmp_path: Path) -> None:
    folder_of(weights_of([(40, 3), (7,)]), 2, stage, tmp_path, lying=20)
    ran = ckpt("ls", tmp_path)
    assert (ran.status, ran.err.count("\n")) == (2, 1)
    assert "do not sum up" in ran.err


@pytest.mark.parametrize("change", [
    {"param_shapes": None}, {"param_shapes": [{"w": (-1,)}]}, {"param_shapes": [{"w": (1 << 62, 8)}]},
    {"param_shapes": [{"w": "wide"}]}, {"param_shapes": [{}, {}]}, {"frozen_param_shapes": {"f": (4,)}},
])  # fmt: skip
@pytest.mark.parametrize("stage", [2, 3])
def test_a_file_that_lies_about_its_parameters_is_refused(
    change: dict[str, object], stage: int, tmp_path: Path
) -> None:
    folder_of(weights_of([(4, 3)]), 2, stage, tmp_path)
    for path in tmp_path.glob("*model_states.pt"):
        torch.save({**torch.load(path), **change}, path)
    with pytest.raises(CheckpointError):
        ckpt_surgeon.open(tmp_path, select="fp32")


@pytest.mark.parametrize("change", [
    {"partition_count": 0}, {"partition_count": "two"}, {"partition_count": 1 << 40}, {"partition_count": [1, "x"]},
    {"fp32_flat_groups": None}, {"fp32_flat_groups": [torch.zeros(6, 2)]}, {"fp32_flat_groups": ["x"]},
    {"fp32_flat_groups": []}, {"optimizer_state_dict": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
])  # fmt: skip
def test_an_optimizers_file_that_lies_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    folder_of(weights_of([(4, 3)]), 2, 3, tmp_path)
    for path in tmp_path.glob("*optim_states.pt"):
        state = torch.load(path)["optimizer_state_dict"]
        torch.save({"optimizer_state_dict": {**state, **change}}, path)
    with pytest.raises(BrokenFile):
        ckpt_surgeon.open(tmp_path)


def test_joining_takes_little_memory(tmp_path: Path) -> None:
    folder = folder_of({"layer.0.weight": torch.ones(8 << 20)}, 4, 3, tmp_path)
    tracemalloc.start()
    ckpt_surgeon.convert(ckpt_surgeon.open(folder, select="fp32"), tmp_path / "out.safetensors")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20  # of 32 MiB
    assert torch.equal(ckpt_surgeon.load(tmp_path / "out.safetensors")["layer.0.weight"], torch.ones(8 << 20))
