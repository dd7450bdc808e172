"""Who may import whom, and that torch stays outside of everything that only moves bytes."""

from __future__ import annotations

import ast
import doctest
import importlib
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from inspect import isclass, ismodule
from pathlib import Path
from types import ModuleType

import pytest
import torch
from loaded import HEAVY, loaded_after, loaded_by, loaded_by_all
from tables import TABLE, save_legacy, save_safetensors, save_shards, save_zip

import ckpt_surgeon

PACKAGE = Path(ckpt_surgeon.__file__).parent

# The floors of the house: what each may import, in whatever way: at the top, inside a function, for types only.
GROUND = {"hooks", "errors", "text", "key_patterns", "safe_text"}
BELOW: dict[str, set[str]] = {
    "hooks": set(),
    "safe_text": set(),
    "errors": {"safe_text"},
    "text": {"hooks", "safe_text"},
    "key_patterns": set(),
    "files": {"errors", "text", "safe_text"},
    "tensors": {"hooks", "errors", "text", "files"},
    "formats": {"errors", "text", "files", "tensors"},
    "edits": GROUND | {"files", "tensors"},
    "reading": GROUND | {"files", "tensors", "formats", "edits"},
    "writing": GROUND | {"files", "tensors", "formats", "edits", "reading"},
    "models": GROUND | {"files", "tensors", "edits", "reading"},
    "training": GROUND | {"files", "tensors", "edits", "reading", "models"},
    "runs": GROUND | {"files", "tensors", "formats", "edits", "reading", "writing", "models"},
    "report": GROUND | {"files", "tensors", "formats", "edits", "reading", "writing", "models", "runs", "training"},
    "cli": GROUND
    | {"files", "tensors", "formats", "edits", "reading", "writing", "models", "runs", "training", "report"},
    "__main__": {"cli"},
}


# -- what each module imports, read from its source


@cache
def sources() -> dict[str, ast.Module]:
    """Every module by its dotted name below the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def area(module: str) -> str:
    """A module's place in the drawing: a folder of peers counts as one."""
    return module.partition(".")[0]


def imports(tree: ast.AST, *, nested: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports of a module: all that are written in it, or those that are carried out when it is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif not nested and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imports(ast.Module(node.orelse, []), nested=nested)
        elif nested or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from imports(node, nested=nested)


def own_imports(module: str) -> set[str]:
    """The modules of this package that one of them imports anywhere, by their names below the package."""
    is_folder = (PACKAGE / Path(*module.split("."))).is_dir()
    found = set()
    for node in imports(sources()[module], nested=True):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[2] for name in node.names if area(name.name) == PACKAGE.name}
            continue
        if node.level == 0 and area(node.module or "") != PACKAGE.name:
            continue
        here = module.split(".") if is_folder else module.split(".")[:-1]
        base = [] if node.level == 0 else here[: len(here) - node.level + 1]
        path = [*base, *filter(None, (node.module or "").split("."))]
        path = path[1:] if node.level == 0 else path
        names = {".".join([*path, name.name]) for name in node.names}
        found |= {name if name in sources() else ".".join(path) for name in names}
    return found - {module, ""}


# -- the directions


def test_every_floor_imports_only_what_is_below_it() -> None:
    wrong = [
        f"{module} imports {name}"
        for module in sources()
        if module != "__init__"  # the public face sees everything
        for name in own_imports(module)
        if area(name) not in BELOW[area(module)] | {area(module)}
    ]
    assert wrong == []


def test_every_folder_and_module_at_the_top_has_its_floor() -> None:
    assert {area(module) for module in sources()} - {"__init__"} == set(BELOW)


def test_no_imports_run_in_a_circle() -> None:
    graph = {module: own_imports(module) for module in sources() if module != "__init__"}
    done: set[str] = set()
    while ready := {module for module, needs in graph.items() if module not in done and needs <= done}:
        done |= ready
    assert set(graph) - done == set()


