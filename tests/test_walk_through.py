"""What CONTRIBUTING.md promises: a new edit is one entry and one line, a new container one module and one line."""

from __future__ import annotations

import inspect
import json
import math
import pydoc
import struct
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

import numpy
import pytest
import torch
from command_line import Run

import ckpt_surgeon
from ckpt_surgeon import Change, CheckpointError, EditError, Recipe, step
from ckpt_surgeon.edits.arguments import Patterns
from ckpt_surgeon.edits.change import EDITS, Edit, edit, matching, rekeyed
from ckpt_surgeon.edits.change import StateDict as Kind
from ckpt_surgeon.edits.table import KEYS, TABLE, Listed
from ckpt_surgeon.files.paths import FilePath
from ckpt_surgeon.files.sinks import Sink
from ckpt_surgeon.files.spans import ByteSpan
from ckpt_surgeon.formats import registry
from ckpt_surgeon.formats.contents import Contents
from ckpt_surgeon.formats.pickle.values import Value
from ckpt_surgeon.tensors.dtypes import parse
from ckpt_surgeon.tensors.records import Tensor
from ckpt_surgeon.tensors.storage import Storage
from ckpt_surgeon.tensors.stored import StoredTensor
from ckpt_surgeon.tensors.strides import row_major


def declare_toy() -> Edit[...]:
    """The edit of the walk-through, declared as an edit of the package is."""

    @edit("Write some keys in capitals.", "model.pth loud.pth 'fc.*' --which last", only_renames=True)
    def shout(
        state_dict: Kind,
        patterns: Annotated[Patterns, "Globs on keys."],
        *,
        which: Annotated[Literal["all", "last"], "Which components of a key change."] = "all",
    ) -> Change[Kind]:
        """Write the keys that match one of the globs in capitals.  Raises NothingMatched."""
        chosen = matching(state_dict, patterns)

        def louder(key: str) -> str:
            head, dot, last = key.rpartition(".")
            return f"{head if which == 'last' else head.upper()}{dot}{last.upper()}"

        return rekeyed(state_dict, {key: louder(key) if key in chosen else key for key in state_dict})

    return shout


@pytest.fixture
def shout() -> Iterator[Edit[...]]:
    TABLE["shout"] = Listed("keys", KEYS, "Write some keys in capitals.")
    yield declare_toy()
    del EDITS["shout"], TABLE["shout"]


def test_a_declared_edit_is_a_function_a_step_a_command_and_an_option(
    shout: Edit[...], ckpt: Run, tmp_path: Path
) -> None:
    state = {"fc.bias": torch.ones(1), "conv.bias": torch.ones(1)}
    assert list(shout(state, "fc.*")) == ["FC.BIAS", "conv.bias"]
    path, out = tmp_path / "model.pth", tmp_path / "out.pth"
    torch.save(state, path)
    for words in (["shout", path, out, "fc.*", "--which", "last"], ["edit", path, out, "--shout", "fc.* which=last"]):
        assert ckpt(*words, "--force").status == 0
        assert list(torch.load(out)) == ["fc.BIAS", "conv.bias"]
    recipe = Recipe.loads("[[edit]]\ndo = 'shout'\npatterns = 'fc.*'\n")
    assert list(recipe.apply(state)) == ["FC.BIAS", "conv.bias"]
    assert recipe.invert(state).apply(recipe.apply(state)).keys() == state.keys()
    listed = ckpt("--help").out
    assert "shout" in listed
    assert "Write some keys in capitals." in listed
    assert "--which [all|last]" in ckpt("shout", "--help").out
    assert ckpt("shout", path, out, "fc.*", "--which", "both").status == 2
    with pytest.raises(EditError, match="which is all or last, not 'lst'; did you mean 'last'"):
        step("shout", patterns="fc.*", which="lst")


def test_an_edit_without_help_for_an_argument_cannot_be_used() -> None:
    @edit("Do nothing.")
    def idle(state_dict: Kind, patterns: Patterns) -> Change[Kind]:
        return rekeyed(state_dict, {key: key for key in state_dict})

    try:
        with pytest.raises(TypeError, match="has no help"):
            _ = idle.arguments
    finally:
        del EDITS["idle"]


@pytest.mark.parametrize("name", EDITS)
def test_signature_and_help_show_what_an_edit_takes_and_returns(name: str) -> None:
    found = EDITS[name]
    signature = inspect.signature(found)
    first, *others = signature.parameters.values()
    assert first.kind is inspect.Parameter.POSITIONAL_ONLY
    assert signature.return_annotation == first.annotation
    assert [one.name for one in others] == list(found.arguments)
    assert "args" not in signature.parameters
    shown = pydoc.render_doc(found)
    for argument in others:
        assert f"{argument.name}:" in shown
    assert str(found.__doc__).split()[0] in shown


