"""The new names of the keys of a state_dict, at the places of a file's index that hold them.

Keys are joined from the names of nested dicts, and torch's ``_metadata`` has module paths of its own: each name is led
back to the dict that holds it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping

from ..errors import NEW_FILE, FileError
from ..formats.contents import Index
from ..formats.pickle.values import Ordered, Value
from ..reading.candidates import continues
from ..reading.tree import TENSORS, children, is_module
from ..tensors.extra_state import is_extra_state

Holder = tuple[Value, str]  # a dict and one of its names


class IndexNames:
    """What to say at which places of an index so that the keys of a state_dict have their new names."""

    def __init__(self, index: Index, names: Mapping[str, str], modules: Mapping[str, str]) -> None:
        self._index = index
        self._path = index.contents.path
        self._names = names
        self._modules = modules
        self._holders: dict[int, Value] = {}
        self._chosen: dict[tuple[int, str], str] = {}  # by a dict's identity and the name in it
        self._texts: dict[Hashable, str] = {}

    def below(self, node: Value) -> Mapping[Hashable, str]:
        """The texts for the state_dict that a node is.  Raises FileError where names cannot be said anew."""
        for steps in self._steps(node, (), (id(node),)):
            self._choose(steps)
        for identity, holder in self._holders.items():
            self._check(identity, holder)
        for (identity, name), text in self._chosen.items():
            self._say(self._holders[identity], name, text)
        self._say_modules(node, "", "", {id(node)})
        return self._texts

    def _steps(self, node: Value, above: tuple[Holder, ...], within: tuple[int, ...]) -> Iterator[tuple[Holder, ...]]:
        """For each tensor the names that its key is made of, as :func:`ckpt_surgeon.open` joins them."""
        if is_module(node):
            raise FileError(self._path, "is, or has in it, a module saved whole, whose names are attributes", NEW_FILE)
        for name, child in children(node):
            steps = (*above, (node, name))
            if isinstance(child, TENSORS) or is_extra_state(name):
                yield steps
            elif continues(name, child) and id(child) not in within:
                yield from self._steps(child, steps, (*within, id(child)))

    def _choose(self, steps: tuple[Holder, ...]) -> None:
        olds = [name for _, name in steps]
        key = ".".join(olds)
        if key not in self._names:
            raise FileError(self._path, f"has {key!r} in a place that cannot be told for certain", NEW_FILE)
        new = self._names[key]
        parts, counts = new.split("."), [name.count(".") + 1 for name in olds]
        if new == key:
            news = olds
        elif len(olds) == 1:
            news = [new]
        elif len(parts) == sum(counts):
            news = [".".join(parts[sum(counts[:depth]) : sum(counts[: depth + 1])]) for depth in range(len(counts))]
        elif new.endswith(rest := "." + ".".join(olds[1:])) and new != rest:
            news = [new.removesuffix(rest), *olds[1:]]
        else:
            raise self._other_nesting(key, new)
        for (holder, old), text in zip(steps, news, strict=True):
            self._holders[id(holder)] = holder
            if self._chosen.setdefault((id(holder), old), text) != text:
                raise self._other_nesting(key, new)

    def _other_nesting(self, key: str, new: str) -> FileError:
        problem = f"its dicts are nested, and {key!r} cannot become {new!r} without another nesting"
        return FileError(self._path, problem, NEW_FILE)

    def _check(self, identity: int, holder: Value) -> None:
        """Beside the tensors, a dict may hold other things, under names that tensors cannot have too."""
        seen: dict[str, str] = {}
        for old, _ in children(holder):
            new = self._chosen.get((identity, old), old)
            if seen.setdefault(new, old) != old:
                raise FileError(self._path, f"{seen[new]!r} and {old!r} would both become {new!r}", NEW_FILE)

    def _say(self, holder: Value, name: str, text: str) -> None:
        if name == text:
            return
        places = self._index.places(holder, name)
        if not places:
            raise FileError(self._path, f"says {name!r} in a way that cannot be changed in place", NEW_FILE)
        self._texts.update(dict.fromkeys(places, text))

    # -- torch's _metadata

    def _say_modules(self, node: Value, old: str, new: str, seen: set[int]) -> None:
        """Rename the module paths of a dict, at the path ``old`` and later ``new``, and of those in it."""
        attributes = node.attributes if isinstance(node, Ordered) else None
        saved = attributes.get("_metadata") if isinstance(attributes, dict) else None
        if isinstance(saved, dict):
            for name, text in self._module_names(saved, old, new).items():
                self._say(saved, name, text)
        for name, child in children(node):
            is_key = isinstance(child, TENSORS) or is_extra_state(name)
            if (id(node), name) in self._chosen and not is_key and id(child) not in seen:
                seen.add(id(child))
                text = self._chosen[id(node), name]
                self._say_modules(child, joined_path(old, name), joined_path(new, text), seen)

    def _module_names(self, saved: Mapping[Value, Value], old: str, new: str) -> dict[str, str]:
        """The new name of each module path of one dict.

        A path that goes takes the name of one that stays, so that the dict has it once: of the next, which overwrites
        it, or of one that says the same.
        """
        made: dict[str, str] = {}
        gone: list[str] = []
        for name, version in saved.items():
            if not isinstance(name, str) or not isinstance(version, dict):
                continue
            path = self._modules.get(joined_path(old, name))
            if path is None:
                gone.append(name)
                continue
            if path != new and new and not path.startswith(new + "."):
                raise self._other_nesting(joined_path(old, name), path)
            made[name] = path.removeprefix(new).removeprefix(".") if new else path
            made |= dict.fromkeys(gone, made[name])
            gone = []
        for name in gone:
            twin = next((other for other in made if saved[other] == saved[name]), name)
            made[name] = made.get(twin, name)
        return made


def joined_path(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