def test_no_module_imports_torch_or_numpy_at_its_top_level() -> None:
    for module, tree in sources().items():
        for node in imports(tree, nested=False):
            if isinstance(node, ast.Import):
                names = {area(name.name) for name in node.names}
            else:
                names = {area(node.module or "")} if node.level == 0 else set()
            assert names.isdisjoint(HEAVY), module


# -- what is loaded when a command runs


def test_importing_the_package_does_not_import_torch() -> None:
    assert loaded_after("import ckpt_surgeon") == set()


def test_opening_and_editing_do_not_import_torch(tmp_path: Path) -> None:
    path = save_zip({**TABLE["tied"](), **TABLE["large strided"]()}, tmp_path)
    script = (
        "import ckpt_surgeon\n"
        "edited = ckpt_surgeon.add_prefix(ckpt_surgeon.open(sys.argv[1]), 'x.')\n"
        "ckpt_surgeon.diff(edited, edited)\n"
        "ckpt_surgeon.save(edited, sys.argv[2])"
    )
    assert loaded_after(script, path, tmp_path / "out.safetensors") == set()


def test_ls_does_not_import_torch(tmp_path: Path) -> None:
    state = {**TABLE["tied"](), **TABLE["transposed"]()}
    paths = [save(state, tmp_path) for save in (save_zip, save_legacy, save_safetensors)]
    paths.append(save_shards(state, tmp_path, ".safetensors"))
    commands = (["ls"], ["ls", "--json"], ["ls", "--check"])
    assert loaded_by_all([*words, path] for words in commands for path in paths) == set()


@pytest.mark.parametrize(("words", "threads"), [([], set()), (["--max-shard-size", "16B"], {"concurrent.futures"})])
def test_commands_from_file_to_file_do_not_import_torch(words: list[str], threads: set[str], tmp_path: Path) -> None:
    state = {**TABLE["tied"](), **TABLE["transposed"](), **TABLE["bfloat16 stepped"]()}
    path = save_zip({f"module.{key}": tensor for key, tensor in state.items()}, tmp_path)
    commands = [
        [command, path, tmp_path / f"{command}{suffix}", *words]
        for command in ("strip-prefix", "convert")
        for suffix in (".pth", ".safetensors")
    ]
    assert loaded_by_all(commands) == threads


# What commands from file to file that compute import, beside what all commands do.
COMPUTING: dict[str, list[str]] = {
    "": ["concat --sources w,v --into wv --dim 1", "resize-rows w --rows 2", "reshape w --shape 3,4"],
    "numpy": [
        "cast --dtype bf16", "cast --dtype fp16", "cast --dtype int32", "cast --dtype float64", "scale w --factor 0.5",
        "pad w --after 2", "resize-rows w --rows 9 --fill zero", "dequantize --dtype fp32", "dequantize",
    ],
    "numpy ml_dtypes": ["cast --dtype float8_e4m3fn", "cast --dtype float8_e5m2"],
    "numpy torch": ["resize-rows w --rows 9 --fill mean", "resize-grid w --grid 2x2:3x3"],
}  # fmt: skip


@pytest.mark.parametrize("imported", COMPUTING)
def test_commands_that_compute_import_numpy_and_torch_only_for_what_only_torch_does(
    imported: str, tmp_path: Path
) -> None:
    codes = {"q.weight": torch.ones(4, 3, dtype=torch.int8), "q.weight_scale": torch.ones(4, 1)}
    path = save_zip({"w": torch.ones(4, 3), "v": torch.ones(4, 2), **codes}, tmp_path)
    outs = [tmp_path / f"{number}.safetensors" for number in range(len(COMPUTING[imported]))]
    split = [words.split() for words in COMPUTING[imported]]
    loaded = loaded_by_all([words[0], path, out, *words[1:]] for words, out in zip(split, outs, strict=True))
    assert loaded & {"torch", "numpy", "ml_dtypes"} == set(imported.split())
    assert all(out.exists() for out in outs)


