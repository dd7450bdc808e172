"""Recipes: kept as TOML, inverted, previewed, run as one pass; and one name and set of arguments for every edit."""

from __future__ import annotations

import inspect
import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import click
import pytest
import safetensors
import safetensors.torch
import torch
from command_line import Run
from hypothesis import assume, given
from hypothesis import strategies as st
from tables import StateDict, assert_same, ramp, save_safetensors, save_zip

import ckpt_surgeon
from ckpt_surgeon import (
    Change,
    EditError,
    FileError,
    KeyCollision,
    NothingMatched,
    Recipe,
    RecipeError,
    Step,
    rename,
    step,
)
from ckpt_surgeon.cli import cli
from ckpt_surgeon.edits.arguments import Pairs, Patterns
from ckpt_surgeon.edits.change import EDITS

Kind = TypeVar("Kind", bound=Mapping)  # type: ignore[type-arg]

WORDS = ["module", "a", "b", "layers", "weight", "0", "7", "größe"]
KEYS = st.lists(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(".".join), unique=True, min_size=1, max_size=8
)


def planned(recipe: Recipe, state: Kind) -> tuple[Change[Kind], tuple[str, ...]]:
    """What a recipe does, and what is wrong with it instead."""
    try:
        return recipe.plan(state), ()
    except EditError as error:
        return Change(state, state, {}), error.problems


# -- random steps, of every edit and with every argument

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
NAMES = ["strip_prefix", "add_prefix", "rename", "keep", "drop", "select", "cast", "reshape", "transpose", "slice",
         "pad", "concat", "split", "scale", "fold"]  # fmt: skip
AWKWARD = st.sampled_from(
    ['"', "'", "\\", "'''", '"""', "\\u0041", "\n", "\r\n", "\x00", "\x1b", "\x7f", "\x85", "é\u2028"]
)
STRINGS = st.lists(TEXT | AWKWARD, min_size=1, max_size=3).map("".join)
PLAIN = st.lists(st.sampled_from("abc."), min_size=1, max_size=4).map(lambda parts: f"x{''.join(parts)}x")
ARGUMENTS: dict[object, st.SearchStrategy[object]] = {
    str: STRINGS,
    bool: st.booleans(),
    int: st.integers(-(2**40), 2**40),
    float: st.floats(allow_nan=False) | st.integers(-1000, 1000),
    Patterns: STRINGS | st.lists(STRINGS, max_size=3),
    Sequence[str]: st.lists(STRINGS, max_size=3),
    Sequence[int]: st.lists(st.integers(-100, 100), max_size=4),
    Pairs: st.lists(
        st.tuples(PLAIN | STRINGS.map(lambda text: f"x{text}x".replace("{", "")), PLAIN).map(list)
        | PLAIN.map(lambda text: f"{text}={text}"),
        max_size=3,
    ),
}
FIXED: dict[tuple[str, str], st.SearchStrategy[object]] = {  # what is looked at before there is a key
    ("cast", "dtype"): st.sampled_from(["bf16", "fp16", "torch.float32", "float8_e4m3fn"]),
    ("rename", "regex"): st.just(False),
    ("drop", "derivable"): st.just(True),
    **{(name, "on_collision"): st.sampled_from(["error", "first", "last"]) for name in ("strip_prefix", "rename")},
}


def parameters(name: str) -> dict[str, inspect.Parameter]:
    """The arguments of an edit, as Python has them."""
    signature = inspect.signature(EDITS[name])
    return dict(list(signature.parameters.items())[1:])


@st.composite
def steps(draw: st.DrawFn) -> Step:
    name = draw(st.sampled_from(NAMES))
    arguments: dict[str, object] = {}
    for argument, parameter in parameters(name).items():
        needed = parameter.default is inspect.Parameter.empty or (name, argument) == ("drop", "derivable")
        if needed or draw(st.booleans()):
            fixed = (name, argument) in FIXED
            arguments[argument] = draw(FIXED[name, argument] if fixed else ARGUMENTS[parameter.annotation])
    if name in ("add_prefix", "select"):
        arguments["prefix"] = f"x{arguments['prefix']}"
    return step(name, **arguments)


RECIPES = st.lists(steps(), max_size=4).map(lambda made: Recipe(tuple(made)))


@given(RECIPES)
def test_a_recipe_survives_being_written_as_toml(recipe: Recipe) -> None:
    text = recipe.dumps()
    again = Recipe.loads(text)
    assert again == recipe
    assert again.digest == recipe.digest
    assert again.dumps() == text
    tables = tomllib.loads(text).get("edit", [])  # by a reader that is not ours
    assert [(one.pop("do").replace("-", "_"), one) for one in tables] == [
        (one.name, dict(one.arguments)) for one in recipe.steps
    ]


