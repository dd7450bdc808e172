"""Extra states of modules: kept by every container of torch's, whatever they hold, under the keys that edits give."""

import io
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import Run

import ckpt_surgeon
from ckpt_surgeon.tensors.extra_state import digest

VALUES: dict[str, Callable[[], object]] = {
    "dict": lambda: {"amax": torch.ones(2), "recipe": "delayed", "scale": {"fwd": [1.5, None], "n": -(1 << 70)}},
    "bytes": lambda: bytes(range(256)) * 40,
    "BytesIO": lambda: io.BytesIO(b"state" * 1000),
    "tensor": lambda: torch.arange(5),
    "None": lambda: None,
    "list": lambda: [1, (2.5, {"a"}), torch.float16, torch.device("cuda:0"), 1 + 2j, bytearray(b"q"), frozenset({3})],
    "ordered": lambda: OrderedDict(a=torch.zeros(2, 3, dtype=torch.bfloat16), b=True),
}


class Layer(torch.nn.Linear):
    """A module with a state of its own, as TransformerEngine's have."""

    def __init__(self, state: object) -> None:
        super().__init__(3, 2)
        self.state = state

    def get_extra_state(self) -> object:
        return self.state

    def set_extra_state(self, state: object) -> None:
        self.state = state


def model_with(state: object) -> torch.nn.Module:
    return torch.nn.ModuleDict({"fc": Layer(state)})