def test_sums_and_differences_of_values_do_not_import_torch(tmp_path: Path) -> None:
    path = save_safetensors({"w": torch.ones(3), "h": torch.ones(3, dtype=torch.float16)}, tmp_path)
    other = save_zip({"w": torch.zeros(3), "h": torch.ones(3, dtype=torch.bfloat16)}, tmp_path)
    assert loaded_by("ls", "--stats", path) == {"numpy"}
    assert loaded_by_all([["diff", "--values", path, other]]) == {"numpy"}
    assert loaded_by("hash", path) == set()


def test_comparing_two_files_does_not_import_torch(tmp_path: Path) -> None:
    assert loaded_by("diff", save_zip(TABLE["dense"](), tmp_path), save_safetensors(TABLE["tied"](), tmp_path)) == set()


def test_renaming_in_place_does_not_import_torch(tmp_path: Path) -> None:
    state = {f"module.{key}": tensor for key, tensor in TABLE["dense"]().items()}
    paths = [save(state, tmp_path) for save in (save_zip, save_safetensors)]
    renamed = [["strip-prefix", "--in-place", path] for path in paths]
    assert loaded_by_all([*renamed, *(["recover", path] for path in paths)]) == set()


def test_help_does_not_import_torch() -> None:
    assert loaded_by_all([["--help"], ["ls", "--help"], ["diff", "--help"], ["--version"]]) == set()


# -- the public face


def imported(module: str) -> ModuleType:
    """A module of this package; the one that would start the command line is left alone."""
    return importlib.import_module(f"ckpt_surgeon.{module}") if module not in ("__init__", "__main__") else ckpt_surgeon


def test_every_public_name_is_there_and_listed_once() -> None:
    assert sorted(set(ckpt_surgeon.__all__)) == sorted(ckpt_surgeon.__all__)
    for name in ckpt_surgeon.__all__:
        assert hasattr(ckpt_surgeon, name), name


def test_no_public_name_is_hidden_by_a_module_of_the_same_name() -> None:
    for module in sources():
        imported(module)
    assert [name for name in ckpt_surgeon.__all__ if ismodule(getattr(ckpt_surgeon, name))] == []


def test_type_checkers_and_the_interpreter_find_the_same_public_names_in_the_same_modules() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imported = {
        name.name: node.module for node in blocks[0].body if isinstance(node, ast.ImportFrom) for name in node.names
    }
    assert imported == ckpt_surgeon._HOME_OF
    assert set(imported) == set(ckpt_surgeon.__all__)


def test_a_public_name_is_what_its_module_defines() -> None:
    for name, home in ckpt_surgeon._HOME_OF.items():
        assert getattr(ckpt_surgeon, name) is getattr(imported(home), name)


def test_dir_lists_every_public_name_and_a_wrong_name_is_an_attribute_error() -> None:
    assert set(ckpt_surgeon.__all__) <= set(dir(ckpt_surgeon))
    wrong = "no_such_name"
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        getattr(ckpt_surgeon, wrong)


def test_importing_the_package_imports_none_of_its_folders() -> None:
    script = "import sys, ckpt_surgeon; print(*(name for name in sys.modules if name.startswith('ckpt_surgeon')))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"ckpt_surgeon", "ckpt_surgeon.hooks"}


def test_ls_imports_neither_models_nor_training_nor_writing(tmp_path: Path) -> None:
    path = save_zip(TABLE["dense"](), tmp_path)
    script = (
        "import sys\nfrom ckpt_surgeon.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    print('loaded:', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script, "ls", path], capture_output=True, text=True, check=True)
    loaded = [name for name in done.stdout.splitlines()[-1].split() if name.startswith("ckpt_surgeon.")]
    assert {name.split(".")[1] for name in loaded}.isdisjoint({"models", "training", "writing"})


@pytest.mark.parametrize("name", ckpt_surgeon.__all__)
def test_every_public_name_says_what_it_is_and_every_function_shows_it(name: str) -> None:
    thing = getattr(ckpt_surgeon, name)
    assert thing.__doc__
    if not isclass(thing):
        assert doctest.DocTestParser().get_examples(thing.__doc__), name


def test_every_module_says_what_it_is_for() -> None:
    for module in sources():
        assert module == "__main__" or imported(module).__doc__, module


def test_the_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").exists()