@pytest.mark.parametrize(
    "text", ["it's", 'say "hi"', "\\back\\slash", "größe.重み", "tab\tline\nfeed\r\n", "\x00\x1b\x7f\x85"]
)
def test_odd_keys_survive_a_file(text: str, tmp_path: Path) -> None:
    recipe = Recipe((step("drop", patterns=[text, f"{text}{text}"]), step("add_prefix", prefix=text)))
    recipe.save(tmp_path / "recipe.toml")
    assert Recipe.load(tmp_path / "recipe.toml") == recipe


def test_expressions_stay_readable_in_a_file() -> None:
    recipe = Recipe((step("rename", regex=True, pairs=[[r"layers\.(?P<n>\d+)\.(.*)", r"blocks.{n+1}.\2"]]),))
    assert recipe.dumps() == (
        "[[edit]]\ndo = 'rename'\nregex = true\npairs = [['layers\\.(?P<n>\\d+)\\.(.*)', 'blocks.{n+1}.\\2']]\n"
    )


def test_a_recipe_is_a_value() -> None:
    made = Recipe((step("strip-prefix", prefix="module."), step("cast", dtype="bf16", except_="norm*")))
    assert made == Recipe(
        (step("strip_prefix", prefix="module."), step("cast", **{"dtype": "bf16", "except": "norm*"}))
    )
    assert made != Recipe(made.steps[::-1])
    assert made.steps[1].arguments == {"dtype": "bf16", "except": "norm*"}
    assert step("rename", pairs={"a": "b"}) == step("rename", pairs=[("a", "b")]) == step("rename", pairs=[["a", "b"]])
    assert step("reshape", patterns="w", shape=(2, 3)) == step("reshape", patterns="w", shape=[2, 3])


@pytest.mark.parametrize(
    ("name", "arguments", "problem"),
    [
        ("strip", {}, "no edit is called 'strip'; known are strip-prefix,"),
        ("keep", {}, "keep needs the argument 'patterns'"),
        ("keep", {"patterns": 3}, "patterns of keep should be a string or a list of strings, not 3"),
        ("keep", {"pattern": "x"}, "keep has no argument 'pattern'; it takes patterns, allow_unmatched"),
        ("strip_prefix", {"wrappers": 1}, "wrappers of strip-prefix should be true or false, not 1"),
        ("scale", {"patterns": "x", "factor": True}, "factor of scale should be a number, not True"),
        ("slice", {"patterns": "x", "start": 0.5, "stop": 1}, "start of slice should be an integer, not 0.5"),
        ("reshape", {"patterns": "x", "shape": [True]}, "shape of reshape should be a list of integers, not [True]"),
        ("concat", {"sources": "a,b", "into": "c"}, "sources of concat should be a list of strings, not 'a,b'"),
        ("rename", {"pairs": [["a"]]}, "pairs of rename should be a list of [old, new] pairs"),
        ("rename", {"pairs": ["a"]}, "rename 'a' is not of the form OLD=NEW"),
        ("rename", {"pairs": ["(=b"], "regex": True}, "unterminated"),
        ("rename", {"pairs": ["a=b"], "on_collision": "both"}, "on_collision is error, first or last, not 'both'"),
        ("cast", {"dtype": "fp12"}, "no dtype is called 'fp12'"),
        ("drop", {}, "drop needs patterns, or derivable"),
    ],
)
def test_a_step_that_cannot_be_is_an_error(name: str, arguments: dict[str, object], problem: str) -> None:
    with pytest.raises(EditError) as raised:
        step(name, **arguments)
    assert problem in str(raised.value)
    assert not isinstance(raised.value, NothingMatched)


# -- the digest


@pytest.mark.parametrize(
    "text",
    [
        "[[edit]]\ndo = 'rename'\npairs = [['a', 'b']]\n[[edit]]\ndo = 'scale'\npatterns = 'w'\nfactor = 2.0\n",
        '# said\n[[ edit ]]\npairs = [["a", "b"]]\n"do" = "rename"\n\n[[edit]]\nfactor=2\npatterns=["w"]\ndo="scale"',
        "[[edit]]\ndo = 'rename'\npairs = ['a=b']\nregex = false\non-collision = 'error'\n"
        "[[edit]]\ndo = 'scale'\npatterns = 'w'\nfactor = 2.0",
        "edit = [{do = 'rename', pairs = [['a', 'b']]}, {do = 'scale', factor = 2, patterns = 'w'}]",
    ],
)
def test_the_digest_depends_on_what_is_done_and_not_on_how_it_is_spelled(text: str) -> None:
    wanted = Recipe((step("rename", pairs=["a=b"]), step("scale", patterns="w", factor=2)))
    assert Recipe.loads(text).digest == wanted.digest