def same(one: object, other: object) -> bool:
    """Whether two values of extra states are equal, tensors and buffers by what they hold."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, io.BytesIO) and isinstance(other, io.BytesIO):
        return one.getvalue() == other.getvalue()
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@pytest.fixture(params=VALUES)
def state(request: pytest.FixtureRequest) -> object:
    return VALUES[request.param]()


def saved(state: object, tmp_path: Path) -> Path:
    path = tmp_path / "wrapped.pt"
    torch.save({f"module.{key}": value for key, value in model_with(state).state_dict().items()}, path)
    return path


def test_a_torch_zip_keeps_it_under_its_new_key_and_torch_loads_it_strictly(state: object, tmp_path: Path) -> None:
    edited = ckpt_surgeon.strip_prefix(ckpt_surgeon.open(saved(state, tmp_path)))
    ckpt_surgeon.save(edited, tmp_path / "o.pth")
    model = model_with("nothing yet")
    model.load_state_dict(torch.load(tmp_path / "o.pth", weights_only=False), strict=True)
    assert same(model["fc"].get_extra_state(), state)  # type: ignore[index]


def test_a_distributed_checkpoint_keeps_it_as_torch_reads_it(state: object, tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    edited = ckpt_surgeon.strip_prefix(ckpt_surgeon.open(saved(state, tmp_path)))
    ckpt_surgeon.save(edited, tmp_path / "o.dcp")
    dcp_to_torch_save(tmp_path / "o.dcp", tmp_path / "back.pt")
    assert same(torch.load(tmp_path / "back.pt", weights_only=False)["fc._extra_state"], state)
    assert same(ckpt_surgeon.load(tmp_path / "o.dcp")["fc._extra_state"], state)


def test_in_place_renames_its_key(state: object, tmp_path: Path) -> None:
    path = saved(state, tmp_path)
    ckpt_surgeon.rename_in_place(path, ckpt_surgeon.step("strip_prefix"))
    model = model_with("nothing yet")
    model.load_state_dict(torch.load(path, weights_only=False), strict=True)
    assert same(model["fc"].get_extra_state(), state)  # type: ignore[index]


def test_load_gives_what_torch_gives_and_a_state_dict_in_memory_is_edited_too(state: object, tmp_path: Path) -> None:
    path = saved(state, tmp_path)
    assert same(
        ckpt_surgeon.load(path)["module.fc._extra_state"],
        torch.load(path, weights_only=False)["module.fc._extra_state"],
    )
    plain = model_with(state).state_dict()
    assert ckpt_surgeon.cast(plain, "bf16")["fc._extra_state"] is plain["fc._extra_state"]
    ckpt_surgeon.save(plain, tmp_path / "plain.pth")
    assert same(torch.load(tmp_path / "plain.pth", weights_only=False)["fc._extra_state"], state)


def test_load_into_gives_it_to_the_model(state: object, tmp_path: Path) -> None:
    model = model_with("nothing yet")
    ckpt_surgeon.load_into(model, saved(state, tmp_path))
    assert same(model["fc"].get_extra_state(), state)  # type: ignore[index]


def test_diff_counts_it_as_torch_does(state: object, tmp_path: Path) -> None:
    path = tmp_path / "plain.pt"
    torch.save(model_with(state).state_dict(), path)
    opened = ckpt_surgeon.open(path)
    assert ckpt_surgeon.diff(opened, model_with(None)).loadable
    without = ckpt_surgeon.drop(opened, "*_extra_state")
    assert ckpt_surgeon.diff(without, model_with(None)).missing == ("fc._extra_state",)
    assert ckpt_surgeon.diff(opened, torch.nn.ModuleDict({"fc": torch.nn.Linear(3, 2)})).unused == ("fc._extra_state",)


def test_it_is_listed_with_what_it_is(tmp_path: Path, ckpt: Run) -> None:
    listed = ckpt("ls", saved({"amax": torch.ones(2), "recipe": "delayed"}, tmp_path)).out
    assert "dict of 2 (amax, recipe)" in next(line for line in listed.splitlines() if "_extra_state" in line)


def test_safetensors_leaves_it_out_and_says_that_a_strict_load_needs_it(tmp_path: Path, ckpt: Run) -> None:
    told = ckpt("convert", saved({"a": 1}, tmp_path), tmp_path / "o.safetensors").out
    assert "'module.fc._extra_state'" in told
    assert "strict load" in told
    assert list(ckpt_surgeon.open(tmp_path / "o.safetensors")) == ["module.fc.weight", "module.fc.bias"]


def test_fit_supplies_it_where_it_may_be_missing(tmp_path: Path) -> None:
    without = ckpt_surgeon.drop(ckpt_surgeon.open(saved({"a": 1}, tmp_path)), "*_extra_state")
    with pytest.raises(ckpt_surgeon.EditError, match="_extra_state"):
        ckpt_surgeon.fit(without, model_with({"b": 2}))
    found = ckpt_surgeon.fit(without, model_with({"b": 2}), allow_missing=["*._extra_state"])
    ckpt_surgeon.save(found.result, tmp_path / "o.pth")
    assert torch.load(tmp_path / "o.pth")["fc._extra_state"] == {"b": 2}


def test_an_object_of_a_class_is_refused_by_writers_and_stays_in_place(tmp_path: Path) -> None:
    path = saved(OpenState(), tmp_path)
    opened = ckpt_surgeon.open(path)
    with pytest.raises(ckpt_surgeon.EditError, match=r"OpenState.*drop '\*_extra_state'"):
        ckpt_surgeon.save(opened, tmp_path / "o.pth")
    ckpt_surgeon.rename_in_place(path, ckpt_surgeon.step("strip_prefix"))
    assert isinstance(torch.load(path, weights_only=False)["fc._extra_state"], OpenState)


class OpenState:
    """More than data."""


def test_a_value_in_itself_is_kept(tmp_path: Path) -> None:
    state: dict[str, object] = {"n": 1}
    state["self"] = state
    ckpt_surgeon.save(ckpt_surgeon.open(saved(state, tmp_path)), tmp_path / "o.pth")
    made = torch.load(tmp_path / "o.pth", weights_only=False)["module.fc._extra_state"]
    assert made["self"] is made


def test_equal_values_have_equal_digests_in_any_container(tmp_path: Path) -> None:
    opened = ckpt_surgeon.open(saved({"amax": torch.ones(2)}, tmp_path))
    ckpt_surgeon.save(opened, tmp_path / "o.dcp")
    assert ckpt_surgeon.hash(opened).whole == ckpt_surgeon.hash(tmp_path / "o.dcp").whole
    assert digest({"a": 1}) != digest({"a": True})


def test_a_run_that_is_kept_whole_keeps_it_under_its_new_key(tmp_path: Path) -> None:
    wrapped = {f"module.{key}": value for key, value in model_with({"amax": torch.ones(2)}).state_dict().items()}
    torch.save({"state_dict": wrapped, "epoch": 3}, tmp_path / "last.ckpt")
    run = ckpt_surgeon.strip_prefix(ckpt_surgeon.open_run(tmp_path / "last.ckpt"))
    ckpt_surgeon.save(run, tmp_path / "clean.ckpt")
    made = torch.load(tmp_path / "clean.ckpt")
    assert made["epoch"] == 3
    assert same(made["state_dict"]["fc._extra_state"], {"amax": torch.ones(2)})
