"""Checkpoints at URLs: what is read, what is fetched for it, what is written, and what happens when a server fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import fsspec
import pytest
import safetensors.torch
import torch
from command_line import Ran, Run
from servers import Server, s3, web
from tables import (
    NAMES,
    TABLE,
    WITHOUT_STORAGE_CLASS,
    assert_same,
    dtype_of,
    in_safetensors,
    ramp,
    save_big_endian,
    save_deflated,
    save_legacy,
    save_safetensors,
    save_shards,
    save_zip,
)
from unusual_files import UNUSUAL, build
from upath import UPath

import ckpt_surgeon
from ckpt_surgeon import BrokenFile, EditError, FileError, RemotePath
from ckpt_surgeon.files import prefetch, remote
from ckpt_surgeon.files.local import LocalPath
from ckpt_surgeon.files.paths import file_path
from ckpt_surgeon.files.remote import coalesced
from ckpt_surgeon.files.spans import ByteSpan
from ckpt_surgeon.formats.zip import torch_zip
from ckpt_surgeon.tensors.dtypes import BY_NAME
from ckpt_surgeon.tensors.records import ComputedTensor

StateDict = dict[str, torch.Tensor]


CONTAINERS: dict[str, Callable[[StateDict, Path], Path]] = {
    "zip": save_zip,
    "legacy": save_legacy,
    "safetensors": save_safetensors,
    "zip shards": lambda state, folder: save_shards(state, folder, ".bin"),
    "safetensors shards": lambda state, folder: save_shards(state, folder, ".safetensors"),
    "deflated": save_deflated,
    "big-endian": save_big_endian,
}


def network(megabytes: int, *, layers: int = 12) -> StateDict:
    """A state_dict as of a model: few large tensors, many small ones among them."""
    width = int((megabytes * 2**20 / layers / 4) ** 0.5)
    state: StateDict = {}
    for layer in range(layers):
        state[f"module.layers.{layer}.weight"] = torch.randn(width, width)
        state[f"module.layers.{layer}.bias"] = torch.randn(width)
        state[f"module.layers.{layer}.bn.num_batches_tracked"] = torch.tensor(layer)
    return state


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Server]:
    """A web server for the folder ``site`` of the test's place."""
    folder = tmp_path / "site"
    folder.mkdir()
    with web(folder) as server:
        yield server


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried again at once."""
    monkeypatch.setattr(remote, "PAUSES", (0.01, 0.05))


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    with s3() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket; what a command needs to find it is in the environment."""
    for name, value in {"AWS_ENDPOINT_URL": s3_endpoint, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
                        "AWS_DEFAULT_REGION": "us-east-1"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    files = fsspec.filesystem("s3")
    name = f"bucket-{time.monotonic_ns()}"
    files.mkdir(name)
    yield f"s3://{name}"
    assert uploads_of(f"s3://{name}") == []  # no test leaves an upload that is neither complete nor given up


def uploads_of(bucket: str) -> list[str]:
    """The uploads to a bucket that were begun and not ended."""
    said = fsspec.filesystem("s3").call_s3("list_multipart_uploads", Bucket=bucket.removeprefix("s3://"))
    return [upload["Key"] for upload in said.get("Uploads", [])]


def objects_of(bucket: str) -> dict[str, bytes]:
    """Everything in a bucket, by name."""
    files = fsspec.filesystem("s3")
    found = files.find(bucket, refresh=True)
    return {name.partition("/")[2]: files.cat_file(name) for name in found}


def hash_of(path: str | Path | RemotePath) -> str:
    return ckpt_surgeon.hash(path).whole


# -- names


@pytest.mark.parametrize(
    ("text", "name", "parent", "sibling"),
    [
        ("s3://bucket/run/a.pth", "a.pth", "s3://bucket/run/", "s3://bucket/run/b.pth"),
        ("s3://bucket/run/", "run", "s3://bucket/", "s3://bucket/b.pth"),
        ("hf://org/net@main/a.pth", "a.pth", "hf://org/net@main/", "hf://org/net@main/b.pth"),
        ("http://host/run/a.pth?token=1", "a.pth", "http://host/run/?…", "http://host/run/b.pth?…"),
        ("simplecache::s3://bucket/a.pth", "a.pth", "simplecache::s3://bucket/", "simplecache::s3://bucket/b.pth"),
    ],
)
def test_a_url_has_the_names_that_a_path_has(text: str, name: str, parent: str, sibling: str) -> None:
    path = file_path(text)
    assert isinstance(path, RemotePath)
    assert (path.name, str(path.parent), str(path.with_name("b.pth"))) == (name, parent, sibling)


@pytest.mark.parametrize("text", ["model.pth", "/a/b.pth", "C:/a.pth", "C:\\a.pth", "a:b.pth", "a::b", "~/x"])
def test_what_is_no_url_is_a_path(text: str) -> None:
    assert file_path(text) == LocalPath(text)


def test_a_file_url_is_a_path() -> None:
    assert file_path("file:///tmp/a.pth") == LocalPath("/tmp/a.pth")


def test_the_options_of_a_universal_path_are_taken() -> None:
    assert file_path(UPath("s3://bucket/a.pth", anon=True)) == RemotePath("s3://bucket/a.pth", {"anon": True})
    assert file_path(UPath("/tmp/a.pth")) == LocalPath("/tmp/a.pth")
    assert file_path(UPath("file:///tmp/a.pth")) == LocalPath("/tmp/a.pth")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:secret@host/a.pth", "https://host/a.pth"),
        ("https://secret@host/a.pth", "https://host/a.pth"),
        ("s3://key:secret@bucket/a.pth", "s3://bucket/a.pth"),
        ("abfs://container@account.dfs.core.windows.net/a.pth", "abfs://container@account.dfs.core.windows.net/a.pth"),
        ("hf://org/net@main/a.pth", "hf://org/net@main/a.pth"),
        ("https://host/a.pth?X-Amz-Signature=secret", "https://host/a.pth?…"),
    ],
)
def test_what_is_secret_in_a_url_is_not_shown(text: str, shown: str) -> None:
    path = RemotePath(text, {"token": "secret"})
    assert str(path) == shown
    assert "secret" not in repr(path)