def test_the_digest_tells_recipes_apart() -> None:
    recipes = [
        Recipe(),
        Recipe((step("rename", pairs=["a=b"]),)),
        Recipe((step("rename", pairs=["a=c"]),)),
        Recipe((step("rename", pairs=["a=b"], regex=True),)),
        Recipe((step("rename", pairs=["a=b", "c=d"]),)),
        Recipe((step("rename", pairs=["c=d", "a=b"]),)),
        Recipe((step("rename", pairs=["a=b"]), step("rename", pairs=["c=d"]))),
        Recipe((step("scale", patterns="w", factor=2),)),
        Recipe((step("scale", patterns="w", factor=2.5),)),
    ]
    assert len({recipe.digest for recipe in recipes}) == len(recipes)


# -- applying


def test_steps_are_done_in_order_and_origins_lead_back_to_the_first_names() -> None:
    recipe = Recipe(
        (
            step("strip_prefix"),
            step("rename", pairs=["layers.{n}=blocks.{n+1}"]),
            step("drop", patterns="fc.*"),
            step("concat", sources=["blocks.{n}.q", "blocks.{n}.k"], into="blocks.{n}.qk"),
            step("cast", dtype="bf16"),
        )
    )
    state = {f"module.layers.0.{part}": ramp(2) for part in "qk"} | {"module.fc.bias": ramp(1)}
    change = recipe.plan(state)
    assert change.origins == {"blocks.1.qk": ("module.layers.0.q", "module.layers.0.k")}
    assert change.dropped == ("module.fc.bias",)
    assert_same(change.result, {"blocks.1.qk": torch.cat([ramp(2), ramp(2)]).bfloat16()})
    assert_same(recipe.apply(state), change.result)


@pytest.mark.parametrize("error", [NothingMatched, KeyCollision, EditError])
def test_an_error_names_the_step(error: type[EditError]) -> None:
    last = {
        NothingMatched: step("drop", patterns="nothing.*"),
        KeyCollision: step("rename", pairs=["a=b"]),
        EditError: step("reshape", patterns="a.w", shape=[7]),
    }[error]
    recipe = Recipe((step("strip_prefix"), last))
    with pytest.raises(error, match=rf"^step 2 \({last.name}\): "):
        recipe.apply({"module.a.w": ramp(2), "module.b.w": ramp(2)})


def test_a_recipe_without_steps_changes_nothing() -> None:
    state = {"a": ramp(2)}
    assert Recipe().apply(state) is state
    assert Recipe.loads("") == Recipe.loads("# nothing yet\n") == Recipe()
    assert Recipe().invert() == Recipe()


KEY_STEPS = st.one_of(
    st.sampled_from(["module.", "a", "layers.0"]).map(lambda p: step("strip_prefix", prefix=p, allow_unmatched=True)),
    st.sampled_from(["module.", "a", "net.x"]).map(lambda p: step("add_prefix", prefix=p)),
    st.lists(
        st.sampled_from(
            ["a=b", "b=a", "a=c", "layers.{n}=blocks.{n+1}", "^module=", "weight$=gamma", "^a$=x.y", "0=1"]
        ),
        min_size=1,
        max_size=3,
        unique=True,
    ).map(lambda pairs: step("rename", pairs=pairs, allow_unmatched=True)),
    st.sampled_from([r"(.*)\.weight=\1.kernel", r"(\w+)\.(\w+)=\2.\1"]).map(
        lambda pair: step("rename", pairs=[pair], regex=True, allow_unmatched=True)
    ),
    st.sampled_from(["a*", "*"]).map(lambda glob: step("keep", patterns=glob, allow_unmatched=True)),
)


@given(KEYS, st.lists(KEY_STEPS, max_size=5))
def test_the_inverse_undoes_a_recipe_wherever_there_is_one(keys: list[str], made: list[Step]) -> None:
    recipe = Recipe(tuple(made))
    state = {key: index for index, key in enumerate(keys)}
    try:
        edited = recipe.apply(state)
    except EditError:
        assume(False)
    if len(edited) < len(state):
        with pytest.raises(EditError, match="it drops keys"):
            recipe.invert(state)
    else:
        back = recipe.invert(state)
        assert Recipe.loads(back.dumps()) == back
        assert list(back.apply(edited).items()) == list(state.items())


