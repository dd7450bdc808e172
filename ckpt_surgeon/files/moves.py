"""Several files put in their places as one output: all of them, or what was there before, whatever interrupts it.

What will be moved where is written down first, in ``.NAME.TOKEN.moves`` beside the files, and goes when the last file
has its name.  So whoever finds such a list knows what was going on: :func:`take_back` undoes the moves one by one.  It
moves a file back only if that is the very one that was put there.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import PurePosixPath
from typing import NamedTuple

from ..errors import FileError
from ..text import command
from .journal import sync_directory
from .local import LocalPath
from .swap import put, put_back, remove
from .temporary import MADE, MOVES, OLD, Hold, parsed, temporary

LONGEST = 64 << 20  # bytes of a list: some 200,000 shards


class Move(NamedTuple):
    """A file that gets its final name; what has that name is kept as ``old`` until all are done.

    ``made`` is None for a file that only goes away.  ``identity`` (inode, size, time) tells the new file from others.
    """

    made: LocalPath | None
    final: LocalPath
    old: LocalPath
    identity: tuple[int, ...]


def put_all(made: Mapping[LocalPath, LocalPath], stale: Sequence[LocalPath], token: str, out: LocalPath) -> None:
    """Rename files (final name by temporary name) to their final names, the last one last, and remove ``stale`` ones.

    Whatever fails on the way is taken back: until the last one has its name, the old ones are kept beside it.  Raises
    FileError where that cannot be done either; ``out`` is what ``ckpt recover`` takes back then.
    """
    if len(made) == 1 and not stale:
        for temporary_name, final in made.items():
            put(temporary_name, final)
        return
    moves = [Move(at, final, temporary(final, token, OLD), _identity(at)) for at, final in made.items()]
    moves[-1:-1] = [Move(None, path, temporary(path, token, OLD), ()) for path in stale]
    folder = moves[-1].final.parent
    with _listed(moves, temporary(moves[-1].final, token, MOVES)):
        try:
            _move(moves)
        except BaseException:
            try:
                _undo(moves)
            except OSError as error:
                problem = f"could neither be replaced nor brought back ({error.strerror})"
                raise FileError(out, problem, f"once its disk works: {command('recover', out)}") from error
            raise
        with suppress(OSError):  # from here on the new output is there, whatever happens
            sync_directory(folder)


def _move(moves: Sequence[Move]) -> None:
    """Carry out all moves.  An old index goes first: half of a new output is never taken for the whole."""
    last = moves[-1]
    if os.path.lexists(last.final):
        os.rename(last.final, last.old)
    for move in moves[:-1]:
        if os.path.lexists(move.final):
            _keep(move)
        if move.made is not None:
            os.replace(move.made, move.final)
    sync_directory(last.final.parent)  # no file may be behind the last one, also where the power goes
    assert last.made is not None
    os.replace(last.made, last.final)


def _keep(move: Move) -> None:
    """Give an old file a second name, so that its own never leads to nothing; where that is not to be had, another."""
    if move.made is not None:
        with suppress(OSError):
            os.link(move.final, move.old, follow_symlinks=False)
            return
    os.rename(move.final, move.old)


def _undo(moves: Sequence[Move]) -> None:
    """Take moves back, as many as can be; raises OSError where some cannot."""
    failed: OSError | None = None
    for made, final, old, identity in reversed(moves):
        try:
            if made is not None and not os.path.lexists(made) and _identity(final) == identity:
                os.rename(final, made)
            if os.path.lexists(old) and (not os.path.lexists(final) or os.path.samefile(old, final)):
                put_back(old, final)
        except OSError as error:
            failed = error
    if failed is not None:
        raise failed


def _identity(path: LocalPath) -> tuple[int, ...]:
    try:
        status = os.lstat(path)
    except OSError:
        return ()
    return (status.st_ino, status.st_size, status.st_mtime_ns)


# -- the list


@contextmanager
def _listed(moves: Sequence[Move], path: LocalPath) -> Iterator[None]:
    """Have the list of moves on the disk while they are made; it stays where they could not be taken back."""
    hold = Hold()
    try:
        with open(path, "xb") as file:
            hold.take(path)
            file.write(_packed(moves, path.parent))
            file.flush()
            os.fsync(file.fileno())
        sync_directory(path.parent)
    except BaseException:
        hold.release()
        with suppress(OSError):
            os.unlink(path)
        raise
    try:
        yield
    except BaseException:
        if all(move.made is None or os.path.lexists(move.made) for move in moves):
            with suppress(OSError):
                os.unlink(path)
        raise
    else:
        _forget(moves, path)
    finally:
        hold.release()


def _forget(moves: Sequence[Move], path: LocalPath) -> list[LocalPath]:
    """Remove the old files, and then the list, of moves that were all made; returns those that are gone."""
    gone: list[LocalPath] = []
    is_clear = True
    for place in [*(move.old for move in moves), path]:
        if place == path and not is_clear:  # the list says what the files are that are left
            break
        try:
            os.unlink(place)
            gone.append(place)
        except FileNotFoundError:
            continue
        except OSError:
            is_clear = False
    return gone


def _packed(moves: Sequence[Move], folder: LocalPath) -> bytes:
    rows = [
        [move.made and os.path.relpath(move.made, folder), move.final.name, move.old.name, *move.identity]
        for move in moves
    ]
    return json.dumps({"moves": rows}).encode()


def listed_moves(path: LocalPath) -> list[Move]:
    """The moves that a list has; none where it is not whole, so that nothing was moved, or leads out of its folder."""
    try:
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size > LONGEST:
            return []
        return [_read(row, path.parent) for row in json.loads(path.read_bytes())["moves"]]
    except (OSError, ValueError, LookupError, TypeError):
        return []


def _read(row: Sequence[object], folder: LocalPath) -> Move:
    made, final, old, *identity = row
    if not all(isinstance(number, int) for number in identity):
        raise ValueError
    places = [None if name is None else _inside(folder, str(name)) for name in (made, final, old)]
    if places[1] is None or places[2] is None:
        raise ValueError
    return Move(places[0], places[1], places[2], tuple(int(str(number)) for number in identity))


def _inside(folder: LocalPath, name: str) -> LocalPath:
    """A file of a folder, or of a hidden folder in it."""
    parts = PurePosixPath(name).parts
    if ".." in parts or name.startswith("/") or not parts or len(parts) > 2 or (len(parts) == 2 and name[0] != "."):
        raise ValueError
    return folder / name


def clear(found: Mapping[str, Sequence[LocalPath]]) -> list[LocalPath]:
    """Remove what killed runs left behind, by their tokens; returns what was removed.

    Where a run was killed while it replaced files, the old ones come back.  Raises FileError where they cannot.
    """
    gone: dict[LocalPath, None] = {}
    for paths in found.values():
        left = dict.fromkeys(paths)
        lists = [path for path in paths if path.suffix == MOVES]
        for path in lists:
            left.update(dict.fromkeys(move.made for move in listed_moves(path) if move.made is not None))
            gone.update(dict.fromkeys(take_back(path)))
        left = {path: None for path in left if path not in gone and os.path.lexists(path)}
        unfinished = any(path.suffix == MADE for path in left)
        for path in left:
            parts = parsed(path.name)
            final = path.with_name(parts.name) if parts else path
            if path.suffix == OLD and not lists and (unfinished or not os.path.lexists(final)):
                with suppress(OSError):
                    _bring_back(path, final)
                continue
            if path.suffix == MADE and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)  # a run's folder may have folders in it
            else:
                remove(path)
            gone[path] = None
    return list(gone)


def _bring_back(old: LocalPath, final: LocalPath) -> None:
    if old.is_dir() and os.path.lexists(final):
        return  # the new folder is there, and both are whole
    put_back(old, final)


def take_back(path: LocalPath) -> list[LocalPath]:
    """Undo the moves of a list whose run is no more, or remove the old files where all moves were made; the list goes.

    Returns what was removed.  Raises FileError where a move cannot be undone.
    """
    moves = listed_moves(path)
    if moves and all(_identity(move.final) == move.identity for move in moves if move.made is not None):
        return _forget(moves, path)
    try:
        _undo(moves)
        sync_directory(path.parent)
        os.unlink(path)
    except OSError as error:
        raise FileError(path, f"has moves that cannot be taken back ({error.strerror})", "try again") from error
    return [path]