def test_a_url_that_pathlib_has_cut_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="give it as text"):
        ckpt_surgeon.open(Path("s3://bucket/a.pth"))


# -- what is read is what a local file says


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", ["dense", "tied", "transposed"])
def test_a_url_says_what_the_local_file_says(
    name: str, container: str, site: Server, ckpt: Run, tmp_path: Path
) -> None:
    path = CONTAINERS[container](TABLE[name](), site.folder)
    url = f"{site.url}/{path.name}"
    here, there = (json.loads(ckpt("ls", where, "--json").out) for where in (path, url))
    assert there == {**here, "path": url}
    assert ckpt("diff", url, path, "--values").status == 0
    assert ckpt("diff", path, url).status == 0
    assert ckpt("hash", url).out == ckpt("hash", path).out
    assert (
        ckpt("ls", url, "--check", "--stats").out.replace(url, str(path)) == ckpt("ls", path, "--check", "--stats").out
    )
    for suffix in (".pth", ".safetensors"):
        for source, out in ((path, f"here{suffix}"), (url, f"there{suffix}")):
            assert ckpt("convert", source, tmp_path / out).err == ""
        assert (tmp_path / f"there{suffix}").read_bytes() == (tmp_path / f"here{suffix}").read_bytes()


@pytest.mark.filterwarnings("ignore:.* support is experimental")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("save", [save_zip, save_legacy])
def test_every_tensor_is_loaded_from_a_url_as_from_a_file(
    name: str, save: Callable[[StateDict, Path], Path], tmp_path: Path
) -> None:
    if save is save_legacy and dtype_of(name) in WITHOUT_STORAGE_CLASS:
        pytest.skip("legacy files have no such tensors")
    path = save(TABLE[name](), tmp_path)
    url = f"memory://{tmp_path.name}/{path.name}"
    fsspec.filesystem("memory").put_file(str(path), url)
    assert_same(ckpt_surgeon.load(url), ckpt_surgeon.load(path))
    assert hash_of(url) == hash_of(path)


@pytest.mark.parametrize(("family", "name"), [pytest.param(*names, id="-".join(names)) for names in UNUSUAL])
def test_every_kind_of_file_is_read_bit_by_bit(
    family: str, name: str, ckpt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "WHOLE", 0)
    few = property(lambda path: min(512, path.size))  # so that even small files come in many pieces
    monkeypatch.setattr(RemotePath, "reach", few)
    made = build(family, name, tmp_path)
    folder = f"memory://{tmp_path.name}"
    fsspec.filesystem("memory").put(f"{tmp_path}/", f"{folder}/", recursive=True)
    url = f"{folder}/{made.path.relative_to(tmp_path)}"
    for words in (["ls", "--all", "--json"], ["scan", "--json"]):
        here, there = (json.loads(ckpt(*words, where).out) for where in (made.path, url))
        assert there == {**here, "path": url}
    assert ckpt_surgeon.hash(url, select=made.select) == ckpt_surgeon.hash(made.path, select=made.select)


def test_chained_file_systems_are_read(tmp_path: Path) -> None:
    path = save_zip(network(1), tmp_path)
    fsspec.filesystem("memory").put_file(str(path), f"memory://{tmp_path.name}/model.pth")
    assert hash_of(f"simplecache::memory://{tmp_path.name}/model.pth") == hash_of(path)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(path, "run/model.pth")
    assert hash_of(f"zip://run/model.pth::file://{tmp_path}/all.zip") == hash_of(path)