WHOLE = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abcdxy")), min_size=1, max_size=4)


@given(
    st.sets(st.sampled_from("abcdxy"), min_size=1),
    st.lists(
        st.sampled_from(["p", "q."]).map(lambda prefix: step("add_prefix", prefix=prefix))
        | WHOLE.map(lambda pairs: step("rename", pairs=[[f"^{old}$", new] for old, new in pairs])),
        max_size=3,
    ),
)
def test_without_keys_only_what_can_be_undone_for_all_keys_is_inverted(keys: set[str], made: list[Step]) -> None:
    recipe = Recipe(tuple(made))
    back = recipe.invert()
    state = dict.fromkeys(sorted(keys))
    try:
        edited = recipe.apply(state)
    except EditError:
        assume(False)
    assert list(back.apply(edited)) == list(state)


@pytest.mark.parametrize(
    "one",
    [
        step("strip_prefix"),
        step("rename", pairs=["a=b"]),
        step("rename", pairs=["^a=b"]),
        step("rename", pairs=["^layers.{n}$=blocks.{n}"]),
        step("rename", pairs=["a=b"], regex=True),
        step("rename", pairs=["^a$=b"], on_collision="last"),
        step("rename", pairs=["^a$=b"], allow_unmatched=True),
        step("rename", pairs=["^a$="]),
        step("select", prefix="a"),
        step("drop", patterns="a"),
        step("cast", dtype="bf16"),
    ],
)
def test_a_step_that_cannot_be_undone_for_all_keys_is_named(one: Step) -> None:
    with pytest.raises(EditError, match=rf"^step 2 \({one.name.replace('_', '-')}\) cannot be undone"):
        Recipe((step("add_prefix", prefix="net"), one)).invert()


@pytest.mark.parametrize(
    ("one", "why"),
    [
        (step("drop", patterns="*.a"), "it drops keys"),
        (step("select", prefix="net.x"), "it drops keys"),
        (step("rename", pairs=["a=b"], on_collision="last"), "it drops keys"),
        (step("cast", dtype="bf16"), "it changes values"),
        (step("fold", allow_unmatched=True), "it changes values"),
    ],
)
def test_a_step_that_loses_something_is_named_whatever_the_keys(one: Step, why: str) -> None:
    recipe = Recipe((step("add_prefix", prefix="net"), one))
    with pytest.raises(EditError, match=rf"^step 2 \({one.name}\) cannot be undone: {why}"):
        recipe.invert(["a", "b", "x.c"])


@pytest.mark.parametrize("key", ["a.", ".a", "", "a{n}", "{n}", "a}"])
def test_keys_that_no_rename_can_name_are_told_when_a_recipe_is_inverted(key: str) -> None:
    with pytest.raises(EditError, match="cannot be named in a rename"):
        Recipe((step("add_prefix", prefix="net"),)).invert([key, "b"])


def test_thousands_of_keys_are_inverted_and_back() -> None:
    state = {f"layers.{n}.{part}.weight": n for n in range(3000) for part in "qkv"}
    recipe = Recipe((step("rename", pairs=["layers.{n}=blocks.{n+1}", "q=query"]),))
    assert list(recipe.invert(state).apply(recipe.apply(state)).items()) == list(state.items())


VALUE_STEPS = st.sampled_from(
    [
        step("cast", dtype="bf16"),
        step("scale", patterns="*", factor=0.5),
        step("cast", dtype="fp64"),
        step("concat", sources=["*.weight"], into="*.weight"),
        step("split", source="*.weight", into=["*.first", "*.second"]),
        step("pad", patterns="*", after=1),
        step("slice", patterns="*", start=0, stop=2, step=1),
        step("reshape", patterns="*", shape=[-1]),
        step("transpose", patterns="*"),
    ]
)


@given(KEYS, st.lists(KEY_STEPS | VALUE_STEPS, min_size=1, max_size=4))
def test_a_checkpoint_and_a_dict_agree(keys: list[str], made: list[Step]) -> None:
    recipe = Recipe(tuple(made))
    state = {key: ramp(2, 4) + index for index, key in enumerate(keys)}
    checkpoint = ckpt_surgeon.from_torch(state)
    ours, problems = planned(recipe, state)
    theirs, same_problems = planned(recipe, checkpoint)
    assert problems == same_problems
    if not problems:
        assert_same(ckpt_surgeon.load(theirs.result), ours.result)
        assert ours.origins == theirs.origins
        assert ours.dropped == theirs.dropped
        assert ours.notes == theirs.notes


