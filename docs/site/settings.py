"""Tables of settings, from the schema of run.yaml: keys, values and defaults as pydantic has them, texts of docstrings.

A table's cells are short: the first sentence of a description. The others follow below the table.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from typing import Any

import griffe
from pydantic import BaseModel

from sdpo_kernels.stepwise.settings import (
    columns,
    generation,
    lora,
    post,
    quantization,
    reference,
    run_settings,
    source,
)
from sdpo_kernels.stepwise.settings.trainer import DEFAULT_TRAINER, OWNED, REMOVED

# of run.yaml's sections: the class, and how its keys are written
SECTIONS: dict[str, tuple[type[BaseModel], str]] = {
    "RunConfig": (run_settings.RunConfig, ""),
    "StageConfig": (run_settings.StageConfig, ""),
    "DataEntry": (columns.DataEntry, ""),
    "ColumnSettings": (columns.ColumnSettings, "columns."),
    "MultiSettings": (reference.MultiSettings, "multi."),
    "EmaSettings": (reference.EmaSettings, "ema."),
    "LoraSettings": (lora.LoraSettings, "lora."),
    "QuantizationSettings": (quantization.QuantizationSettings, "quantization."),
    "PostSettings": (post.PostSettings, "post."),
    "ExpoSettings": (post.ExpoSettings, "post.expo."),
    "Sampling": (source.Sampling, "source."),
    "GenerationSettings": (generation.GenerationSettings, "generation."),
    **{kind.__name__: (kind, "source.") for kind in source.SOURCES.values()},
}
_BOUNDS = {"ge": "≥", "minimum": "≥", "gt": ">", "exclusiveMinimum": ">", "le": "≤", "lt": "<"}
_ANY = {"loss": "name or list", "post.expo.alpha": "number or list"}  # what the schema leaves open


def part(words: Sequence[str]) -> str:
    """The table of a section, or of some of its keys; or one of the tables of `trainer`."""
    if words[0] == "trainer":
        return {"defaults": trainer_defaults, "owned": trainer_owned, "removed": trainer_removed}[words[1]]()
    section, prefix = SECTIONS[words[0]]
    return settings_table(section, prefix, words[1:] or own_keys(section))


def own_keys(section: type[BaseModel]) -> list[str]:
    """The keys of a section; of a kind of source those that it adds to Sampling's, or that it describes anew."""
    if section is source.Sampling or not issubclass(section, source.Sampling):
        return list(section.model_fields)
    return [name for name in section.model_fields if name in section.__annotations__ and name != "kind"]


def settings_table(section: type[BaseModel], prefix: str, keys: Sequence[str]) -> str:
    """key, value, default and meaning of each key; below, what the cells leave out."""
    schema, texts = section.model_json_schema()["properties"], descriptions(section)
    lines, more = [], []
    for key in keys:
        name = f"`{prefix}{key}`"
        first, rest = first_sentence(texts[key])
        value = values(schema[key]) or _ANY[prefix + key]
        lines.append((name, value, default(section, key), first))
        if rest:
            more.append(f"- {name}: {rest}")
    return table(("key", "value", "default", "meaning"), lines) + ("\n\n" + "\n".join(more) if more else "")


def descriptions(section: type[BaseModel]) -> dict[str, str]:
    """What the docstrings of a section and its bases say of each key."""
    found: dict[str, str] = {}
    for kind in reversed(section.__mro__):
        if issubclass(kind, BaseModel) and kind.__doc__ and kind.__doc__ != BaseModel.__doc__:
            found |= arguments(kind.__doc__)
    return found


def arguments(docstring: str) -> dict[str, str]:
    """The "Args" of a docstring, one line each."""
    logging.getLogger("griffe").setLevel(logging.ERROR)  # it misses a signature to compare them with
    sections = griffe.Docstring(docstring).parse("google", warnings=False)
    listed = [part for part in sections if part.kind is griffe.DocstringSectionKind.parameters]
    return {argument.name: " ".join(argument.description.split()) for part in listed for argument in part.value}


def first_sentence(text: str) -> tuple[str, str]:
    """The first sentence of a description and the others; what is quoted becomes code."""
    text = re.sub(r"'([^'\s]+)'", r"`\1`", text)
    first, _, rest = re.sub(r"(?<!e\.g)\. (?=[A-Z`'βΑ])", ".\n", text, count=1).partition("\n")
    return first, rest


def values(schema: dict[str, Any]) -> str:
    """What a key may be, of its JSON schema; empty if anything."""
    if choices := schema.get("anyOf"):
        return " or ".join(values(choice) for choice in choices if choice.get("type") != "null")
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{choice}`" for choice in schema.get("enum", [schema.get("const")]))
    if "$ref" in schema or "oneOf" in schema or schema.get("type") == "object":
        return "mapping"
    kind = {"string": "text", "boolean": "`true`, `false`", "array": "list"}.get(schema.get("type", ""))
    bounds = ", ".join(f"{sign} {schema[name]}" for name, sign in _BOUNDS.items() if name in schema)
    return kind or " ".join(filter(None, (schema.get("type", ""), bounds)))


def default(section: type[BaseModel], key: str) -> str:
    """The default of a key as YAML has it; empty if there is none."""
    field = section.model_fields[key]
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "" if value is None or isinstance(value, BaseModel) else f"`{as_yaml(value)}`"


def as_yaml(value: Any) -> str:
    """A default as it would stand in run.yaml."""
    if isinstance(value, float):
        return f"{value:g}".replace("e-0", "e-")
    return value if isinstance(value, str) else json.dumps(value)


def trainer_defaults() -> str:
    """What `trainer` has where run.yaml does not say otherwise."""
    return table(("key", "default"), [(f"`{key}`", f"`{as_yaml(v)}`") for key, v in DEFAULT_TRAINER.items()])


def trainer_owned() -> str:
    """The fields of TrainingArguments that cannot be set."""
    return table(("field", "instead"), [(f"`{name}`", why) for name, why in OWNED.items()])


def trainer_removed() -> str:
    """The fields that earlier versions of TrainingArguments had."""
    removed = [(f"`{name}`", why) for name, why in REMOVED.items()]
    return table(("field of transformers 4", "instead"), removed)


def table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    rows = [headings, ["---"] * len(headings), *([cell.replace("|", "\\|") for cell in line] for line in lines)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)