@pytest.mark.parametrize(
    ("name", "arguments", "options"),
    [
        ("cast", [3], {}),
        ("cast", ["bf17"], {}),
        ("cast", [float], {}),
        ("keep", [3], {}),
        ("keep", [[3]], {}),
        ("add_prefix", [3], {}),
        ("slice", ["*", "a", 1], {}),
        ("scale", ["*", "half"], {}),
        ("reshape", ["*", 4], {}),
        ("strip_prefix", [], {"wrappers": "yes"}),
        ("rename", [3], {}),
        ("resize_grid", ["*", "1x1:2x2"], {"mode": "nearest"}),
        ("resize_rows", ["*", 4], {"fill": "zeros"}),
    ],
)
def test_an_argument_of_another_type_is_a_checkpoint_error(
    name: str, arguments: list[object], options: dict[str, object]
) -> None:
    with pytest.raises(CheckpointError, match=r", not |did you mean"):
        EDITS[name]({"fc.weight": torch.ones(2, 2)}, *arguments, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bf16", "torch.bfloat16", parse("bf16")])
def test_a_dtype_is_a_name_or_a_dtype(dtype: object) -> None:
    made = ckpt_surgeon.cast({"a": torch.ones(2)}, dtype)  # type: ignore[arg-type]
    assert made["a"].dtype == torch.bfloat16
    assert step("cast", dtype=dtype).arguments["dtype"] in ("bf16", "bfloat16", "torch.bfloat16")


@pytest.mark.parametrize("dtype", [numpy.float16, numpy.dtype("float16"), numpy.dtype(">f2")])
def test_a_dtype_may_be_numpys(dtype: type) -> None:
    assert ckpt_surgeon.cast({"a": torch.ones(2)}, dtype)["a"].dtype == torch.float16


def test_scalars_of_numpy_and_sets_are_arguments_too() -> None:
    state = {"a": torch.arange(4), "b": torch.arange(4)}
    assert ckpt_surgeon.slice_(state, {"a", "b"}, numpy.int64(1), numpy.int64(3))["b"].tolist() == [1, 2]  # type: ignore[arg-type]


# -- a container


def toy_container() -> types.SimpleNamespace:
    """A module that reads and writes b"TOY1", the length of a JSON index, the index, and the elements."""

    def matches(head: bytes) -> bool:
        return head.startswith(b"TOY1")

    def read(path: FilePath, *, salvage: bool = False) -> Contents:
        with path.opened() as file:
            (length,) = struct.unpack("<4xQ", file.read(12))
            index = json.loads(file.read(length))
        root: dict[Value, Value] = {}
        at = 12 + length
        for key, (name, shape) in index.items():
            dtype = parse(name)
            nbytes = math.prod(shape) * dtype.itemsize
            storage = Storage(ByteSpan(path, at, at + nbytes), nbytes)
            root[key] = StoredTensor(dtype, tuple(shape), row_major(tuple(shape)), 0, storage)
            at += nbytes
        return Contents(path, "toy", root)

    def write(sink: Sink, tensors: Mapping[str, Tensor], versions: object = None, metadata: object = None) -> None:
        index = json.dumps({key: [tensor.dtype.name, list(tensor.shape)] for key, tensor in tensors.items()}).encode()
        sink.literal(b"TOY1" + struct.pack("<Q", len(index)) + index)
        for tensor in tensors.values():
            sink.stream(tensor.blocks(), tensor.nbytes)

    return types.SimpleNamespace(
        CONTAINER="toy",
        SUFFIXES=(".toy",),
        HOLDS_EXTRA_STATES=False,
        matches=matches,
        read=read,
        check=lambda tensors: None,
        size_of=lambda tensors: 1000,
        write=write,
    )


def test_a_listed_container_is_read_and_written(monkeypatch: pytest.MonkeyPatch, ckpt: Run, tmp_path: Path) -> None:
    toy = toy_container()
    line = registry.Container(toy.matches, toy.read, writer=toy)
    monkeypatch.setattr(registry, "CONTAINERS", (line, *registry.CONTAINERS))
    state = {"module.a": torch.arange(6.0).reshape(2, 3), "module.b": torch.arange(3)}
    path, there, back = tmp_path / "model.pth", tmp_path / "model.toy", tmp_path / "back.pth"
    torch.save(state, path)
    assert ckpt("convert", path, there).status == 0
    assert there.read_bytes().startswith(b"TOY1")
    assert "toy" in ckpt("ls", there).out
    assert ckpt("strip-prefix", there, back).status == 0
    loaded = torch.load(back)
    assert list(loaded) == ["a", "b"]
    assert all(torch.equal(loaded[key], state[f"module.{key}"]) for key in loaded)