# -- files that are wrong


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("[[edit]]\n\ndo = 'keeep'\n", ["line 3: no edit is called 'keeep'"]),
        ("\n[[edit]]\ndo = 'keep'\n", ["line 2: keep needs the argument 'patterns'"]),
        ("[[edit]]\npatterns = ['x']\n", ["line 1: an edit needs do"]),
        ("[[edit]]\ndo = 3\n", ["line 1: an edit needs do"]),
        ("[[edit]]\ndo = 'keep'\npatterns = 'x'\nfoo = 1\n", ["line 4: keep has no argument 'foo'"]),
        ("[[edit]]\ndo = 'strip-prefix'\nallow-unmatched = 1\n", ["line 3: allow_unmatched of strip-prefix"]),
        ("[[edit]]\ndo = 'strip-prefix'\n\"wrappers\" = 'yes'\n", ["line 3: wrappers of strip-prefix"]),
        (
            "# first\n[[edit]]\ndo = 'keep'\npatterns = [\n  'a',\n]\n\n[[edit]]\ndo = 'drop'\npatterns = 7\nx = 1\n",
            ["line 10: patterns of drop", "line 11: drop has no argument 'x'"],
        ),
        ("x = 1\n[[edit]]\ndo = 'keep'\n", ["line 1: unknown entry 'x'", "line 2: keep needs"]),
        ("[edit]\ndo = 'keep'\n", ["line 1: edits are [[edit]] tables"]),
        ("edit = 3\n", ["line 1: edits are [[edit]] tables"]),
        ("[[edit]]\ndo = 'keep'\npatterns = ['a'\nx = 1\n", ["line 4: Unclosed array"]),
        ("[[edit]]\ndo = 'keep\n", ["line 2:"]),
        ("[[edit]]\ndo = 'keep'\npatterns = [\n'a',\n", ["line 4: "]),
        ("[[edit]]\ndo = 'keep'\ndo = 'drop'\n", ["line 3:"]),
        ("[[edit]]\ndo = 'cast'\ndtype = 'bf17'\n", ["line 3: no dtype is called 'bf17'"]),
        (
            "\n\n[[edit]]\ndo = 'rename'\npairs = [['(', 'x'], ['a', '{n}']]\nregex = true\n",
            ["line 3: rename 1", "line 3: rename 2"],
        ),
    ],
)
def test_problems_of_a_file_are_told_with_their_lines_all_at_once(
    text: str, problems: list[str], ckpt: Run, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as raised:
        Recipe.load(path)
    assert len(raised.value.problems) == len(problems)
    for found, wanted in zip(raised.value.problems, problems, strict=True):
        assert found.startswith(wanted)
    ran = ckpt("recipe", "check", path)
    assert (ran.status, ran.out) == (2, "")
    assert all(problem in ran.err for problem in problems)


def test_a_file_that_is_not_there_or_not_text_is_an_error(ckpt: Run, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot be opened"):
        Recipe.load(tmp_path / "nowhere.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not UTF-8"):
        Recipe.load(tmp_path / "binary.toml")
    for name in ("nowhere.toml", "binary.toml"):
        assert ckpt("recipe", "check", tmp_path / name).status == 2


# -- the commands

TEXT_OF_A_RECIPE = """\
[[edit]]
do = 'strip-prefix'

[[edit]]
do = 'rename'
pairs = [['layers.{n}', 'blocks.{n+1}']]

[[edit]]
do = 'drop'
patterns = 'fc.*'

[[edit]]
do = 'reshape'
patterns = 'stem.weight'
shape = [2, 1, 3]

[[edit]]
do = 'cast'
dtype = 'bf16'
"""


def trained() -> StateDict:
    keys = ["stem.weight", "layers.0.weight", "layers.1.weight", "fc.bias"]
    return {f"module.{key}": ramp(2, 3) + index for index, key in enumerate(keys)}


def cleaned() -> StateDict:
    stem, first, second, _ = trained().values()
    wanted = {"stem.weight": stem.reshape(2, 1, 3), "blocks.1.weight": first, "blocks.2.weight": second}
    return {key: tensor.bfloat16() for key, tensor in wanted.items()}


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(TEXT_OF_A_RECIPE, encoding="utf-8")
    return path


def test_a_recipe_is_run_from_its_file(ckpt: Run, recipe_file: Path, tmp_path: Path) -> None:
    source, out = save_zip(trained(), tmp_path), tmp_path / "out.pth"
    ran = ckpt("apply", recipe_file, source, out)
    assert ran.status == 0
    assert "3 tensors, 3 renamed, 3 with other values or shape, 1 dropped" in ran.out
    assert_same(torch.load(out), cleaned())
    assert_same(Recipe.load(recipe_file).apply(trained()), cleaned())


def test_a_dry_run_of_a_recipe_shows_the_full_table_and_writes_nothing(
    ckpt: Run, recipe_file: Path, tmp_path: Path
) -> None:
    source = save_zip(trained(), tmp_path)
    before = sorted(os.listdir(tmp_path))
    ran = ckpt("apply", recipe_file, source, tmp_path / "out.safetensors", "--dry-run")
    assert ran.status == 0
    rows = [line.split() for line in ran.out.splitlines()]
    dtypes = ["float32", "→", "bfloat16"]
    for row in (
        ["module.stem.weight", "→", "stem.weight", *dtypes, "[2,", "3]", "→", "[2,", "1,", "3]", "12"],
        ["module.layers.0.weight", "→", "blocks.1.weight", *dtypes, "[2,", "3]", "12"],
        ["module.layers.1.weight", "→", "blocks.2.weight", *dtypes, "[2,", "3]", "12"],
        ["module.fc.bias", "✗", "dropped", "float32", "[2,", "3]", "-24"],
    ):
        assert row in rows
    assert "nothing was written" in ran.out
    assert sorted(os.listdir(tmp_path)) == before


def test_the_header_of_the_output_tells_the_recipe_unless_declined(
    ckpt: Run, recipe_file: Path, tmp_path: Path
) -> None:
    source, out = save_safetensors(trained(), tmp_path), tmp_path / "out.safetensors"
    digest = Recipe.load(recipe_file).digest
    assert ckpt("apply", recipe_file, source, out).status == 0
    with safetensors.safe_open(out, "pt") as file:
        noted = file.metadata()
    assert noted["ckpt_surgeon.recipe"] == f"sha256:{digest}"
    assert noted["ckpt_surgeon.version"] == ckpt_surgeon.__version__
    assert noted["format"] == "pt"
    assert f"sha256:{digest}" in ckpt("recipe", "check", recipe_file).out
    assert ckpt("apply", recipe_file, source, out, "--force", "--no-provenance").status == 0
    with safetensors.safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert ckpt("edit", source, out, "--force", "--strip-prefix", "module.").status == 0
    with safetensors.safe_open(out, "pt") as file:
        assert file.metadata()["ckpt_surgeon.recipe"] == f"sha256:{Recipe((step('strip_prefix'),)).digest}"
    assert ckpt("edit", source, out, "--force", "--strip-prefix", "module.", "--no-provenance").status == 0
    with safetensors.safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_edits_on_one_command_line_are_done_in_the_order_given(ckpt: Run, tmp_path: Path) -> None:
    state = {"a.w": ramp(2), "x.w": ramp(3), "c.w": ramp(4)}
    source, out = save_zip(state, tmp_path), tmp_path / "out.pth"
    assert ckpt("edit", source, out, "--rename", "a=b", "--drop", "x.*", "--rename", "c=d").status == 0
    assert list(torch.load(out)) == ["b.w", "d.w"]
    assert ckpt("edit", source, out, "-f", "--rename", "a=c2", "--rename=c=x2", "--rename", "c2=c").status == 0
    assert list(torch.load(out)) == ["c.w", "x.w", "x2.w"]
    assert ckpt("edit", source, out, "-f", "--add-prefix", "n", "--drop", "n.x.*", "--add-prefix=m").status == 0
    assert list(torch.load(out)) == ["m.n.a.w", "m.n.c.w"]
    ran = ckpt("edit", source, out, "-f", "--drop", "n.x.*", "--add-prefix", "n")
    assert ran.status == 2
    assert ran.err.startswith("ckpt: step 1 (drop): ")


def test_a_value_that_looks_like_an_option_is_a_value(ckpt: Run, tmp_path: Path) -> None:
    source, out = save_zip({"--fold": ramp(2), "a": ramp(3)}, tmp_path), tmp_path / "out.pth"
    assert ckpt("edit", source, out, "--drop", "--fold").status == 0
    assert list(torch.load(out)) == ["a"]


@pytest.mark.parametrize(
    ("words", "steps_"),
    [
        (["--strip-prefix", "l"], [step("strip_prefix", prefix="l")]),
        (["--strip-wrappers", "--drop", "x"], [step("strip_prefix", wrappers=True), step("drop", patterns="x")]),
        (["--add-prefix", "n."], [step("add_prefix", prefix="n.")]),
        (["--rename-regex", r"(?P<a>.*)\.(?=q)(.*)=\g<a>_\2"],
         [step("rename", pairs=[[r"(?P<a>.*)\.(?=q)(.*)", r"\g<a>_\2"]], regex=True)]),
        (["--keep", "w"], [step("keep", patterns="w")]),
        (["--drop-derivable"], [step("drop", derivable=True)]),
        (["--select-prefix", "l.0"], [step("select", prefix="l.0")]),
        (["--cast", "fp16"], [step("cast", dtype="fp16")]),
        (["--reshape", "w=3,-1"], [step("reshape", patterns="w", shape=[3, -1])]),
        (["--transpose", "w"], [step("transpose", patterns="w")]),
        (["--slice", "w=1:3"], [step("slice", patterns="w", start=1, stop=3)]),
        (["--scale", "w=-0.5"], [step("scale", patterns="w", factor=-0.5)]),
        (["--concat", "l.{n}.q,l.{n}.k=l.{n}.qk"], [step("concat", sources=["l.{n}.q", "l.{n}.k"], into="l.{n}.qk")]),
        (["--split", "w=w1,w2"], [step("split", source="w", into=["w1", "w2"])]),
        (["--fold"], [step("fold")]),
    ],
)  # fmt: skip
def test_every_short_option_is_a_step(words: list[str], steps_: list[Step], ckpt: Run, tmp_path: Path) -> None:
    state = {
        "module.w": ramp(4, 6), "w": ramp(4, 6), "l.0.q": ramp(2), "l.0.k": ramp(3), "x": ramp(1),
        "f.weight_g": ramp(2, 1) + 1, "f.weight_v": ramp(2, 3) + 1, "bn.num_batches_tracked": torch.tensor(3),
    }  # fmt: skip
    if "--strip-wrappers" in words:
        del state["w"]
    source, out = save_zip(state, tmp_path), tmp_path / "out.pth"
    ran = ckpt("edit", source, out, *words)
    assert ran.status == 0, ran.err
    assert_same(torch.load(out), Recipe(tuple(steps_)).apply(state))


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--rename", "a"],
        ["--rename-regex", "a"],
        ["--reshape", "w=a,b"],
        ["--reshape", "w"],
        ["--slice", "w=5"],
        ["--slice", "w=1:2:3"],
        ["--slice", "w=1:x"],
        ["--scale", "w=two"],
        ["--concat", "a,b"],
        ["--cast", "fp12"],
        ["--drop"],
    ],
)
def test_what_is_not_well_formed_on_the_command_line_is_an_error(words: list[str], ckpt: Run, tmp_path: Path) -> None:
    source = save_zip({"w": ramp(4), "a": ramp(2)}, tmp_path)
    assert ckpt("edit", source, tmp_path / "out.pth", *words).status == 2
    assert os.listdir(tmp_path) == ["model.pth"]