def test_a_model_takes_its_weights_from_a_url(site: Server) -> None:
    model = torch.nn.Linear(30, 20)
    torch.save({f"module.{key}": value for key, value in model.state_dict().items()}, site.folder / "layer.pth")
    other = torch.nn.Linear(30, 20)
    ckpt_surgeon.load_into(other, f"{site.url}/layer.pth")
    assert_same(other.state_dict(), model.state_dict())


def test_edits_that_compute_read_from_a_url(site: Server, ckpt: Run, tmp_path: Path) -> None:
    state = {"a": ramp(300, 20), "b": ramp(300, 20).t(), "c": ramp(300, 20)[::2]}
    path = save_zip(state, site.folder)
    for source, out in ((path, "here.pth"), (f"{site.url}/{path.name}", "there.pth")):
        assert ckpt("edit", source, tmp_path / out, "--cast", "bf16", "--transpose", "c").status == 0
    assert (tmp_path / "there.pth").read_bytes() == (tmp_path / "here.pth").read_bytes()


def test_a_recipe_and_a_list_of_patterns_may_be_at_a_url(site: Server, ckpt: Run, tmp_path: Path) -> None:
    path = save_zip(TABLE["tied"](), site.folder)
    (site.folder / "recipe.toml").write_text('[[edit]]\ndo = "add-prefix"\nprefix = "x."\n')
    (site.folder / "patterns.txt").write_text("head.*\n")
    assert ckpt("apply", f"{site.url}/recipe.toml", path, tmp_path / "a.pth").status == 0
    assert ckpt("drop", path, tmp_path / "b.pth", "--from", f"{site.url}/patterns.txt").status == 0
    assert all(key.startswith("x.") for key in torch.load(tmp_path / "a.pth"))
    assert "head.weight" not in torch.load(tmp_path / "b.pth")


