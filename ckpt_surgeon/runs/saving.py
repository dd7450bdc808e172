"""Writing a run: one file of torch.save, in one step, read back before it takes its place."""

from __future__ import annotations

from pathlib import Path

from ..errors import OutputExists
from ..files.paths import AnyPath, file_path
from ..files.sinks import FileSink
from ..formats.zip.whole import write_whole
from .run import Run


def save_run(run: Run, out: AnyPath, *, force: bool = False) -> Path:
    """Write a run to a file of torch.save and give its path."""
    path = Path(str(file_path(out)))
    if path.exists() and not force:
        raise OutputExists(path)
    with open(path, "wb") as file, FileSink(file.fileno(), lambda done: None) as sink:
        write_whole(sink, run.whole, run.instead())
    return path
