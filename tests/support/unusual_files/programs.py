"""TorchScript, torch.package and torch.export."""

from __future__ import annotations

import zipfile
from functools import partial
from pathlib import Path

import torch
from tables import ramp, rewritten
from torch import nn

from unusual_files.registry import UnusualFile, tensors_of, unusual


class Scriptable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(ramp(2))
        self.register_parameter("nothing", None)
        self.conv = nn.Conv1d(1, 2, 1)
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("passing", ramp(2) + 1, persistent=False)
        self.register_buffer("kept", ramp(3))
        self.seq = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2, bias=False))
        self.embed, self.head = nn.Linear(2, 2), nn.Linear(2, 2)
        self.head.weight = self.embed.weight
        self.width = 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.embed(self.seq(self.norm(self.conv(x)).mean(-1)))) * self.scale
        return found


def _scripted(folder: Path, *, traced: bool, deflated: bool = False) -> UnusualFile:
    path = folder / "scripted.pt"
    net = Scriptable().eval()
    (torch.jit.trace(net, torch.ones(1, 1, 4)) if traced else torch.jit.script(net)).save(path)
    state = tensors_of(torch.jit.load(path).state_dict())
    if deflated:
        path = rewritten(path, folder / "deflated.pt", method=zipfile.ZIP_DEFLATED)
    return UnusualFile(path, state, suspect=True)


unusual("TorchScript", "script")(partial(_scripted, traced=False))
unusual("TorchScript", "trace")(partial(_scripted, traced=True))
unusual("TorchScript", "script, members packed")(partial(_scripted, traced=False, deflated=True))


@unusual("TorchScript", "for phones")
def _lite(folder: Path) -> UnusualFile:
    path = folder / "lite.ptl"
    scripted = torch.jit.script(Scriptable().eval())
    scripted._save_for_lite_interpreter(str(path))
    return UnusualFile(path, tensors_of(scripted.state_dict()), suspect=True)


SILERO = Path(__file__).parents[3] / "real/silero-vad/silero_vad/data/silero_vad.jit"


def _package(folder: Path, *, deflated: bool) -> UnusualFile:
    from torch.package.package_exporter import PackageExporter
    from torch.package.package_importer import PackageImporter

    path = folder / "package.pt"
    with PackageExporter(path) as exporter:
        exporter.extern("torch.**")
        exporter.save_pickle("nets", "model.pkl", {"state_dict": Scriptable().state_dict(), "epoch": 3})
        exporter.save_text("notes", "read.me", "text")
    state = PackageImporter(path).load_pickle("nets", "model.pkl")["state_dict"]
    if deflated:
        path = rewritten(path, folder / "deflated.pt", method=zipfile.ZIP_DEFLATED)
    return UnusualFile(path, state, {"nets.model.epoch": "int 3"})


unusual("torch.package", "state_dict")(partial(_package, deflated=False))
unusual("torch.package", "members packed")(partial(_package, deflated=True))


class Exportable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.register_buffer("kept", ramp(2))
        self.register_buffer("passing", ramp(2), persistent=False)
        self.head = nn.Linear(2, 2)
        self.head.weight = self.fc.weight
        self.brief = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.fc(x) + self.get_buffer("kept")) * self.brief
        return found


@unusual("torch.export", "pt2")
def _exported(folder: Path) -> UnusualFile:
    path = folder / "model.pt2"
    torch.export.save(torch.export.export(Exportable(), (torch.ones(1, 2),)), path)
    state = torch.export.load(path).state_dict
    return UnusualFile(path, tensors_of(state))