def test_a_recipe_of_renames_is_undone_from_the_command_line(ckpt: Run, tmp_path: Path) -> None:
    path, back = tmp_path / "recipe.toml", tmp_path / "back.toml"
    Recipe((step("strip_prefix"), step("rename", pairs=["layers.{n}=blocks.{n+1}", "fc=head"]))).save(path)
    source, out = save_zip(trained(), tmp_path), tmp_path / "out.pth"
    assert ckpt("apply", path, source, out).status == 0
    ran = ckpt("recipe", "invert", path)
    assert ran.status == 2
    assert "give them" in ran.err
    ran = ckpt("recipe", "invert", path, "--keys", source)
    assert ran.status == 0
    assert ckpt("recipe", "invert", path, "--keys", source, "--out", back).status == 0
    assert back.read_text("utf-8") == ran.out
    assert ckpt("recipe", "invert", path, "--keys", source, "--out", back).status == 2  # it is there already
    assert ckpt("recipe", "invert", path, "--keys", source, "--out", back, "--force").status == 0
    assert ckpt("apply", back, out, tmp_path / "again.pth").status == 0
    assert_same(torch.load(tmp_path / "again.pth"), trained())


# -- one name and one set of arguments


def test_every_edit_is_a_function_a_command_and_a_step_with_the_same_arguments() -> None:
    context = cli.make_context("ckpt", ["ls"], resilient_parsing=True)
    for name, edit in EDITS.items():
        public = getattr(ckpt_surgeon, name, None) or getattr(ckpt_surgeon, f"{name}_")
        assert public is edit
        command = cli.get_command(context, name.replace("_", "-"))
        assert isinstance(command, click.Command)
        options = {option for parameter in command.params for option in parameter.opts}
        for argument in parameters(name):
            spelled = "inputs" if edit.arguments[argument].is_input else argument.removesuffix("_").replace("_", "-")
            assert f"--{spelled}" in options or spelled in options or argument in options, f"{name} {argument}"
        assert len({parameter.name for parameter in command.params}) == len(command.params), name


