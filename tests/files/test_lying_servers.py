"""Servers that answer with other bytes than were asked for: one line that says what, and no output."""

from __future__ import annotations

import io
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import lying_server as lies
import pytest
import torch
from command_line import Run
from lying_server import Lie, lying

import ckpt_surgeon
from ckpt_surgeon import BrokenFile, FileError
from ckpt_surgeon.files import remote


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried again at once, and even small files come in pieces."""
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(remote, "WHOLE", 1000)


STATE = {"weight": torch.arange(20_000.0).reshape(100, 200), "bias": torch.ones(100)}


@pytest.fixture(scope="module")
def raw() -> bytes:
    """A file whose weights are most of it."""
    made = io.BytesIO()
    torch.save(STATE, made)
    return made.getvalue()


# What a server does from its second answer on, and what is said of it.
LIES: dict[str, tuple[Lie, str]] = {
    "another range": (lies.another_range, "sends bytes 0 to"),
    "a shorter range": (lies.a_shorter_range, "were asked for"),
    "no word of the range": (lies.no_word_of_the_range, "does not say which bytes it sends"),
    "several ranges": (lies.several_ranges, "does not say which bytes it sends"),
    "another length": (lies.another_length, "changed while it was read"),
    "a shorter file": (lies.a_shorter_file, "became shorter while it was read"),
    "nothing there": (lies.nothing_there, "became shorter while it was read"),
    "a longer body": (lies.a_longer_body, "sends more than"),
    "a longer body of no length": (lies.a_longer_body_of_no_length, "sends more than"),
    "a shorter body": (lies.a_shorter_body, "were asked for"),
    "a shorter body of no length": (lies.a_shorter_body_of_no_length, "were asked for"),
    "a body that is cut": (lies.a_body_that_is_cut, "cannot be read"),
    "another ETag": (lies.another_etag, 'changed while it was read (ETag "one", then "two")'),
    "packed bytes": (lies.packed_bytes, "comes packed (gzip)"),
    "a login page": (lies.a_login_page, "answers with a web page"),
    "a login page of no length": (lies.a_login_page_of_no_length, "answers with a web page"),
    "another file": (lies.another_file, "changed while it was read"),
    "another status": (lies.no_content, "status 203"),
    "a redirection": (lies.a_redirection, "changed while it was read (address"),
}


@pytest.mark.parametrize("name", LIES)
@pytest.mark.parametrize("after", [0, 1])
def test_what_was_not_asked_for_is_told_and_leaves_nothing(
    after: int, name: str, raw: bytes, ckpt: Run, tmp_path: Path
) -> None:
    lie, said = LIES[name]
    if not after and name in ("another ETag", "another range", "a redirection"):
        pytest.skip("a first answer can be compared with nothing before it")
    with lying(raw, lie, after=after) as site:
        for words in (["convert", tmp_path / "out.pth"], ["hash"]) if after else (["ls", "--check"],):
            site.gets = 0
            ran = ckpt(words[0], f"{site.url}?token=s3cr3t", *words[1:])
            assert (ran.status, ran.out, ran.err.count("\n")) == (2, "", 1), ran
            assert said in ran.err
            assert f"ckpt: {site.url}?…: " in ran.err
            assert "s3cr3t" not in ran.err
            assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", LIES)
def test_what_was_not_asked_for_reaches_no_model(name: str, raw: bytes) -> None:
    model = torch.nn.Linear(200, 100)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with lying(raw, LIES[name][0], after=1) as site, pytest.raises(FileError):
        ckpt_surgeon.load_into(model, site.url)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "lie", [lies.the_whole_file, lies.the_whole_file_of_no_length, lies.honest, lies.sent_in_chunks]
)
@pytest.mark.parametrize("after", [0, 1])
def test_a_server_that_sends_the_whole_file_is_understood(after: int, lie: Lie, raw: bytes, tmp_path: Path) -> None:
    with lying(raw, lie, after=after) as site:
        ckpt_surgeon.convert(site.url, tmp_path / "out.pth")
    assert all(torch.equal(value, STATE[key]) for key, value in torch.load(tmp_path / "out.pth").items())


def test_a_login_page_from_the_beginning_is_named(raw: bytes, ckpt: Run) -> None:
    with lying(raw, lies.a_login_page, lies_to_head=True) as site:
        ran = ckpt("ls", site.url)
    assert (ran.status, ran.out) == (2, "")
    assert "is an HTML page; the download met a login or quota page" in ran.err


@pytest.mark.parametrize("status", [403, 404, 500])
def test_a_traceback_shows_no_parameters_of_a_url(status: int, raw: bytes) -> None:
    def refuse(answer: lies.Answer, raw: bytes, start: int, stop: int) -> None:
        answer.status = status

    signed = "?X-Amz-Signature=" + "s3cr3t"
    with lying(raw, refuse) as site, pytest.raises(FileError) as refused:
        ckpt_surgeon.open(site.url + signed)
    assert "s3cr3t" not in "".join(traceback.format_exception(refused.value)).replace('"s3cr3t"', "")


# -- damage on the way

USES: dict[str, Callable[[str, Path], object]] = {
    "convert to .pth": lambda url, folder: ckpt_surgeon.convert(url, folder / "out.pth"),
    "convert to .safetensors": lambda url, folder: ckpt_surgeon.convert(url, folder / "out.safetensors"),
    "convert into shards": lambda url, folder: ckpt_surgeon.convert(url, folder / "out.pth", max_shard_size=1000),
    "convert unchecked": lambda url, folder: ckpt_surgeon.convert(url, folder / "out.pth", check=False),
    "part": lambda url, folder: ckpt_surgeon.save(
        ckpt_surgeon.slice_(ckpt_surgeon.open(url), patterns=["weight"], dim=0, start=0, stop=99), folder / "out.pth"
    ),
    "hash": lambda url, _: ckpt_surgeon.hash(url),
    "check": lambda url, _: ckpt_surgeon.ls(url, check=True),
    "stats": lambda url, _: ckpt_surgeon.ls(url, stats=True),
    "compare": lambda url, _: ckpt_surgeon.compare(url, STATE),
    "load": lambda url, _: ckpt_surgeon.load(url),
    "load_into": lambda url, _: ckpt_surgeon.load_into(torch.nn.Linear(200, 100), url),
    "load_into by assignment": lambda url, _: ckpt_surgeon.load_into(torch.nn.Linear(200, 100), url, assign=True),
    "run": lambda url, folder: ckpt_surgeon.save(ckpt_surgeon.open_run(url), folder / "out.pth"),
}


@pytest.mark.parametrize("use", USES)
def test_damage_on_the_way_does_not_travel(use: str, raw: bytes, tmp_path: Path) -> None:
    with lying(raw, lies.damage) as site, pytest.raises(BrokenFile, match="CRC"):
        USES[use](site.url, tmp_path)
    assert os.listdir(tmp_path) == []
