"""Nothing from a file, or from its name, reaches the terminal unescaped; nothing that is secret in a URL is shown."""

from __future__ import annotations

import ast
import json
import pickle as op
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import fsspec
import pytest
import torch
from command_line import Ran, Run
from payloads import named, text
from safetensors.torch import save_file
from servers import web
from structures import checkpoint_records, dict_of, program, storage, tensor, zip_bytes_of

import ckpt_surgeon
from ckpt_surgeon import CheckpointError, FileError, RemotePath, cli
from ckpt_surgeon.files.paths import file_path
from ckpt_surgeon.safe_text import url_without_secrets, without_secrets
from ckpt_surgeon.text import command

# A title for the window, an overridden direction, a line of one's own, a new colour in one byte, half a surrogate pair.
EVIL = "\x1b]0;x\x07\u202e\nFORGED\r\x9b31m"
PACKAGE = Path(ckpt_surgeon.__file__).parent


def assert_harmless(ran: Ran) -> None:
    """The output is printable but for line feeds, none of which came from the file; no trouble is unexpected."""
    for stream in (ran.out, ran.err):
        assert all(line.isprintable() for line in stream.split("\n")), repr(stream)
        assert not re.search(r"^\W*FORGED", stream, re.M), stream
    assert "unexpected trouble" not in ran.err, ran.err
    assert ran.status in (0, 1, 2)


# -- files


