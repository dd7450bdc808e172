"""The schemas of what commands print with --json, and the page of docs/ that is written of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pages import DOCS

SCHEMAS = DOCS / "schemas"
PAGE = DOCS / "json.md"
BEGIN = "<!-- the tables below are written by: python tests/cli/test_json.py -->\n"

Schema = Mapping[str, Any]


def schemas() -> dict[str, Schema]:
    """Every schema, by the name that a document gives in ``schema``."""
    found = [json.loads(path.read_text("utf-8")) for path in sorted(SCHEMAS.glob("*.json"))]
    return {schema["title"]: schema for schema in found}


def page_with_tables(text: str) -> str:
    """The page as it should read: what stands above the tables, and a table for each schema."""
    sections = [f"\n## {name}\n\n`{schema['description']}`\n\n{table_of(schema)}" for name, schema in schemas().items()]
    return text.partition(BEGIN)[0] + BEGIN + "".join(sections)


def table_of(schema: Schema) -> str:
    """A row for each field of a schema, those of objects inside it too."""
    rows = [f"| `{name}` | {kind} | {text} |" for name, kind, text in fields(schema, schema, "")]
    return "\n".join(["| field | type | meaning |", "|---|---|---|", *rows]) + "\n"


def fields(schema: Schema, whole: Schema, path: str) -> Iterator[tuple[str, str, str]]:
    """Path, type and meaning of each field."""
    for name, given in schema["properties"].items():
        one = resolved(given, whole)
        optional = "" if name in schema["required"] else ", may be left out"
        yield path + name, kind_of(one, whole) + optional, one["description"]
        inner, suffix = inside(one, whole)
        if "properties" in inner:
            yield from fields(inner, whole, f"{path}{name}{suffix}.")


def inside(one: Schema, whole: Schema) -> tuple[Schema, str]:
    """The object in a field, and how a path goes through the field to it."""
    if "anyOf" in one:
        return resolved(one["anyOf"][0], whole), ""
    if "items" in one:
        return resolved(one["items"], whole), "[]"
    if isinstance(one.get("additionalProperties"), Mapping):
        return resolved(one["additionalProperties"], whole), ".*"
    return one, ""


def kind_of(one: Schema, whole: Schema) -> str:
    """The type of a field in a few words."""
    if "const" in one:
        return f"`{json.dumps(one['const'])}`"
    if "enum" in one:
        return ", ".join(f"`{json.dumps(value)}`" for value in one["enum"])
    if "anyOf" in one:
        return " or ".join(kind_of(each, whole) for each in one["anyOf"])
    kinds = one["type"] if isinstance(one["type"], list) else [one["type"]]
    inner, suffix = inside(one, whole)
    if suffix:
        return f"{'list' if suffix == '[]' else 'object by name'} of {kind_of(inner, whole)}"
    return " or ".join(kinds)


def resolved(one: Schema, whole: Schema) -> Schema:
    """A schema in place of a reference to it; what the field itself says stays."""
    reference = one.get("$ref")
    if reference is None:
        return one
    return {**whole["$defs"][reference.rpartition("/")[2]], **one}