FULL: dict[str, dict[str, object]] = {
    "strip_prefix": {"prefix": "m.", "wrappers": True, "allow_unmatched": True, "on_collision": "first"},
    "add_prefix": {"prefix": "m"},
    "rename": {"pairs": ["a=b"], "regex": True, "allow_unmatched": True, "on_collision": "last"},
    "keep": {"patterns": ["*"], "allow_unmatched": True},
    "drop": {"patterns": ["x"], "derivable": True, "allow_unmatched": True},
    "select": {"prefix": "m"},
    "cast": {"dtype": "bf16", "only": ["*"], "except": ["x"], "integers": True, "statistics": True, "allow_inf": True,
             "allow_codes": True, "allow_unmatched": True},
    "scale": {"patterns": ["m.w"], "factor": 2.0},
    "reshape": {"patterns": ["m.w"], "shape": [6, 4]},
    "transpose": {"patterns": ["m.w"], "dims": [1, 0]},
    "slice": {"patterns": ["m.w"], "start": 0, "stop": 3, "dim": 1, "step": 2},
    "pad": {"patterns": ["m.w"], "before": 1, "after": 2, "dim": 1, "value": 0.5},
    "concat": {"sources": ["m.w", "m.v"], "into": "m.x", "dim": 1, "groups": 2},
    "split": {"source": "m.w", "into": ["m.x", "m.y"], "dim": 1, "sizes": [4, 2], "groups": 2, "parts": 2},
    "fold": {"patterns": ["*"], "allow_unmatched": True},
    "dequantize": {"patterns": ["*"], "dtype": "bf16", "block": [4, 6], "gptq_v2": True, "allow_unmatched": True},
}  # fmt: skip