def _training(folder: Path) -> Path:
    fc = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(fc.parameters(), lr=0.1)
    fc(torch.ones(2)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    state["param_groups"][0]["param_names"] = [f"{EVIL}fc.weight", "fc.bias"]
    weights = {f"{EVIL}fc.weight": fc.weight.detach(), "fc.bias": fc.bias.detach()}
    path = folder / f"last{EVIL}.ckpt"
    torch.save({"state_dict": weights, f"opt{EVIL}": state, f"name{EVIL}": f"value{EVIL}", "epoch": 3}, path)
    return path


def _two_parts(folder: Path) -> Path:
    path = folder / f"two{EVIL}.pth"
    parts = {f"{EVIL}{name}": {f"module.{EVIL}.weight": torch.ones(2, 2)} for name in "ab"}
    torch.save(parts, path)
    return path


def _devices(folder: Path) -> Path:
    weights = dict_of({f"{EVIL}w": tensor(storage(device=f"cuda:0{EVIL}")), "v": tensor(storage(device="cuda:1"))})
    kind = text(f"mod{EVIL}") + text(f"Net{EVIL}") + op.STACK_GLOBAL + op.EMPTY_TUPLE + op.NEWOBJ
    raw = program(dict_of({"model": weights, f"net{EVIL}": kind}), protocol=4)
    path = folder / "devices.pt"
    path.write_bytes(zip_bytes_of(checkpoint_records(raw, {"0": bytes(16)}, root=f"arch{EVIL}")))
    return path


def _globals(folder: Path) -> Path:
    raw = program(dict_of({"w": tensor(storage())}) + op.POP + named("posix", "system\x1b[31m") + text(EVIL) + op.TUPLE1
                  + op.REDUCE)  # fmt: skip
    path = folder / f"globals{EVIL}.pt"
    path.write_bytes(zip_bytes_of(checkpoint_records(raw, {"0": bytes(16)})))
    return path


def _without_storage(folder: Path) -> Path:
    raw = program(dict_of({f"w{EVIL}": tensor(storage(key=text(f"k{EVIL}")))}))
    path = folder / f"lost{EVIL}.pt"
    path.write_bytes(zip_bytes_of(checkpoint_records(raw, {}, root=f"arch{EVIL}")))
    return path


def _safetensors(folder: Path) -> Path:
    path = folder / f"st{EVIL}.safetensors"
    save_file({f"{EVIL}fc.weight": torch.ones(2, 2), "fc.bias": torch.ones(2)}, path, {f"meta{EVIL}": f"said{EVIL}"})
    return path


def _bad_dtype(folder: Path) -> Path:
    header = json.dumps({f"w{EVIL}": {"dtype": f"F32{EVIL}", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path = folder / f"dtype{EVIL}.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    return path


def _sharded(folder: Path) -> Path:
    inner = folder / f"shards{EVIL}"
    inner.mkdir()
    save_file({f"a{EVIL}": torch.ones(2)}, inner / f"one{EVIL}.safetensors")
    index = {"weight_map": {f"a{EVIL}": f"one{EVIL}.safetensors", "b": f"gone{EVIL}.safetensors"}}
    (inner / "model.safetensors.index.json").write_text(json.dumps(index))
    return inner


def _page(folder: Path) -> Path:
    path = folder / f"page{EVIL}.pth"
    path.write_text(f"<html>{EVIL}")
    return path


def _cut(folder: Path) -> Path:
    path = _training(folder)
    path.write_bytes(path.read_bytes()[:-100])
    return path


def _no_such(folder: Path) -> Path:
    (folder / f"gone{EVIL}.pth").write_bytes(b"")
    return folder / f"gone{EVIL}"


FILES = (_training, _two_parts, _devices, _globals, _without_storage, _safetensors, _bad_dtype, _sharded, _page, _cut,
         _no_such)  # fmt: skip

MODEL = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(2, 2)
def run():
    net = Net()
    return net, torch.optim.Adam(net.parameters())
"""
EDITS = {
    "strip-prefix": ["--prefix", EVIL],
    "add-prefix": [f"x{EVIL}."],
    "rename": [f"{EVIL}=x{EVIL}"],
    "keep": ["*"],
    "drop": [f"{EVIL}*"],
    "select": [EVIL],
    "cast": ["--dtype", "bf16"],
    "scale": ["*", "2"],
    "reshape": ["*", "4"],
    "transpose": ["*", "1,0"],
    "slice": ["*", "0:1"],
    "pad": ["*", "1"],
    "concat": ["--sources", f"{EVIL}*", "--into", f"y{EVIL}"],
    "split": ["*", "--into", f"y{EVIL}"],
    "fold": [],
    "dequantize": [],
    "quantize": ["--dtype", "q8_0"],
    "rotary": ["*", "--to", "halves"],
    "resize-rows": ["*", "--rows", "3"],
    "map-classes": ["*", "--old", f"no{EVIL}.txt", "--new", f"no{EVIL}.txt"],
    "resize-channels": ["*", "--channels", "3"],
    "resize-grid": ["*", "--grid", "1x1:2x2"],
    "resize-bias-table": ["*", "--window", "2:3"],
    "convert": [],
    "set": [f"epoch{EVIL}=1"],
    "edit": ["--drop", f"{EVIL}*"],
}


LOOKING = ("ls", "hash", "scan", "convert", "drop", "recover", "set", "diff")  # what files are given that are refused
OPEN = ("_training", "_safetensors")  # files that open: every command gets them


def commands(path: Path, model: str, out: Path) -> dict[str, list[list[object]]]:
    """Every command with the options that show names; ``out`` is a name that each may write to."""
    runs: dict[str, list[list[object]]] = {
        "ls": [[path], [path, "--all"], [path, "--fold"], [path, "--stats"], [path, "--check"], [path, "--training"],
               [path, f"{EVIL}*"], [path, f"no{EVIL}"], [path, "--select", EVIL]],
        "diff": [[path, path], [path, path, "--values"], [path, model], [path, f"{model}{EVIL}"]],
        "hash": [[path]],
        "scan": [[path]],
        "align": [[path, model], [path, model, "-o", out.with_suffix(".toml")]],
        "fit": [[path, model, out, "--dry-run"], [path, model, out, "--allow-missing", "*", "--force"]],
        "resume-check": [[path, path, model.replace("Net()", "run"), "--steps", "1"]],
        "freeze-plan": [[model, f"{EVIL}*"]],
        "groups": [[model, "--rules", f"no{EVIL}.toml"]],
        "apply": [[f"no{EVIL}.toml", path, out]],
        "recipe": [["check", path], ["check", f"no{EVIL}.toml"]],
        "recover": [[path], [path.parent]],
        "index": [[path], [path.parent]],
    }  # fmt: skip
    for name in set(cli.cli.list_commands(click.Context(cli.cli))) - set(runs):
        arguments = EDITS.get(name, ["*"])
        runs[name] = [[path, out, *arguments, "--dry-run"], [path, out, *arguments, "--force"]]
    return runs


@pytest.mark.parametrize("make", FILES)
def test_nothing_from_a_file_or_its_name_acts_on_the_terminal(
    make: Callable[[Path], Path], ckpt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "models.py").write_text(MODEL)
    path = make(tmp_path / "files")
    for name, runs in commands(path, f"{tmp_path}/models.py:Net()", tmp_path / f"out{EVIL}.pth").items():
        for arguments in runs if make.__name__ in OPEN or name in LOOKING else []:
            assert_harmless(ckpt(name, *arguments))
    for arguments in (["ls", path, "--json", "--all"], ["scan", path, "--json"], ["hash", path, "--json"],
                      ["ls", path, "--training", "--json"], ["diff", path, path, "--json"]):  # fmt: skip
        ran = ckpt(*arguments)
        assert_harmless(ran)
        if ran.out:
            json.loads(ran.out)


@pytest.mark.parametrize("make", FILES)
def test_the_texts_of_records_and_errors_act_on_no_terminal(make: Callable[[Path], Path], tmp_path: Path) -> None:
    path = make(tmp_path)
    for ask in (ckpt_surgeon.ls, ckpt_surgeon.scan, ckpt_surgeon.hash, ckpt_surgeon.open, ckpt_surgeon.open_run,
                lambda path: ckpt_surgeon.diff(path, path), lambda path: ckpt_surgeon.compare(path, path)):  # fmt: skip
        try:
            said = str(ask(path))
        except CheckpointError as error:
            said = str(error)
            assert "\n" not in said
        assert all(line.isprintable() for line in said.split("\n")), repr(said)
        assert not re.search(r"^\W*FORGED", said, re.M), said


def test_a_command_that_a_message_offers_can_be_pasted_and_acts_on_no_terminal(tmp_path: Path) -> None:
    import subprocess

    line = command("ls", tmp_path / f"it's{EVIL}\\.pth")
    assert line.isprintable()
    echoed = subprocess.run(["bash", "-c", line.replace("ckpt ls", "printf %s", 1)], capture_output=True, check=True)
    assert echoed.stdout.decode() == str(tmp_path / f"it's{EVIL}\\.pth")


def test_only_one_module_prints() -> None:
    """A new ``print`` or ``click.echo`` would go around the place that escapes."""
    calls = [
        f"{path.name}: {ast.unparse(node)}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and re.fullmatch(r"print|click\.s?echo|sys\.std(out|err)\.write", ast.unparse(node.func))
    ]
    assert sorted(calls) == [
        "__main__.py: print('ckpt: interrupted, nothing was replaced', file=sys.stderr)",
        "terminal.py: click.echo(_alarming(plain, alarm) if is_coloured and alarm else plain, err=err, nl=nl, "
        "color=True)",
    ]


# -- secrets

SPELLINGS = [
    "http://user:s3/cr3t@{host}/a.pth",
    "http://user:s3cr3t@{host}/a.pth",
    "HTTP://user:s3cr3t@{host}/a.pth",
    "http://s3cr3t@{host}/a.pth",
    "http://s3/cr3t@{host}/a.pth",
    "http://user:s3cr3t@cr3t@{host}/a.pth",
    "http://user:s3/cr3t@cr3t@{host}/a.pth",
    "http://user:s3#cr3t@{host}/a.pth",
    "http://user:s3?cr3t@{host}/a.pth",
    "http://us?er:s3cr3t@{host}/a.pth",
    "http://user%3As3cr3t%40{host}/a.pth",
    "http://user:s3%2Fcr3t@{host}/a.pth",
    "http://user:s3cr3t%40cr3t@{host}/a.pth",
    "http://s3.cr3t/s3cr3t@{host}/a.pth",
    "http://s3.cr3t/s3.cr3t%2Fs3cr3t@{host}/a.pth",
    "http://s3.cr3t%2Fs3cr3t@{host}/a.pth",
    "http://us.er:s3/cr3t@{host}/a.pth",
    "http://:s3cr3t@{host}/a.pth",
    "http://s3cr3t:@{host}/a.pth",
    "http://{host}/a.pth#access_token=s3cr3t",
    "http://{host}/token=s3cr3t/a.pth",
    "http://{host}/a.pth&X-Amz-Signature=s3cr3t",
    "http://{host}/a.pth#s3cr3t",
    "http://{host}/a.pth%23s3cr3t",
    "http://{host}/a.pth;sig=s3cr3t",
    "http://{host}/dir;sig=s3cr3t/a.pth",
    "http://{host}/a.pth?X-Amz-Signature=s3cr3t",
    "http://{host}/a.pth?x=1&sig=s3cr3t#s3cr3t",
    "http://{host}/a.pth%3Fsig=s3cr3t",
    "http:/user:s3cr3t@{host}/a.pth",
    "s3://key:s3/cr3t@bucket/a.pth",
    "S3://key:s3cr3t@bucket/a.pth",
    "s3://bucket/a.pth?versionId=s3cr3t",
    "zip://a.pth::http://user:s3cr3t@{host}/a.zip",
    "zip://a.pth::HTTPS://user:s3/cr3t@{host}/a.zip?sig=s3cr3t",
    "simplecache::http://user:s3cr3t@{host}/a.pth",
    "memory://user:s3cr3t@nowhere/a.pth",
]
SECRET = re.compile("s3.{0,3}cr3t|cr3t", re.I)


@pytest.fixture
def no_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An S3 server that is not there, and nothing of it remembered afterwards."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    yield
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.mark.usefixtures("no_s3")
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_no_spelling_of_a_url_shows_what_is_secret(
    spelling: str, ckpt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckpt_surgeon.files.remote.PAUSES", ())
    torch.save({"fc.weight": torch.ones(2)}, tmp_path / "a.pth")
    with web(tmp_path) as site:
        url = spelling.format(host=site.url.removeprefix("http://"))
        assert not SECRET.search(url_without_secrets(url)), url_without_secrets(url)
        assert not SECRET.search(without_secrets(f"GET {url} failed")), without_secrets(f"GET {url} failed")
        assert not SECRET.search(repr(file_path(url))) or "://" not in url
        remote_calls: list[list[object]] = [
            ["ls", url],
            ["ls", url, "--json"],
            ["convert", url, tmp_path / "out.pth", "-f"],
        ]
        if not spelling.lower().startswith("s3"):  # each of its calls takes a second to fail
            remote_calls += [["scan", url], ["hash", url, "--json"], ["diff", url, url],
                             ["ls", "a.pth", url], ["keep", url, url, "*"], ["apply", url, url, "o.pth"],
                             ["fit", url, "m.py:Net", url], ["recover", url]]  # fmt: skip
        for arguments in remote_calls:
            ran = ckpt(*arguments)
            assert not SECRET.search(ran.out + ran.err), ran
            assert "unexpected trouble" not in ran.err, ran


def test_credentials_in_options_are_left_out_of_what_a_library_says() -> None:
    class Leaky(fsspec.AbstractFileSystem):  # type: ignore[misc]
        protocol = "leaky"

        def __init__(self, **options: object) -> None:
            super().__init__()
            self.options = options

        def info(self, path: str, **_: object) -> dict[str, object]:
            raise OSError(f"cannot sign with {self.options} for {path}?Signature=abcdef")

    fsspec.register_implementation("leaky", Leaky, clobber=True)
    path = RemotePath("leaky://host/a.pth", {"key": "s3cr3t", "client_kwargs": {"password": "s3/cr3t"}, "anon": False})
    with pytest.raises(FileError) as refused:
        ckpt_surgeon.open(path)
    assert "cannot sign with" in str(refused.value)
    assert not SECRET.search(str(refused.value))
    assert "abcdef" not in str(refused.value)


def test_a_url_in_the_metadata_of_a_file_is_shown_without_its_parameters(ckpt: Run, tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors", {"from": "https://me:s3cr3t@host/x?sig=s3cr3t"})
    assert not SECRET.search(ckpt("ls", tmp_path / "a.safetensors").out)


@pytest.mark.parametrize(
    "text",
    ["https://cdn.jsdelivr.net/npm/net@1.0/a.pth", "hf://org/net@main/a.pth", "http://localhost:8000/a@b.pth",
     "https://host.org/runs/model@step100.pth", "https://host.org/net@1.0/a.pth?…", "https://…@host/a.pth",
     "abfs://container@account.dfs.core.windows.net/a.pth", "s3://bucket/epoch:3@best.pth", "C:/models/a?b",
     "a key: b@c", "note: see docs/a.md; do b"],
)  # fmt: skip
def test_what_is_no_secret_stays(text: str) -> None:
    assert without_secrets(text) == url_without_secrets(text) == text
