"""Errors carry fields, and say the same in Python's words and in the command line's."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch
from command_line import Run

import ckpt_surgeon
from ckpt_surgeon import errors
from ckpt_surgeon.cli.spelling import spelled
from ckpt_surgeon.errors import (
    Argument,
    BrokenFile,
    Call,
    CheckpointError,
    EditError,
    Either,
    FileError,
    FrozenChanged,
    KeyCollision,
    NoRoom,
    NotACheckpoint,
    NothingMatched,
    OutputExists,
    Phrase,
    RankFailed,
    RecipeError,
    SelectionError,
    TargetError,
)

ALL: list[Callable[[], CheckpointError]] = [
    lambda: CheckpointError("p", remedy="r"),
    lambda: FileError("a.pth", "p", "r"),
    lambda: NotACheckpoint("a.pth", "p", "r"),
    lambda: BrokenFile("a.pth", "p", "r"),
    lambda: OutputExists(Path("a.pth")),
    lambda: NoRoom("a.pth", 20, 10, "why"),
    lambda: SelectionError("a.pth", "p", [Phrase(Argument("select", "ema"), " (2)")]),
    lambda: EditError(["p", "q"], remedy="r"),
    lambda: KeyCollision({"a": ["b", "c"]}, remedy="r"),
    lambda: NothingMatched(["a.*"], examples=["b"], hints={"a.*": "hint"}, remedy="r"),
    lambda: FrozenChanged(["a"], "why", remedy="r"),
    lambda: RankFailed(2, "a.pth", "p", told_by=0, remedy="r"),
    lambda: RecipeError("a.toml", ["p", "q"], remedy="r"),
    lambda: TargetError("m:f", "p", remedy="r"),
]


def test_every_error_of_the_tree_is_tried_here() -> None:
    kinds = {one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, CheckpointError)}
    assert {type(make()) for make in ALL} == kinds


@pytest.mark.parametrize("make", ALL)
def test_an_error_has_a_remedy_and_a_context_and_survives_a_pickle(make: Callable[[], CheckpointError]) -> None:
    error = make()
    assert error.remedy
    assert str(error).endswith(error.remedy)
    error.inside("step 2 (drop)")
    error.inside("recipe.toml")
    assert error.context == ("recipe.toml", "step 2 (drop)")
    assert str(error).startswith("recipe.toml: step 2 (drop): ")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert vars(back) == vars(error)
    assert back.message(lambda _: "X") == error.message(lambda _: "X")


def test_the_remedy_is_never_among_the_problems_and_never_cut_off() -> None:
    error = EditError([f"problem {number}" for number in range(25)], remedy="the way on")
    assert str(error).endswith("problem 9; and 15 more like these; the way on")
    assert len(error.problems) == 25


def test_one_problem_may_be_given_without_a_list() -> None:
    assert EditError("not characters").problems == ("not characters",)


def test_a_phrase_reads_as_python_and_keeps_its_arguments() -> None:
    phrase = Phrase("use ", Argument("force", True), " or ", Call("ls", Argument("all", True)), Either(" now", " then"))
    assert phrase == "use force=True or ckpt_surgeon.ls(…, all=True) now"
    nested = Phrase("first ", phrase)
    assert nested.parts == ("first ", *phrase.parts)
    assert nested.spelled(lambda part: spelled(part, None)) == "first use force = true or ckpt ls --all then"


def test_an_argument_is_named_as_the_command_that_was_run_names_it() -> None:
    command = click.Command(
        "x",
        params=[
            click.Option(["-m", "--allow-missing"], multiple=True),
            click.Argument(["patterns"], nargs=-1, metavar="[PATTERN]..."),
            click.Argument(["out"]),
        ],
    )
    named = [spelled(Argument(name), command) for name in ("allow_missing", "patterns", "out", "rows")]
    assert named == ["--allow-missing", "[PATTERN]...", "OUT", "rows"]
    assert spelled(Argument("allow_missing", "*.bias"), command) == "--allow-missing *.bias"


def test_python_names_the_argument_and_the_command_line_the_flag(tmp_path: Path, ckpt: Run) -> None:
    path, out = tmp_path / "a.pth", tmp_path / "b.pth"
    torch.save({"fc.weight": torch.ones(2, 2)}, path)
    torch.save({}, out)
    with pytest.raises(OutputExists, match="use force=True to replace it"):
        ckpt_surgeon.convert(path, out)
    assert ckpt("convert", path, out).err.endswith("use --force to replace it\n")
    with pytest.raises(EditError, match="missing: 'bias'; allow missing keys by pattern: allow_missing"):
        ckpt_surgeon.fit(
            path, "torch.nn:Linear(2, 2)", recipe=ckpt_surgeon.Recipe.loads("[[edit]]\ndo='rename'\npairs=['fc=']")
        )
    recipe = tmp_path / "r.toml"
    recipe.write_text("[[edit]]\ndo = 'rename'\npairs = ['fc=']\n")
    said = ckpt("fit", path, "torch.nn:Linear(2, 2)", tmp_path / "c.pth", "--recipe", recipe).err
    assert said.endswith("missing: 'bias'; allow missing keys by pattern: --allow-missing\n")


def test_several_models_are_offered_as_each_side_chooses_them(tmp_path: Path, ckpt: Run) -> None:
    path = tmp_path / "run.pth"
    torch.save({"model": {"w": torch.ones(2)}, "ema": {"w": torch.ones(2)}}, path)
    with pytest.raises(SelectionError, match=r"choose one of select='model' \(1 tensors"):
        ckpt_surgeon.open(path)
    assert "choose one of --select model (1 tensors" in ckpt("hash", path).err