@pytest.mark.parametrize("name", FULL)
def test_a_command_with_every_option_does_what_the_step_and_the_function_do(
    name: str, ckpt: Run, tmp_path: Path
) -> None:
    state = {"m.w": ramp(4, 6), "m.v": ramp(4, 6) + 1}
    arguments = FULL[name]
    assert set(arguments) == {argument.removesuffix("_") for argument in parameters(name)}  # none is left out
    text = "[[edit]]\n" + "".join(
        f"{key} = {json.dumps(value)}\n" for key, value in {"do": name.replace("_", "-"), **arguments}.items()
    )
    wanted = EDITS[name](state, **{"except_" if key == "except" else key: value for key, value in arguments.items()})
    assert_same(Recipe.loads(text).apply(state), wanted)
    words: list[str] = []
    for key, value in arguments.items():
        flag = f"--{key.replace('_', '-')}"
        if key in ("patterns", "pairs"):
            words += map(str, value) if isinstance(value, list) else []
        elif value is True:
            words.append(flag)
        elif isinstance(value, list) and key in ("only", "except"):
            words += [word for one in value for word in (flag, one)]
        else:
            words += [flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    source, out = save_zip(state, tmp_path), tmp_path / "out.pth"
    ran = ckpt(name.replace("_", "-"), source, out, *words)
    assert ran.status == 0, ran.err
    assert_same(torch.load(out), wanted)


def test_a_mapping_from_old_to_new_is_the_same_in_all_three(ckpt: Run, tmp_path: Path) -> None:
    state = {"a.w": ramp(2), "b.w": ramp(3)}
    wanted: Mapping[str, torch.Tensor] = rename(state, {"a": "b", "b": "a"})
    recipe = Recipe((step("rename", pairs={"a": "b", "b": "a"}),))
    assert_same(recipe.apply(state), wanted)
    source = save_zip(state, tmp_path)
    assert ckpt("rename", source, tmp_path / "out.pth", "a=b", "b=a").status == 0
    assert_same(torch.load(tmp_path / "out.pth"), wanted)
