"""Who may import whom, and that torch stays outside of everything that only moves bytes."""

from __future__ import annotations

import ast
import doctest
import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from inspect import isclass, ismodule
from pathlib import Path
from types import ModuleType

import pytest
from tables import TABLE, StateDict, save_legacy, save_safetensors, save_shards, save_zip

import ckpt_surgeon

PACKAGE = Path(ckpt_surgeon.__file__).parent
HEAVY = ("torch", "numpy", "safetensors", "torchvision", "tqdm", "fsspec", "asyncio", "concurrent.futures")

# What may be imported by the modules that everything stands on; those that are not named here are free in what they
# use below themselves, as long as no circle closes.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "dtypes": set(),
    "key_patterns": set(),
    "troubles": {"errors"},
    "remote": {"errors", "troubles"},
    "readahead": {"errors", "remote"},
    "places": {"errors", "remote", "readahead"},
    "tensors": {"errors", "dtypes", "remote", "readahead"},
    "checkpoint": {"errors", "dtypes", "tensors", "remote"},
    "journal": {"errors"},
    "formats": {"errors", "dtypes", "tensors", "journal", "remote", "readahead", "places", "troubles"},
    "remote_writing": {"errors", "formats", "remote", "tensors", "troubles"},
    "renaming": {"errors"},
    "edits": {"errors", "dtypes", "tensors", "checkpoint", "renaming"},
    "align": {"errors", "dtypes", "tensors", "checkpoint", "edits"},
    "diff": {"errors", "dtypes", "tensors", "checkpoint", "edits", "align", "targets", "models"},
    "targets": {"errors", "dtypes"},
}


# The modules whose records are shown by str(), in notebooks too.
TELLING = ("loading", "freezing", "grouping", "initializing")


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
    """The imports that are carried out: at the top level, or also in functions; not those for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imports(ast.Module(node.orelse, []), nested=nested)
        elif nested or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from imports(node, nested=nested)


def own_imports(module: str, *, nested: bool = True) -> set[str]:
    """The modules of this package that one of them imports, by their names below the package."""
    is_folder = (PACKAGE / Path(*module.split("."))).is_dir()
    found = set()
    for node in imports(sources()[module], nested=nested):
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
    return found - {module}


# -- the directions


@pytest.mark.parametrize("place", ALLOWED)
def test_what_everything_stands_on_imports_only_what_is_below_it(place: str) -> None:
    for module in filter(lambda module: area(module) == place, sources()):
        assert {area(name) for name in own_imports(module)} - {place} <= ALLOWED[place], module


def test_formats_and_edits_never_see_each_other() -> None:
    def seen(start: str) -> set[str]:
        ahead, found = [module for module in sources() if area(module) == start], set()
        while ahead:
            module = ahead.pop()
            if module not in found and module:
                found.add(module)
                ahead.extend(own_imports(module))
        return {area(module) for module in found}

    assert "edits" not in seen("formats")
    assert "formats" not in seen("edits")


def test_only_the_command_line_makes_text_and_nothing_imports_the_command_line() -> None:
    tables = {"report", "training_report"}
    for module in sources():
        if area(module) not in ("cli", "training_report"):  # a record's str() is its table
            at_top = tables & own_imports(module, nested=False)
            inside = tables & own_imports(module) if area(module) not in TELLING else set()
            assert not at_top | inside, module
        if area(module) not in ("cli", "__main__"):
            assert "cli" not in {area(name) for name in own_imports(module)}, module


def test_no_imports_run_in_a_circle() -> None:
    graph = {module: {name for name in own_imports(module, nested=False) if name} for module in sources() if module}
    # a folder's own list of its peers looks at them, and they look at one another, never at the list
    done: set[str] = set()
    while ready := {module for module, needs in graph.items() if module not in done and needs <= done}:
        done |= ready
    assert set(graph) - done - {"__init__"} == set()


def test_no_module_imports_torch_or_numpy_at_its_top_level() -> None:
    for module, tree in sources().items():
        for node in imports(tree, nested=False):
            if isinstance(node, ast.Import):
                names = {area(name.name) for name in node.names}
            else:
                names = {area(node.module or "")} if node.level == 0 else set()
            assert names.isdisjoint(HEAVY), module


# -- what is loaded when a command runs


def loaded_after(script: str, *words: object) -> set[str]:
    """The heavy packages that a new process has loaded after a few lines of Python."""
    tail = f"\nprint('loaded:', *({set(HEAVY)!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", "import sys\n" + script + tail, *map(str, words)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


def loaded_by(*words: object) -> set[str]:
    """The heavy packages that a command loads."""
    script = (
        "from ckpt_surgeon.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as ended:\n    assert ended.code in (0, 1), ended.code\n"
    )
    return loaded_after(script, *words)


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


@pytest.mark.parametrize("save", [save_zip, save_legacy, save_safetensors, "shards"])
@pytest.mark.parametrize("words", [["ls"], ["ls", "--json"], ["ls", "--check"]], ids=" ".join)
def test_ls_does_not_import_torch(words: list[str], save: object, tmp_path: Path) -> None:
    state = {**TABLE["tied"](), **TABLE["transposed"]()}
    path = save(state, tmp_path) if callable(save) else save_shards(state, tmp_path, ".safetensors")
    assert loaded_by(*words, path) == set()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("words", [["strip-prefix"], ["convert"], ["convert", "--max-shard-size", "16B"]], ids=" ".join)
def test_commands_from_file_to_file_do_not_import_torch(words: list[str], suffix: str, tmp_path: Path) -> None:
    state = {**TABLE["tied"](), **TABLE["transposed"](), **TABLE["bfloat16 stepped"]()}
    path = save_zip({f"module.{key}": tensor for key, tensor in state.items()}, tmp_path)
    threads = {"concurrent.futures"} if "--max-shard-size" in words else set()
    assert loaded_by(*words, path, tmp_path / f"out{suffix}") == threads


def test_comparing_two_files_does_not_import_torch(tmp_path: Path) -> None:
    assert loaded_by("diff", save_zip(TABLE["dense"](), tmp_path), save_safetensors(TABLE["tied"](), tmp_path)) == set()


@pytest.mark.parametrize("save", [save_zip, save_safetensors])
def test_renaming_in_place_does_not_import_torch(save: Callable[[StateDict, Path], Path], tmp_path: Path) -> None:
    path = save({f"module.{key}": tensor for key, tensor in TABLE["dense"]().items()}, tmp_path)
    assert loaded_by("strip-prefix", "--in-place", path) == set()
    assert loaded_by("recover", path) == set()


@pytest.mark.parametrize("words", [["--help"], ["ls", "--help"], ["diff", "--help"], ["--version"]], ids=" ".join)
def test_help_does_not_import_torch(words: list[str]) -> None:
    assert loaded_by(*words) == set()


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


def test_nothing_public_is_missing_from_the_list() -> None:
    tree = sources()["__init__"] if "__init__" in sources() else ast.parse((PACKAGE / "__init__.py").read_text())
    imported = {
        name.asname or name.name for node in tree.body if isinstance(node, ast.ImportFrom) for name in node.names
    }
    assert imported - set(ckpt_surgeon.__all__) == set()


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