def test_salvage_takes_what_is_whole_in_a_truncated_file_at_a_url(site: Server, ckpt: Run, tmp_path: Path) -> None:
    path = save_zip(network(1), site.folder)
    os.truncate(path, path.stat().st_size // 2)
    url = f"{site.url}/{path.name}"
    assert "truncated" in ckpt("ls", url).err
    assert ckpt("convert", url, tmp_path / "there.pth", "--salvage").status == 0
    assert ckpt("convert", path, tmp_path / "here.pth", "--salvage").status == 0
    assert (tmp_path / "there.pth").read_bytes() == (tmp_path / "here.pth").read_bytes()


# -- how much is fetched, and how


# Of 36 tensors: size, beginning, end, and (one for each large tensor and its neighbours) where a record starts; in
# legacy files, whose storages are in no order, one for each tensor at worst.
REQUESTS = {"zip": 25, "legacy": 38, "safetensors": 2, "zip shards": 28, "safetensors shards": 6}


@pytest.mark.parametrize("container", REQUESTS)
@pytest.mark.parametrize("words", [["ls"], ["ls", "--json"], ["diff"]], ids=" ".join)
def test_looking_fetches_less_than_a_hundredth_of_the_file(
    words: list[str], container: str, site: Server, ckpt: Run, tmp_path: Path
) -> None:
    path = CONTAINERS[container](network(12), site.folder)
    size = sum(file.stat().st_size for file in site.folder.iterdir())
    assert size > 10 << 20
    site.reset()
    ran = ckpt(*words, f"{site.url}/{path.name}", *([path] if words == ["diff"] else []))
    assert ran.status == 0
    assert site.sent < size / 100
    assert len(site.asked) <= REQUESTS[container], site.asked


def test_the_header_of_many_keys_takes_one_request_more(site: Server) -> None:
    state = {f"layers.{index}.a.rather.long.key.for.a.small.tensor": torch.zeros(200) for index in range(4000)}
    path = save_safetensors(state, site.folder)
    with open(path, "rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    site.reset()
    assert len(ckpt_surgeon.open(f"{site.url}/{path.name}")) == 4000
    assert len(site.asked) == 3
    assert site.sent == header


def test_a_tensor_that_is_asked_for_is_all_that_is_fetched(site: Server, ckpt: Run, tmp_path: Path) -> None:
    path = save_safetensors(network(12), site.folder)
    site.reset()
    assert ckpt("keep", f"{site.url}/{path.name}", tmp_path / "out.pth", "module.layers.3.*").status == 0
    (wanted,) = (tensor for key, tensor in network(12).items() if key == "module.layers.3.weight")
    assert wanted.nbytes < site.sent < wanted.nbytes + path.stat().st_size / 100


@pytest.mark.parametrize("container", ["zip", "legacy", "safetensors", "safetensors shards"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_conversion_fetches_every_byte_about_once(suffix: str, container: str, site: Server, tmp_path: Path) -> None:
    path = CONTAINERS[container](network(40), site.folder)
    size = sum(file.stat().st_size for file in site.folder.iterdir())
    ckpt_surgeon.convert(f"{site.url}/{path.name}", tmp_path / f"out{suffix}")
    assert site.sent < 1.02 * size


def test_a_small_file_is_one_request_for_everything(site: Server) -> None:
    path = save_zip(TABLE["tied"](), site.folder)
    hash_of(f"{site.url}/{path.name}")
    assert [line.partition(" ")[0] for line in site.asked] == ["HEAD", "GET", "HEAD"]  # the last: it did not change


def test_shards_are_looked_at_all_at_a_time(site: Server, tmp_path: Path) -> None:
    ckpt_surgeon.save(network(2), site.folder / "model.safetensors", max_shard_size=100_000)
    shards = len(list(site.folder.glob("*.safetensors")))
    assert shards >= 12
    site.reset()
    site.latency = 0.1
    ckpt_surgeon.open(f"{site.url}/model.safetensors.index.json")
    assert max(site.at_once) >= shards // 2  # what waits, waits together


def test_reading_ahead_hides_the_latency_of_the_server(site: Server, tmp_path: Path) -> None:
    path = save_safetensors(network(160), site.folder)
    site.latency = 0.3
    ckpt_surgeon.convert(f"{site.url}/{path.name}", tmp_path / "out.pth")
    requests = len(site.at_once)
    alone = site.at_once.count(1)  # requests for which everything else has to wait
    assert requests > 20
    assert alone < requests / 2, site.at_once


def test_the_order_of_reading_does_not_change_what_is_read(site: Server) -> None:
    raw = os.urandom(1 << 20)
    (site.folder / "raw").write_bytes(raw)
    path = RemotePath(f"{site.url}/raw")
    ranges = [(500_000, 600_000), (0, 100), (100, 300_000), (0, 100), (250_000, 700_000), (90, 110), (5, 5)]
    spans = [ByteSpan(path, start, stop) for start, stop in ranges]
    for order in (spans, spans[::-1], spans[::2] + spans[1::2]):
        with prefetch.reading_ahead(spans):
            for span in order:
                assert b"".join(span.blocks(4096)) == raw[span.start : span.stop]


def test_no_more_is_on_its_way_than_what_may_be(site: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "PIECE", 1 << 16)
    monkeypatch.setattr(prefetch, "AHEAD", 4 << 16)
    (site.folder / "raw").write_bytes(bytes(4 << 20))
    path = RemotePath(f"{site.url}/raw")
    blocks = prefetch.blocks(path, 0, 4 << 20, 1 << 14)
    next(blocks)
    time.sleep(0.5)
    assert site.sent <= 5 << 16


def test_ranges_that_are_near_each_other_become_one() -> None:
    assert coalesced([(0, 10), (5, 20), (21, 30), (100, 110)], 1) == [(0, 30), (100, 110)]


PEAK = """
from ckpt_surgeon.cli import main
try:
    main()
finally:
    print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak(*words: object) -> int:
    """MiB of memory that a command takes at most."""
    done = subprocess.run([sys.executable, "-c", PEAK, *map(str, words)], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-2]) >> 10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_memory_stays_bounded_however_large_the_file(site: Server, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(500 << 18)}, site.folder / "large.pth")
    torch.save({"weight": torch.zeros(8)}, site.folder / "small.pth")
    small, large = (peak("convert", f"{site.url}/{name}.pth", tmp_path / f"{name}.pth") for name in ("small", "large"))
    assert large - small < 100


# -- failures


def convert_fails(ckpt: Run, url: str, folder: Path) -> Ran:
    """Convert what cannot be: one line, status 2, nothing left."""
    folder.mkdir()
    ran: Ran = ckpt("convert", url, folder / "out.pth")
    assert ran.status == 2
    assert ran.err.startswith("ckpt: http://")
    assert ran.err.count("\n") == 1
    assert "secret" not in ran.err
    assert os.listdir(folder) == []
    return ran


FAILURES: dict[str, tuple[Callable[[Server], None], str]] = {
    "403": (lambda site: setattr(site, "status", lambda number: 403 if number > 3 else 0), "403"),
    "404": (lambda site: setattr(site, "status", lambda number: 404 if number > 3 else 0), "does not exist"),
    "500": (lambda site: setattr(site, "status", lambda number: 500 if number > 3 else 0), "status 500"),
    "cut off": (lambda site: setattr(site, "cut", lambda number: 1000 if number > 3 else 0), "cannot be read"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_server_that_fails_midway_is_told_and_leaves_nothing(
    failure: str, site: Server, ckpt: Run, tmp_path: Path
) -> None:
    path = save_safetensors(network(40), site.folder)
    arrange, words = FAILURES[failure]
    arrange(site)
    assert words in convert_fails(ckpt, f"{site.url}/{path.name}?secret=secret", tmp_path / "out").err


@pytest.mark.parametrize("status", [401, 403, 404, 500])
@pytest.mark.parametrize("words", [["ls"], ["hash"], ["diff"], ["scan"]], ids=" ".join)
def test_a_server_that_refuses_is_told(words: list[str], status: int, site: Server, ckpt: Run) -> None:
    url = f"{site.url}/model.pth?secret=secret"
    site.status = lambda _: status
    ran = ckpt(*words, url, *([url] if words == ["diff"] else []))
    assert (ran.status, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert ran.err.startswith(f"ckpt: {site.url}/model.pth?…: ")
    assert "secret" not in ran.err
    assert str(status) in ran.err or "does not exist" in ran.err


def test_a_server_that_is_not_there_is_told(ckpt: Run) -> None:
    ran = ckpt("ls", "http://127.0.0.1:9/model.pth")
    assert ran.status == 2
    assert "cannot be reached" in ran.err


@pytest.mark.parametrize("trouble", ["status", "cut"])
def test_a_failure_that_passes_is_not_noticed(trouble: str, site: Server, tmp_path: Path) -> None:
    path = save_safetensors(network(40), site.folder)
    setattr(site, trouble, lambda number: {"status": 503, "cut": 1000}[trouble] if number in (1, 3, 5) else 0)
    ckpt_surgeon.convert(f"{site.url}/{path.name}", tmp_path / "out.safetensors")
    assert hash_of(tmp_path / "out.safetensors") == hash_of(path)


def test_a_file_that_changes_while_it_is_read_is_told(site: Server, tmp_path: Path) -> None:
    path = save_safetensors(network(1), site.folder)
    checkpoint = ckpt_surgeon.open(f"{site.url}/{path.name}")
    site.etag = "another"
    with pytest.raises(BrokenFile, match="changed while it was read"):
        ckpt_surgeon.save(checkpoint, tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()
    with pytest.raises(BrokenFile, match="changed while it was read"):
        ckpt_surgeon.hash(checkpoint)


def test_a_file_that_becomes_shorter_while_it_is_read_is_told(site: Server, tmp_path: Path) -> None:
    path = save_safetensors(network(1), site.folder)
    checkpoint = ckpt_surgeon.open(f"{site.url}/{path.name}")
    os.truncate(path, 100_000)
    with pytest.raises(BrokenFile, match="shorter"):
        ckpt_surgeon.save(checkpoint, tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


def test_a_file_that_is_opened_again_is_looked_at_again(site: Server) -> None:
    path = save_safetensors(TABLE["dense"](), site.folder)
    url = RemotePath(f"{site.url}/{path.name}")
    before = ckpt_surgeon.open(url)
    save_safetensors(TABLE["tied"](), site.folder)
    assert list(ckpt_surgeon.open(url)) != list(before)


def test_a_server_without_ranges_gives_small_files_only(site: Server, tmp_path: Path) -> None:
    site.ranges = False
    small = save_zip(TABLE["transposed"](), site.folder)
    assert hash_of(f"{site.url}/{small.name}") == hash_of(small)
    middle = save_zip(network(1), site.folder)
    assert hash_of(f"{site.url}/{middle.name}") == hash_of(middle)
    large = save_zip(network(40), site.folder)
    site.reset()
    with pytest.raises(FileError, match="does not serve ranges; download the file first"):
        ckpt_surgeon.open(f"{site.url}/{large.name}")
    assert site.sent < 20 << 20  # what was in the buffers when the connection was closed


def test_a_server_that_does_not_say_sizes_is_told(site: Server) -> None:
    path = save_zip(TABLE["dense"](), site.folder)
    site.sizes = False
    with pytest.raises(FileError, match="does not say its size"):
        ckpt_surgeon.open(f"{site.url}/{path.name}")


def test_an_address_that_is_signed_for_reading_only_is_read_as_it_is_spelled(site: Server) -> None:
    path = save_zip(network(1), site.folder)
    site.heads = False
    query = "X-Amz-Credential=a%2Fb%2Faws4&X-Amz-Signature=secret%3D"
    checkpoint = ckpt_surgeon.open(f"{site.url}/{path.name}?{query}")
    assert all(query in line for line in site.asked)
    assert "secret" not in repr(checkpoint)


def test_a_shard_that_is_missing_is_named(site: Server, ckpt: Run) -> None:
    path = save_shards(TABLE["dense"](), site.folder, ".safetensors")
    (site.folder / "model-00001-of-00002.safetensors").unlink()
    ran = ckpt("ls", f"{site.url}/{path.name}")
    assert ran.status == 2
    assert "shard 'model-00001-of-00002.safetensors' is missing" in ran.err


MISSING = [
    ("s3fs", "s3://bucket/a.pth", "needs s3fs", "pip install 'ckpt_surgeon[remote]'"),
    ("aiohttp", "https://host/a.pth", "needs aiohttp", "pip install 'ckpt_surgeon[remote]'"),
    ("huggingface_hub", "hf://org/net/a.pth", "needs huggingface_hub", "pip install 'ckpt_surgeon[remote]'"),
    ("fsspec", "s3://bucket/a.pth", "needs fsspec", "pip install 'ckpt_surgeon[remote]'"),
    ("gcsfs", "gs://bucket/a.pth", "needs gcsfs", "pip install gcsfs"),
]


# Several commands, one after the other, where a package is missing: the exit status and the errors of each.
WITHOUT = """
import contextlib, io, json, sys
sys.modules[sys.argv[1]] = None
from ckpt_surgeon.cli import main
ended = []
for words in json.loads(sys.argv[2]):
    sys.argv = ["ckpt", *words]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            main()
        except SystemExit as end:
            ended.append((end.code or 0, said.getvalue()))
print(json.dumps(ended))
"""


@pytest.mark.parametrize(("package", "url", "what", "remedy"), MISSING, ids=[row[0] for row in MISSING])
def test_a_package_that_is_missing_is_named_with_what_installs_it(
    package: str, url: str, what: str, remedy: str, tmp_path: Path
) -> None:
    path = str(save_zip(TABLE["dense"](), tmp_path))
    commands = [["ls", path], ["ls", url], ["convert", url, "out.pth"]]
    if package != "aiohttp":  # nothing is written to the web, installed or not
        commands.append(["convert", path, url])
    words = [sys.executable, "-c", WITHOUT, package, json.dumps(commands)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=True)
    (local, _), *refused = json.loads(done.stdout.splitlines()[-1])
    assert local == 0
    assert len(refused) == len(commands) - 1
    for status, said in refused:
        assert status == 2, said
        assert said.count("\n") == 1
        assert what in said
        assert remedy in said


def test_a_protocol_that_nobody_knows_is_told(ckpt: Run) -> None:
    assert "fsspec does not know (foo)" in ckpt("ls", "foo://bar/model.pth").err


# -- other file systems


@pytest.mark.parametrize("container", ["zip", "legacy", "safetensors", "safetensors shards", "zip shards"])
def test_hugging_face_s_own_file_system_reads_exact_ranges(container: str, site: Server) -> None:
    path = CONTAINERS[container](network(12), site.folder)
    size = sum(file.stat().st_size for file in site.folder.iterdir())
    url = RemotePath(f"hf://org/net/{path.name}", {"endpoint": site.url, "token": False})
    assert ckpt_surgeon.ls(url).tensors.keys() == ckpt_surgeon.ls(path).tensors.keys()
    assert site.sent < size / 100
    assert hash_of(url) == hash_of(path)
    if "shards" in container:
        assert hash_of(url.parent) == hash_of(path)


@pytest.mark.parametrize("container", ["zip", "legacy", "safetensors", "safetensors shards"])
def test_s3_says_what_the_local_file_says(container: str, bucket: str, ckpt: Run, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    path = CONTAINERS[container](TABLE["tied"](), tmp_path / "run")
    fsspec.filesystem("s3").put(str(tmp_path / "run"), f"{bucket}/", recursive=True)
    url = f"{bucket}/run/{path.name}"
    here, there = (json.loads(ckpt("ls", where, "--json").out) for where in (path, url))
    assert there == {**here, "path": url}
    assert ckpt("diff", url, path, "--values").status == 0
    for folder in (f"{bucket}/run", f"{bucket}/run/"):
        assert ckpt("hash", folder, "-q").out == ckpt("hash", path, "-q").out
    for source, out in ((path, "here.pth"), (url, "there.pth")):
        assert ckpt("convert", source, tmp_path / out).status == 0
    assert (tmp_path / "there.pth").read_bytes() == (tmp_path / "here.pth").read_bytes()


def test_what_is_not_in_s3_is_told(bucket: str, ckpt: Run) -> None:
    for url in (f"{bucket}/none.pth", "s3://no-such-bucket/a.pth"):
        assert f"{url}: does not exist" in ckpt("ls", url).err
    assert "without a checkpoint" in ckpt("ls", f"{bucket}/none/").err


# -- outputs


@pytest.mark.parametrize("name", ["dense", "tied", "transposed", "step 2", "expanded", "0-d", "empty", "negative"])
@pytest.mark.parametrize("where", ["s3", "memory"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_an_output_at_a_url_is_read_back_by_its_own_package(
    suffix: str, where: str, name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    state = TABLE[name]()
    if suffix == ".safetensors" and not in_safetensors(name):
        pytest.skip("nothing for safetensors")
    out = (request.getfixturevalue("bucket") if where == "s3" else f"memory://{tmp_path.name}") + f"/run/model{suffix}"
    ckpt_surgeon.save(ckpt_surgeon.open(save_zip(state, tmp_path)), out)
    copy = tmp_path / f"copy{suffix}"
    with fsspec.open(out, "rb") as there:
        copy.write_bytes(there.read())
    if suffix == ".pth":
        assert_same(torch.load(copy), state)
        assert_same(torch.load(copy, mmap=True), state)
        with zipfile.ZipFile(copy) as archive:
            assert archive.testzip() is None
        assert ckpt_surgeon.ls(copy, check=True).checked is not None
    else:
        assert_same(safetensors.torch.load_file(copy), state, order=False)


@pytest.mark.parametrize("where", ["s3", "memory"])
def test_commands_write_to_urls(where: str, request: pytest.FixtureRequest, ckpt: Run, tmp_path: Path) -> None:
    base = request.getfixturevalue("bucket") if where == "s3" else f"memory://{tmp_path.name}"
    path = save_zip({f"module.{key}": value for key, value in network(1).items()}, tmp_path)
    assert ckpt("convert", path, f"{base}/a.safetensors").status == 0
    ran = ckpt("strip-prefix", f"{base}/a.safetensors", f"{base}/b.pth")
    assert ran.out.startswith(f"wrote {base}/b.pth: 36 tensors, 36 renamed, ")
    again = ckpt("convert", path, f"{base}/b.pth")
    assert (again.status, "exists already" in again.err) == (2, True)
    assert ckpt("convert", path, f"{base}/b.pth", "--force").status == 0
    assert ckpt("convert", path, f"{base}/b.pth", "--force", "--dry-run").out.count(f"would write {base}/b.pth") == 1
    assert hash_of(f"{base}/b.pth") == hash_of(path)
    assert ckpt("add-prefix", f"{base}/b.pth", f"{base}/b.pth", "--prefix", "x.", "--force").status == 0
    assert all(key.startswith("x.module.") for key in ckpt_surgeon.open(f"{base}/b.pth"))


@pytest.mark.parametrize("where", ["s3", "memory"])
def test_shards_at_a_url_come_with_their_index(
    where: str, request: pytest.FixtureRequest, ckpt: Run, tmp_path: Path
) -> None:
    base = request.getfixturevalue("bucket") if where == "s3" else f"memory://{tmp_path.name}"
    path = save_zip(network(1), tmp_path)
    assert ckpt("convert", path, f"{base}/run/model.safetensors", "--max-shard-size", "200kB").status == 0
    assert hash_of(f"{base}/run") == hash_of(path)
    ran = ckpt("convert", path, f"{base}/run/model.safetensors", "--max-shard-size", "600kB", "--force")
    assert ran.status == 0, ran.err
    names = {name.rpartition("/")[2] for name in fsspec.filesystem(base.partition(":")[0]).find(f"{base}/run")}
    listed = json.loads(RemotePath(f"{base}/run/model.safetensors.index.json").read_text())["weight_map"]
    assert names == {*listed.values(), "model.safetensors.index.json"}
    assert hash_of(f"{base}/run") == hash_of(path)


def test_a_web_address_is_refused_as_an_output(ckpt: Run, tmp_path: Path) -> None:
    ran = ckpt("convert", save_zip(TABLE["dense"](), tmp_path), "https://host/out.pth")
    assert ran.status == 2
    assert "cannot be written to" in ran.err


def failing(*, after: int) -> ComputedTensor:
    """A tensor that breaks while it is made."""

    def make(_: object) -> Iterator[bytes]:
        for _number in range(after):
            yield bytes(1 << 20)
        raise EditError(["the disk of dreams is full"])

    return ComputedTensor(BY_NAME["uint8"], (100 << 20,), (), make)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("after", [0, 40])
@pytest.mark.parametrize("where", ["s3", "memory"])
def test_an_output_that_fails_midway_shows_nothing(
    where: str, after: int, force: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    base = request.getfixturevalue("bucket") if where == "s3" else f"memory://{tmp_path.name}"
    files = fsspec.filesystem(where)
    files.pipe_file(f"{base}/run/other", b"other")
    if force:
        files.pipe_file(f"{base}/run/model-00001-of-00002.pth", b"old")
    before = files.find(base, detail=True)
    whole = ckpt_surgeon.from_torch(network(1))
    checkpoint = whole.with_tensors({**whole, "last": failing(after=after)}, None)
    with pytest.raises(EditError, match="dreams"):
        ckpt_surgeon.save(checkpoint, f"{base}/run/model.pth", max_shard_size=5 << 20, force=force)
    files.invalidate_cache()
    assert files.find(base, detail=True).keys() == before.keys()
    if force:
        assert files.cat_file(f"{base}/run/model-00001-of-00002.pth") == b"old"


def test_an_output_that_cannot_be_committed_shows_nothing(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from s3fs.core import S3File

    commit = S3File.commit

    def failing_at_the_second(file: S3File) -> None:
        if "00002-of" in file.path:
            raise OSError("the bucket is full")
        commit(file)

    monkeypatch.setattr(S3File, "commit", failing_at_the_second)
    with pytest.raises(FileError, match=r"cannot be written .*the bucket is full"):
        ckpt_surgeon.save(network(1), f"{bucket}/model.pth", max_shard_size=200_000)
    assert objects_of(bucket) == {}


def test_an_output_that_does_not_read_back_is_removed(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from s3fs.core import S3File

    write = S3File.write
    monkeypatch.setattr(S3File, "write", lambda file, raw: write(file, bytes(raw).replace(b"bias", b"bios")))
    with pytest.raises(BrokenFile, match=r"did not read back as planned .*removed"):
        ckpt_surgeon.save(TABLE["dense"]() | {"fc.bias": ramp(3)}, f"{bucket}/model.safetensors")
    assert objects_of(bucket) == {}


def test_the_index_becomes_visible_last(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from s3fs.core import S3File

    commit, order = S3File.commit, []

    def noted(file: S3File) -> None:
        order.append(file.path.rpartition("/")[2])
        commit(file)

    monkeypatch.setattr(S3File, "commit", noted)
    ckpt_surgeon.save(network(1), f"{bucket}/model.safetensors", max_shard_size=400_000)
    assert order[-1] == "model.safetensors.index.json"
    assert len(order) > 2


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_nothing_visible_and_no_upload(
    number: int, status: int, bucket: str, site: Server, tmp_path: Path
) -> None:
    save_safetensors(network(120), site.folder)
    site.latency = 0.3
    words = [sys.executable, "-m", "ckpt_surgeon", "convert", f"{site.url}/model.safetensors", f"{bucket}/out.pth"]
    running = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    for _ in range(200):
        time.sleep(0.05)
        if uploads_of(bucket):
            break
    assert uploads_of(bucket) == ["out.pth"]
    running.send_signal(number)
    _, said = running.communicate(timeout=60)
    assert running.returncode == status, said
    assert "Traceback" not in said
    assert objects_of(bucket) == {}


@pytest.mark.parametrize(("nbytes", "part"), [(1000, 16 << 20), (100 << 30, 16 << 20), (1 << 40, 122_000_000)])
def test_parts_are_as_large_as_the_file_needs(nbytes: int, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckpt_surgeon.files.uploads import part_size

    assert abs(part_size(nbytes) - part) < 1_000_000
    assert nbytes / part_size(nbytes) < 10_000


# -- zips whose checksums come after the bytes


class OneWay:
    """A sink that cannot go back; what is streamed in blocks of zeros becomes a hole."""

    can_patch = False

    def __init__(self, path: Path) -> None:
        self.file = open(path, "wb")  # noqa: SIM115

    @property
    def position(self) -> int:
        return self.file.tell()

    def literal(self, raw: bytes | memoryview) -> None:
        self.file.write(raw)

    def copy(self, span: ByteSpan) -> None:
        raise AssertionError("everything is made here")

    def stream(self, blocks: Iterable[bytes | memoryview], nbytes: int, *, checksum: bool = False) -> int:
        if nbytes > 1 << 32:
            self.file.seek(nbytes, os.SEEK_CUR)
        else:
            self.file.writelines(blocks)
        return 0

    def patch(self, position: int, raw: bytes) -> None:
        raise AssertionError("nothing can be mended")


def test_described_records_of_any_size_are_found_by_torch_and_by_zipfile(tmp_path: Path) -> None:
    size = (4 << 30) + 5
    huge = ComputedTensor(BY_NAME["uint8"], (size,), (), lambda _: iter([b""]))
    small = ComputedTensor(BY_NAME["float32"], (4,), (), lambda _: iter([bytes(16)]))
    out = tmp_path / "model.pth"
    sink = OneWay(out)
    torch_zip.write(sink, {"before": small, "huge": huge, "after": small})
    sink.file.close()
    loaded = torch.load(out, mmap=True)
    assert [tuple(value.shape) for value in loaded.values()] == [(4,), (size,), (4,)]
    with zipfile.ZipFile(out) as archive:
        infos = {info.filename: info for info in archive.infolist()}
        assert infos["archive/data/1"].file_size == size
        assert infos["archive/data/1"].flag_bits & 8
    found = ckpt_surgeon.open(out)
    assert [tensor.nbytes for tensor in found.values()] == [16, size, 16]


def test_described_records_are_salvaged(tmp_path: Path) -> None:
    state = {f"layer.{index}": ramp(40, 50) for index in range(6)}
    made = tmp_path / "model.pth"
    sink = OneWay(made)
    tensors = ckpt_surgeon.cast(ckpt_surgeon.from_torch(state), dtype="bf16")
    torch_zip.write(sink, tensors.tensors)
    sink.file.close()
    os.truncate(made, made.stat().st_size * 2 // 3)
    assert 0 < len(ckpt_surgeon.open(made, salvage=True)) < 6
