"""The command line's way in, also ``python -m ckpt_surgeon``: an interrupt is one line from the first import on."""

from __future__ import annotations

import sys


def run(*, several: bool = False) -> None:
    """Run the command line; ``several`` lets it be one of the processes that torchrun started."""
    try:
        from .cli import main

        main(several=several)
    except KeyboardInterrupt:
        print("ckpt: interrupted, nothing was replaced", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run(several=True)
