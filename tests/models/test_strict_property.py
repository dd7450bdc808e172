"""``diff`` says 0 exactly when torch loads strictly: modules with states, hooks and overrides of any kind."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.prune import random_unstructured

import ckpt_surgeon


class Extra(nn.Linear):
    """Gives and takes an extra state."""

    def get_extra_state(self) -> object:
        return {"steps": 3}

    def set_extra_state(self, state: object) -> None:
        pass


class Gives(nn.Linear):
    def get_extra_state(self) -> object:
        return [1, 2]


class Takes(nn.Linear):
    def set_extra_state(self, state: object) -> None:
        pass


class Picky(nn.Linear):
    """Refuses an extra state that is not as it wants it."""

    def get_extra_state(self) -> object:
        return {"version": 2}

    def set_extra_state(self, state: object) -> None:
        if not isinstance(state, dict) or state["version"] < 2:
            raise RuntimeError("an extra state of a version that is too old")


class OfTensor(nn.Linear):
    def get_extra_state(self) -> object:
        return torch.ones(3)

    def set_extra_state(self, state: object) -> None:
        pass


class Buffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(2))
        self.register_buffer("made", torch.zeros(2), persistent=False)
        self.register_buffer("nothing", None)
        self.register_parameter("none", None)
        self.scalar = nn.Parameter(torch.tensor(1.0))


class Override(nn.Linear):
    """Loads under another name, and asks for one more key than its state_dict has."""

    def _load_from_state_dict(
        self, state_dict: dict[str, object], prefix: str, metadata: object, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        if f"{prefix}kernel" in state_dict:
            state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}kernel")
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs)


class Demands(nn.Linear):
    def _load_from_state_dict(
        self, state_dict: Mapping[str, object], prefix: str, metadata: object, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if strict and f"{prefix}stamp" not in state_dict:
            missing_keys.append(f"{prefix}stamp")


def pre_hooked() -> nn.Module:
    """A model whose hook renames old keys and refuses those of another owner."""
    layer = nn.Linear(2, 2)

    def rename(_: nn.Module, state_dict: dict[str, object], prefix: str, *rest: object) -> None:
        if f"{prefix}gamma" in state_dict:
            state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}gamma")

    layer.register_load_state_dict_pre_hook(rename)
    return layer


def forgiving() -> nn.Module:
    """A model whose hook forgives a missing bias."""
    layer = nn.Linear(2, 2)

    def forgive(_: nn.Module, incompatible: object) -> None:
        missing = incompatible.missing_keys  # type: ignore[attr-defined]
        missing[:] = [key for key in missing if not key.endswith("bias")]

    layer.register_load_state_dict_post_hook(forgive)
    return layer


def looking() -> nn.Module:
    """A model whose hook looks at the values."""
    layer = nn.Linear(2, 2)

    def look(_: nn.Module, state_dict: Mapping[str, torch.Tensor], prefix: str, *rest: object) -> None:
        if f"{prefix}weight" in state_dict and float(state_dict[f"{prefix}weight"].sum()) > 1e6:
            raise RuntimeError("weights that are too large")

    layer.register_load_state_dict_pre_hook(look)
    return layer


def renaming() -> nn.Module:
    """A model that saves under other names than it loads."""
    layer = nn.Linear(2, 2)

    def rename(_: nn.Module, state_dict: dict[str, object], prefix: str, __: object) -> None:
        state_dict[f"{prefix}saved"] = state_dict.pop(f"{prefix}weight")

    layer.register_state_dict_post_hook(rename)
    return layer


def lazy() -> nn.Module:
    return nn.LazyLinear(2)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(2, 2),
    "norm": lambda: nn.BatchNorm1d(2),
    "buffers": Buffers,
    "extra": lambda: Extra(2, 2),
    "gives": lambda: Gives(2, 2),
    "takes": lambda: Takes(2, 2),
    "picky": lambda: Picky(2, 2),
    "of tensor": lambda: OfTensor(2, 2),
    "override": lambda: Override(2, 2),
    "demands": lambda: Demands(2, 2),
    "pre-hooked": pre_hooked,
    "forgiving": forgiving,
    "looking": looking,
    "renaming": renaming,
    "lazy": lazy,
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
    "orthogonal": lambda: nn.utils.parametrizations.orthogonal(nn.Linear(2, 2)),
    "pruned": lambda: random_unstructured(nn.Linear(2, 2), "weight", 0.5),
}

EXTRA_VALUES = (None, 7, {"version": 1}, {"version": 2}, [1.5], torch.zeros(2))


def built(names: list[str]) -> nn.Module:
    return nn.ModuleDict({f"m_{name}": MODULES[name]() for name in names})


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[str], dict[str, object]]:
    """The names of a model's modules, and a state_dict that is its own but for a few changes."""
    names = draw(st.lists(st.sampled_from(sorted(MODULES)), min_size=1, max_size=3, unique=True))
    filled = built(names)
    for module in filled.children():
        if isinstance(module, nn.LazyLinear):
            module(torch.zeros(1, 3))
    state: dict[str, object] = dict(filled.state_dict())
    for _ in range(draw(st.integers(0, 2))):
        key = draw(st.sampled_from(sorted(state))) if state else ""
        path = key.rpartition(".")[0]
        change = draw(st.sampled_from(["drop", "shape", "extra", "dtype", "rename", "one more", "large"]))
        value = state.get(key)
        if change == "drop":
            state.pop(key, None)
        elif change == "extra":
            state[f"{path}._extra_state" if path else "_extra_state"] = draw(st.sampled_from(EXTRA_VALUES))
        elif change == "one more":
            state[f"{path}.stamp"] = torch.zeros(1)
        elif change == "rename" and isinstance(value, torch.Tensor):
            name = draw(st.sampled_from(["kernel", "gamma", "weight", "other"]))
            state[f"{path}.{name}"] = state.pop(key)
        elif isinstance(value, torch.Tensor):
            made = {"shape": value[None], "dtype": value.double(), "large": torch.full_like(value, 99)}[change]
            state[key] = made * 1e6 if change == "large" and value.is_floating_point() else made
    return names, state


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("strict") / "state.pt"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_status_0_is_torch_s_strict_load_in_both_directions(
    path: Path, case: tuple[list[str], dict[str, object]]
) -> None:
    names, state = case
    if not any(isinstance(value, torch.Tensor) for value in state.values()):
        return
    torch.save(state, path)
    said = ckpt_surgeon.diff(ckpt_surgeon.open(path), built(names), hints=False)
    try:
        built(names).load_state_dict(torch.load(path), strict=True)
        loads = True
    except Exception:
        loads = False
    assert said.loadable == loads, (list(state), said)


def test_a_set_extra_state_is_not_handed_bytes_that_it_may_unpickle(tmp_path: Path) -> None:
    handed: list[object] = []

    class Unpickles(nn.Linear):
        def get_extra_state(self) -> object:
            return io.BytesIO(b"")

        def set_extra_state(self, state: object) -> None:
            handed.append(state)

    model = Unpickles(2, 2)
    torch.save({**model.state_dict(), "_extra_state": io.BytesIO(b"cos\nsystem\n")}, tmp_path / "f.pt")
    assert ckpt_surgeon.diff(ckpt_surgeon.open(tmp_path / "f.pt"), model).loadable
    assert handed == []
