"""Targets are real models: torchvision's, torch's own, and small files written beside the test."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

import pytest
import torch
import torchvision

from ckpt_surgeon.errors import TargetError
from ckpt_surgeon.models.targets import Expected, build, expected, is_model, resolve
from ckpt_surgeon.tensors.dtypes import BY_NAME, EXTRA_STATE

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a file under the current directory, which is empty at first."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("import torch\nfrom torch import nn\n" + text)
        return path

    return write


def module(target: str) -> torch.nn.Module:
    built = build(target)
    assert isinstance(built, torch.nn.Module)
    return built


def problem(target: str) -> str:
    """What is wrong with a target; always one line."""
    with pytest.raises(TargetError) as caught:
        resolve(target)
    assert caught.value.target == target
    assert "\n" not in str(caught.value)
    return "; ".join(filter(None, (caught.value.problem, str(caught.value.remedy))))


# What a model expects


def test_a_torchvision_model_expects_what_its_state_dict_has() -> None:
    state = torchvision.models.resnet18(num_classes=10).state_dict()
    entries = resolve("torchvision.models:resnet18(num_classes=10)")
    assert list(entries) == list(state)
    assert {key: entry.shape for key, entry in entries.items()} == {key: tuple(t.shape) for key, t in state.items()}
    assert {key: f"torch.{entry.dtype}" for key, entry in entries.items()} == {
        key: str(tensor.dtype) for key, tensor in state.items()
    }


def test_parameters_are_told_from_buffers() -> None:
    model = torchvision.models.resnet18()
    entries = expected(model)
    assert [key for key, entry in entries.items() if entry.parameter] == [name for name, _ in model.named_parameters()]
    assert entries["bn1.num_batches_tracked"] == Expected(BY_NAME["int64"], (), False)
    assert entries["bn1.weight"] == Expected(BY_NAME["float32"], (64,), True)


def test_a_parameter_that_a_hook_renames_is_still_a_parameter() -> None:
    model = torch.nn.Linear(2, 2)

    def rename(module: torch.nn.Module, state: dict[str, torch.Tensor], prefix: str, metadata: object) -> None:
        state["renamed"] = state.pop("weight")

    model.register_state_dict_post_hook(rename)
    assert {key: entry.parameter for key, entry in expected(model).items()} == {"bias": True, "renamed": True}


def test_tied_weights_are_expected_under_both_names() -> None:
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(7, 3), "head": torch.nn.Linear(3, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    assert {key: entry.shape for key, entry in expected(model).items()} == {
        "embed.weight": (7, 3),
        "head.weight": (7, 3),
    }


def test_an_extra_state_that_the_model_gives_and_does_not_take_is_not_expected() -> None:
    class Versioned(torch.nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"version": 3}

    model = Versioned(2, 2)
    assert "_extra_state" in model.state_dict()
    assert list(expected(model)) == ["weight", "bias"]


def test_an_extra_state_that_the_model_takes_is_expected_whatever_it_holds() -> None:
    class Versioned(torch.nn.Linear):
        def get_extra_state(self) -> torch.Tensor:
            return torch.ones(3)

        def set_extra_state(self, state: object) -> None:
            pass

    assert expected(Versioned(2, 2))["_extra_state"] == Expected(EXTRA_STATE, (), False)


def test_buffers_that_are_not_saved_are_not_expected() -> None:
    model = torch.nn.Module()
    model.register_buffer("kept", torch.zeros(2))
    model.register_buffer("made_anew", torch.zeros(2), persistent=False)
    assert list(expected(model)) == ["kept"]


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float8_e4m3fn", "complex64", "uint8", "bool"])
def test_every_kind_of_dtype_is_found_in_the_table(name: str) -> None:
    model = torch.nn.Module()
    model.register_buffer("table", torch.empty(3, dtype=getattr(torch, name)))
    assert expected(model)["table"].dtype is BY_NAME[name]


def test_a_lazy_module_has_no_shapes_to_expect() -> None:
    with pytest.raises(TargetError, match=r"LazyLinear: 'weight', 'bias' have no shape yet; run a forward pass first"):
        expected(torch.nn.LazyLinear(3))


def test_a_model_without_tensors_expects_nothing() -> None:
    assert resolve("torch.nn:ReLU") == {}


# What a target may be


def test_a_class_is_called_without_arguments(write: Write) -> None:
    write("plain_class.py", "class Net(nn.Linear):\n    def __init__(self, n=4): super().__init__(n, n)\n")
    assert resolve("plain_class:Net")["weight"].shape == (4, 4)
    assert resolve("plain_class:Net()")["weight"].shape == (4, 4)
    assert resolve("plain_class:Net (5) ")["weight"].shape == (5, 5)


def test_a_class_method_is_a_factory(write: Write) -> None:
    write("method.py", "class Net(nn.Linear):\n    @classmethod\n    def wide(cls, n): return cls(n, 9)\n")
    assert resolve("method.py:Net.wide(n=2)")["weight"].shape == (9, 2)


def test_a_model_that_exists_is_used_as_it_is(write: Write) -> None:
    write("instance.py", "net = nn.Linear(2, 2)\n")
    assert module("instance:net") is sys.modules["instance"].net


def test_a_dict_of_tensors_is_used_as_it_is(write: Write) -> None:
    write("mapping.py", "state = nn.Linear(2, 3).half().state_dict()\n")
    assert build("mapping:state") is sys.modules["mapping"].state
    assert resolve("mapping:state")["weight"] == Expected(BY_NAME["float16"], (3, 2), True)


def test_a_factory_may_return_a_dict_of_tensors_with_an_extra_state(write: Write) -> None:
    write("returns_dict.py", "def make(): return {'w': torch.zeros(2), 'sub._extra_state': {'version': 1}}\n")
    built = build("returns_dict.py:make")
    assert isinstance(built, Mapping)
    assert list(built) == ["w", "sub._extra_state"]
    assert resolve("returns_dict.py:make")["sub._extra_state"] == Expected(EXTRA_STATE, (), False)


def test_arguments_are_literals_of_every_kind(write: Write) -> None:
    write(
        "literals.py",
        "def make(*args, **kwargs):\n"
        "    assert args == (1, -2.5, 'a:b(c)', None, True, b'x')\n"
        "    assert kwargs == {'sizes': [1, (2, 3)], 'table': {'a': {1, 2}}, 'é': 1 + 2j}\n"
        "    return nn.Linear(1, 1)\n",
    )
    call = "1, -2.5, 'a:b(c)', None, True, b'x', sizes=[1, (2, 3)], table={'a': {1, 2}},\n é=1+2j"
    assert list(resolve(f"literals.py:make({call})")) == ["weight", "bias"]


def test_a_file_may_import_what_lies_beside_it(write: Write) -> None:
    write("nets/blocks_beside.py", "WIDTH = 6\n")
    write("nets/model.py", "from blocks_beside import WIDTH\ndef make(): return nn.Linear(WIDTH, 1)\n")
    assert resolve("nets/model.py:make")["weight"].shape == (1, 6)


def test_a_file_may_import_what_lies_beside_it_as_late_as_in_the_factory(write: Write) -> None:
    write("nets/blocks_late.py", "WIDTH = 5\n")
    write("nets/model.py", "def make():\n    from blocks_late import WIDTH\n    return nn.Linear(WIDTH, 1)\n")
    assert resolve("nets/model.py:make")["weight"].shape == (1, 5)


def test_two_files_get_the_siblings_of_their_own_folders(write: Write) -> None:
    for folder, width in (("old", 3), ("new", 4)):
        write(f"{folder}/sibling/__init__.py", "from .size import WIDTH\n")
        write(f"{folder}/sibling/size.py", f"WIDTH = {width}\n")
        write(f"{folder}/model.py", "import sibling\ndef make(): return nn.Linear(sibling.WIDTH, 1)\n")
    assert resolve("old/model.py:make")["weight"].shape == (1, 3)
    assert resolve("new/model.py:make")["weight"].shape == (1, 4)


def test_a_module_in_the_current_directory_can_be_imported_by_a_file_elsewhere(write: Write) -> None:
    write("in_current.py", "WIDTH = 7\n")
    write("deep/model.py", "from in_current import WIDTH\ndef make(): return nn.Linear(WIDTH, 1)\n")
    assert resolve("deep/model.py:make")["weight"].shape == (1, 7)


def test_an_absolute_path_will_do(write: Write) -> None:
    path = write("somewhere/model.py", "def make(): return nn.Linear(2, 2)\n")
    assert list(resolve(f"{path}:make")) == ["weight", "bias"]


def test_a_file_named_as_a_module_of_python_replaces_nothing(write: Write) -> None:
    write("json.py", "def make(): return nn.Linear(2, 2)\n")
    assert list(resolve("json.py:make")) == ["weight", "bias"]
    assert sys.modules["json"] is json


def test_the_import_path_is_as_before_afterwards(write: Write) -> None:
    write("nets/model.py", "import sys\nsys.path.append('/added')\ndef make(): return nn.Linear(2, 2)\n")
    before = list(sys.path)
    try:
        resolve("nets/model.py:make")
        assert sys.path == [*before, "/added"]
    finally:
        sys.path[:] = before


# How it is built


def test_a_model_is_built_on_the_meta_device() -> None:
    assert {tensor.device.type for tensor in module("torchvision.models:resnet18").state_dict().values()} == {"meta"}


def test_a_model_of_seventy_billion_parameters_costs_no_memory(write: Write) -> None:
    write("huge.py", "def make(): return nn.Sequential(*(nn.Linear(28672, 28672) for _ in range(86)))\n")
    entries = resolve("huge.py:make")
    assert sum(prod(entry.shape) for entry in entries.values()) > 70e9


LINSPACE = """
class Net(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        for rate in [step.item() for step in torch.linspace(0, 1, depth)]:
            self.register_buffer(f"rate{rate:g}".replace(".", "_"), torch.full((2,), rate))
"""


def test_a_model_that_needs_values_is_built_on_the_cpu(write: Write) -> None:
    write("values.py", LINSPACE)
    with torch.device("meta"), pytest.raises(RuntimeError):
        torch.linspace(0, 1, 3)[0].item()
    built = module("values.py:Net(depth=3)")
    assert list(built.state_dict()) == ["rate0", "rate0_5", "rate1"]
    assert {tensor.device.type for tensor in built.state_dict().values()} == {"cpu"}


def test_a_factory_that_calls_exit_on_the_meta_device_only_is_given_its_second_chance(write: Write) -> None:
    write("exits.py", "def make():\n    if torch.zeros(1).is_meta: raise SystemExit(1)\n    return nn.Linear(1, 1)\n")
    assert list(resolve("exits.py:make")) == ["weight", "bias"]


def test_what_the_code_prints_goes_to_stderr(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    write(
        "prints.py",
        "print('imported')\n"
        "class Net(nn.Linear):\n"
        "    def __init__(self): super().__init__(1, 1); print('built')\n"
        "    def state_dict(self, **kwargs): print('read'); return super().state_dict(**kwargs)\n",
    )
    resolve("prints.py:Net")
    assert capsys.readouterr() == ("", "imported\nbuilt\nread\n")


def test_warnings_are_left_as_they_are(write: Write) -> None:
    write("warns.py", "import warnings\nwarnings.warn('old', UserWarning)\ndef make(): return nn.Linear(1, 1)\n")
    with pytest.warns(UserWarning, match="old"):
        resolve("warns.py:make")


# What goes wrong


@pytest.mark.parametrize(
    "target",
    ["resnet18", "", ":", "a:", ":b", "nets/model:Net", "a.b:1", "a:b)", "a:b[0]", "https://a.org/b", "a b:c"],
)
def test_another_spelling_is_refused_with_the_right_ones(target: str) -> None:
    assert not is_model(target)
    assert problem(target).startswith("is not spelled package.module:factory or path/file.py:factory")


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("nn.ReLU", "nn.ReLU"),
        ("act=relu", "act=relu"),
        ("1, open('x')", "open('x')"),
        ("*[1, 2]", "*[1, 2]"),
        ("**{'a': 1}", "**{'a': 1}"),
        ("size=2*3", "size=2*3"),
        ("f'{1}'", "f'{1}'"),
        ("{[]: 1}", "{[]: 1}"),
        ("i for i in 'ab'", "(i for i in 'ab')"),
    ],
)
def test_only_literals_are_arguments(argument: str, text: str) -> None:
    message = problem(f"torch.nn:Linear({argument})")
    assert message.startswith(f"the argument {text} is not a literal; only literals are allowed: numbers, strings")


@pytest.mark.parametrize("call", ["(1", "(1))", "(a b)", "(", "(\0)", "(1, a=2, 3)", "(" * 300, f"({'-' * 100_000}1)"])
def test_arguments_that_are_not_python_are_refused(call: str) -> None:
    assert is_model(f"torch.nn:Linear{call}")
    assert problem(f"torch.nn:Linear{call}").startswith(("the arguments cannot be read: ", "the argument …"))


@pytest.mark.parametrize("call", ["(1, 2).weight", "(1)(2)", "(1) + 1", "(1), 2", "(1)[0]", "(1) if 1 else 2"])
def test_nothing_may_follow_the_arguments(call: str) -> None:
    assert problem(f"torch.nn:Linear{call}") == "nothing may follow the arguments"


def test_an_argument_given_twice_is_refused() -> None:
    assert problem("torch.nn:Linear(1, bias=True, bias=False)") == "the argument 'bias' is given twice"


def test_wrong_arguments_are_the_factorys_to_refuse() -> None:
    message = problem("torch.nn:Linear(1, 2, sides=3)")
    assert message.startswith("building it failed: TypeError: ")
    assert "unexpected keyword argument 'sides'" in message


def test_a_module_that_is_missing_is_named_with_what_to_do() -> None:
    assert problem("quetzal_nets:Net") == (
        "there is no module 'quetzal_nets'; pip install quetzal_nets, or go to the folder that holds it"
    )
    assert problem("torchvison.models:resnet18") == "there is no module 'torchvison'; did you mean 'torchvision'?"


def test_a_submodule_that_is_missing_is_named_with_what_is_there() -> None:
    message = problem("torchvision.modles:resnet18")
    assert message == "there is no module 'modles' in torchvision; did you mean 'models'?"
    assert problem("json.decoder.deeper:x") == "there is no module 'deeper' in json.decoder"
    assert problem("json.q:x").startswith("there is no module 'q' in json; there are '")


def test_a_module_that_the_target_needs_is_told_from_the_target(write: Write) -> None:
    write("needs.py", "import quetzal.feathers\n")
    needed = "importing it needs 'quetzal', which is not there; pip install quetzal"
    assert problem("needs:Net") == needed
    assert problem("needs.py:Net") == needed


def test_a_name_that_is_missing_is_answered_with_what_is_there(write: Write) -> None:
    assert problem("torchvision.models:resnet81").startswith(
        "there is no 'resnet81' in torchvision.models; did you mean 'resnet18'"
    )
    write("two.py", "del torch, nn\ndef one(): pass\nclass Other: pass\n")
    assert problem("two.py:quetzal") == "there is no 'quetzal' in two.py; there are 'Other', 'one'"
    assert problem("two.py:Other.quetzal") == "there is no 'quetzal' in Other"


def test_a_file_that_is_missing_is_answered_with_what_is_there(write: Write) -> None:
    write("nets/unet.py", "")
    assert problem("nets/unnet.py:UNet") == "there is no file nets/unnet.py; did you mean 'unet.py'?"
    assert problem("nowhere/unet.py:UNet") == "there is no file nowhere/unet.py"


def test_a_file_that_imports_relatively_is_to_be_spelled_as_a_module(write: Write) -> None:
    write("package/__init__.py", "")
    write("package/part.py", "")
    write("package/model.py", "from .part import torch\ndef make(): return nn.Linear(1, 1)\n")
    assert problem("package/model.py:make").endswith(
        "spell it package.module:factory, in the folder that holds the package"
    )
    assert list(resolve("package.model:make")) == ["weight", "bias"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("raise ValueError('two\\n  lines')", "importing it failed: ValueError: two lines"),
        ("raise RuntimeError", "importing it failed: RuntimeError"),
        ("raise ImportError('no CUDA')", "importing it failed: ImportError: no CUDA"),
        ("import sys; sys.exit(3)", "importing it failed: SystemExit: 3"),
        ("def make(:", "importing it failed: SyntaxError: invalid syntax (fails.py, line 3)"),
        ("def make(): return 1 / 0", "building it failed: ZeroDivisionError: division by zero"),
        ("def make(): exit('enough')", "building it failed: SystemExit: enough"),
        ("def make(): raise KeyError('depth')", "building it failed: KeyError: 'depth'"),
    ],
)
def test_whatever_the_code_raises_becomes_one_line(write: Write, text: str, line: str) -> None:
    write("fails.py", text)
    assert problem("fails.py:make") == line


def test_a_very_long_message_is_cut(write: Write) -> None:
    write("long.py", "def make(): raise ValueError('word ' * 10_000)\n")
    assert len(problem("long.py:make")) < 600


def test_the_cause_is_kept_and_it_is_that_of_the_cpu(write: Write) -> None:
    write("causes.py", "def make(): raise ValueError(torch.zeros(1).device.type)\n")
    with pytest.raises(TargetError) as caught:
        build("causes.py:make")
    cause = caught.value.__cause__
    assert repr(cause) == "ValueError('cpu')"
    assert cause is not None
    assert cause.__context__ is None


def test_a_state_dict_that_fails_becomes_one_line(write: Write) -> None:
    write("state.py", "class Net(nn.Module):\n    def state_dict(self, **kwargs): raise OSError('gone')\n")
    assert problem("state.py:Net") == "reading its state_dict failed: OSError: gone"


def test_an_interrupt_is_not_held_back(write: Write) -> None:
    write("interrupted.py", "def make(): raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        build("interrupted.py:make")


def test_a_file_that_failed_can_be_mended_and_tried_again(write: Write) -> None:
    write("mended.py", "raise ValueError\n")
    assert problem("mended.py:make") == "importing it failed: ValueError"
    write("mended.py", "def make(): return nn.Linear(1, 1)  # longer, so that no stale bytecode is taken for it\n")
    assert list(resolve("mended.py:make")) == ["weight", "bias"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("None", "gives a NoneType, which is neither a model nor a dict of tensors"),
        ("(nn.Linear(1, 1), 224)", "gives a tuple, which is neither a model nor a dict of tensors"),
        ("nn.Linear", "gives a type, which is neither a model nor a dict of tensors"),
        ("{'epoch': 3, 'model': {}}", "gives a dict with entries that are no tensors: 'epoch', 'model'"),
        ("{1: 2}", "gives a dict with entries that are no tensors: '1'"),
        ("__import__('collections').OrderedDict()", "gives an OrderedDict without tensors"),
    ],
)
def test_a_factory_has_to_return_a_model_or_tensors(write: Write, text: str, line: str) -> None:
    write("returns.py", f"def make(): return {text}\n")
    assert problem("returns.py:make") == line


def test_what_cannot_be_called_is_refused(write: Write) -> None:
    write("objects.py", "net = nn.Linear(1, 1)\nstate = net.state_dict()\nWIDTH = 3\n")
    assert problem("objects.py:net(1)") == "net is a Linear and cannot be called; leave out the parentheses"
    assert problem("objects.py:state()").endswith("an OrderedDict and cannot be called; leave out the parentheses")
    assert problem("objects.py:WIDTH") == (
        "WIDTH is an int and cannot be called; name a class, a function, a model or a dict of tensors"
    )
    assert problem("torchvision:models").startswith("models is a module and cannot be called; name a class")


# Telling a model from a path


@pytest.mark.parametrize(
    "target",
    ["a:b", "a.b:c.d", "torchvision.models:resnet18(num_classes=10)", "my nets/x.py:f", "../x.py:Net()", "/a:b/x.py:f"],
)
def test_these_are_spelled_as_models(target: str) -> None:
    assert is_model(target)


@pytest.mark.parametrize("target", ["model.pth", "a/b.pth", "a/b:c", "s3://bucket/x", "", "x" * 5000, "a\0b"])
def test_these_are_not_spelled_as_models(target: str) -> None:
    assert not is_model(target)


def test_a_path_that_exists_is_never_a_model(write: Write) -> None:
    assert is_model("odd:name")
    write("odd:name", "")
    assert not is_model("odd:name")


def test_telling_a_model_from_a_path_does_not_import_torch() -> None:
    script = (
        "import sys\n"
        "from ckpt_surgeon.models.targets import is_model\n"
        "is_model('a:b')\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_nothing_is_warned_of_when_a_model_is_built() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve("torchvision.models:mobilenet_v3_small")
