"""The command on shards: index."""

from __future__ import annotations

import json

import click

from ..files.paths import FilePath
from ..text import plural
from .options import FILE_PATH
from .terminal import say_done


@click.command(short_help="Write the index of shards that have none.")
@click.argument("path", metavar="FOLDER", type=FILE_PATH)
@click.option("--force", "-f", is_flag=True, help="Replace an index that is there.")
@click.option("--quiet", "-q", is_flag=True, help="Print nothing unless something is wrong.")
def index(path: FilePath, force: bool, quiet: bool) -> None:
    """Write the index of shards, model.safetensors.index.json, beside them, as Hugging Face's hub has it.

    FOLDER is the folder of model-00001-of-00002.safetensors and so on, or one of these.  Only headers are read.  A set
    with missing shards, or with a key that two of them have, is refused.

    \b
    Example:
      ckpt index shards
    """
    from ..writing.shard_index import write_index

    made = write_index(path, force=force)
    if not quiet:
        weight_map = json.loads(made.read_text("utf-8"))["weight_map"]
        shards = plural(len(set(weight_map.values())), "shard")
        say_done(f"wrote {made}: {plural(len(weight_map), 'tensor')} in {shards}")


command_of = {"index": index}.get
