"""README.md is a front page: short, and every row of its table "I want to … → type this" works as it stands."""

from __future__ import annotations

import html
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from command_line import Run
from pages import FIXTURES, README, ROOT
from safetensors.torch import load_file, save_file
from terminal_picture import COMMANDS, PICTURE, WIDTH

ROW = re.compile(r"^\| [^|`]+(?:`[^`]*`)?[^|`]* \| `(ckpt [^`]+)` \|$", re.MULTILINE)
TEXT = README.read_text(encoding="utf-8")
ROWS = ROW.findall(TEXT)
STATUSES = {"ckpt diff epoch8.pth epoch9.pth --values": 1, "ckpt scan downloaded.pt": 1}  # values differ; code is named


class Nowhere(torch.nn.Linear):
    """A class that is gone when its pickled instance is opened."""


def write_files(folder: Path) -> None:
    """Write what the rows of the table read."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    torch.save(model.state_dict(), folder / "model.pth")
    net = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    weights = {f"module.{key}": value for key, value in net.state_dict().items()}
    torch.save({"model": weights, "optimizer": optimizer.state_dict(), "epoch": 3}, folder / "last.ckpt")
    save_file(weights, folder / "parallel.safetensors")
    for name in ("encoder", "decoder", "epoch8", "epoch9"):
        torch.save(torch.nn.Linear(4, 2).state_dict(), folder / f"{name}.pth")
    save_file({"fc.weight": torch.ones(3, 4)}, folder / "base.safetensors")
    pair = {"fc.lora_A.weight": torch.ones(2, 4), "fc.lora_B.weight": torch.ones(3, 2)}
    save_file({f"base_model.model.{key}": value for key, value in pair.items()}, folder / "adapter.safetensors")
    codes = torch.ones(2, 2).to(torch.float8_e4m3fn)
    save_file({"fc.weight": codes, "fc.weight_scale": torch.full((2, 1), 0.5)}, folder / "fp8.safetensors")
    torch.save(Nowhere(4, 2), folder / "whole_module.pt")
    torch.save(Nowhere(4, 2), folder / "downloaded.pt")
    (folder / "shards").mkdir()
    for number, key in enumerate("ab", 1):
        save_file({key: torch.ones(2)}, folder / "shards" / f"model-0000{number}-of-00002.safetensors")


def test_the_readme_is_at_most_nine_kilobytes_and_says_a_dozen_jobs() -> None:
    assert len(TEXT.encode()) <= 9000
    assert len(ROWS) >= 12
    assert len(set(ROWS)) == len(ROWS)


def test_every_row_of_the_table_does_what_it_says(ckpt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    for line in ROWS:
        ran = ckpt(*shlex.split(line)[1:])
        assert ran.status == STATUSES.get(line, 0), f"{line}\n{ran.out}{ran.err}"
    assert torch.load("clean.ckpt")["epoch"] == 3
    assert list(torch.load("clean.ckpt")["model"]) == ["weight", "bias"]
    assert list(load_file("parallel.safetensors")) == ["bias", "weight"]
    assert sorted(torch.load("both.pth")) == ["decoder.bias", "decoder.weight", "encoder.bias", "encoder.weight"]
    eight, nine = torch.load("epoch8.pth"), torch.load("epoch9.pth")
    mean = (eight["weight"].double() + nine["weight"].double()) / 2
    assert torch.equal(torch.load("mean.pth")["weight"], mean.float())
    assert torch.equal(load_file("merged.safetensors")["fc.weight"], torch.full((3, 4), 17.0))  # 1 + 16 ÷ 2 · 2
    assert torch.equal(load_file("plain.safetensors")["fc.weight"], torch.full((2, 2), 0.5, dtype=torch.bfloat16))
    assert sorted(load_file("weights.safetensors")) == ["bias", "weight"]
    torchvision.models.resnet18(num_classes=10).load_state_dict(torch.load("ten.pth"), strict=True)
    assert Path("shards/model.safetensors.index.json").exists()
    assert Path("names.toml").exists()


@pytest.mark.parametrize("target", ["demo", "test", "quick", "check", "bench"])
def test_the_make_targets_of_the_readme_exist(target: str) -> None:
    assert f"make {target}" in TEXT
    assert f"\n{target}:" in (ROOT / "Makefile").read_text("utf-8")


def lines_of_the_picture() -> list[str]:
    """The text of the SVG, line by line: rich clips each piece of a line by the line's own rectangle."""
    lines: dict[int, str] = {}
    piece = re.compile(r'<text [^>]*x="([\d.]+)"[^>]*clip-path="url\(#terminal-line-(\d+)\)">(.*?)</text>', re.DOTALL)
    for x, number, text in piece.findall(PICTURE.read_text(encoding="utf-8")):
        line = lines.get(int(number), "")
        lines[int(number)] = line.ljust(round(float(x) / 12.2)) + html.unescape(text).replace("\xa0", " ")
    return [lines.get(number, "").rstrip() for number in range(max(lines) + 1)]


def test_the_picture_shows_what_the_commands_print(ckpt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shutil.copytree(FIXTURES, tmp_path / "try"))
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    expected: list[str] = []
    for command in COMMANDS:
        ran = ckpt(*shlex.split(command)[1:])
        expected += [f"$ {command}", *(ran.out + ran.err).splitlines(), ""]
    shown = lines_of_the_picture()
    assert shown == [line.rstrip() for line in expected[: len(shown)]], "python fixtures/terminal_picture.py"
    assert expected[len(shown) :] in ([], [""])


def test_the_picture_is_on_the_page_and_fetches_nothing() -> None:
    assert f"]({PICTURE.relative_to(ROOT)})" in TEXT
    drawn = PICTURE.read_text(encoding="utf-8")
    assert "url(http" not in drawn
    assert "@import" not in drawn
    assert "<script" not in drawn
    assert len(set(re.findall(r"fill: (#\w+)", drawn))) > 3  # in colour
