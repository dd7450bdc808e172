"""Which of the packages that are slow to import a new process has loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence

HEAVY = ("torch", "numpy", "ml_dtypes", "safetensors", "torchvision", "tqdm", "fsspec", "asyncio", "concurrent.futures")


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
    return loaded_by_all([words])


def loaded_by_all(commands: Iterable[Sequence[object]]) -> set[str]:
    """The heavy packages that any of several commands loads, each run after the other in one new process."""
    script = (
        "import json\n"
        "from ckpt_surgeon.cli import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    sys.argv = ['ckpt', *words]\n"
        "    try:\n        main()\n"
        "    except SystemExit as ended:\n        assert ended.code in (0, 1), (words, ended.code)\n"
    )
    return loaded_after(script, json.dumps([[str(word) for word in words] for words in commands]))
