"""Error lines about a run's settings that the user can act on: 'run.yaml: beta: was -1, must be greater than 0'."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

# what other trainers call settings, where the most similar name is another setting
_OTHER_NAMES = {
    "per_device_batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "batch_size": "per_device_train_batch_size",
    "lr": "learning_rate",
}


class SettingErrors(ValueError):
    """Mistakes in settings, each a (key, what it was and what it must be)."""

    def __init__(self, mistakes: list[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{key}: {text}" for key, text in mistakes))
        self.mistakes = mistakes


def show(value: Any) -> str:
    """A value for an error line: null, true and false as in YAML, everything cut to 60 characters."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error line about an unknown name: the most similar known one, else all known ones."""
    known = sorted(known)
    if (other := _OTHER_NAMES.get(str(name))) in known:
        return f"did you mean {other!r}?"
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"must be one of {', '.join(known)}" if len(known) <= 40 else "no similar name exists"


def error_lines(
    error: ValidationError,
    file: str,
    overrides: Sequence[str],
    sections: Mapping[str, type[BaseModel]],
    trainer_fields: Iterable[str],
) -> list[str]:
    """One line per mistake that pydantic found.

    Args:
        error: What pydantic raised.
        file: Name of the YAML file, as the user gave it.
        overrides: The overrides from the command line; a line about a key set there says so.
        sections: The model of each section by its key in the file; '' is the top level.
        trainer_fields: Names that are valid under `trainer`.
    """
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in _path_in_file(problem["loc"]))
        for at, text in _mistakes_of(problem, key, sections, frozenset(trainer_fields)):
            lines.append(f"{file}: {at}: {text}{_override_note(at, overrides)}")
    return lines


def _mistakes_of(
    problem: Any, key: str, sections: Mapping[str, type[BaseModel]], trainer_fields: frozenset[str]
) -> list[tuple[str, str]]:
    """One of pydantic's problems as (key, what is wrong); none for a problem that other lines cover."""
    # raised by our own validators: the message is already in the form of an error line
    raised = problem.get("ctx", {}).get("error")
    if isinstance(raised, SettingErrors):
        top = sections[""].model_fields
        start = f"{key}." if key else ""
        return [(start + below, _top_level_hint(below, text, top, key)) for below, text in raised.mistakes]
    if raised is not None:
        return [(key, str(raised))]

    # raised by pydantic
    kind, value = problem["type"], problem["input"]
    if kind == "missing":
        return [(key, "is required")]
    if kind == "extra_forbidden":
        return [(key, _unknown_key(problem["loc"], sections, trainer_fields))]
    if kind in ("too_short", "string_too_short"):
        # pydantic does not count invalid items of a list; those have error lines of their own
        return [] if value else [(key, f"was {show(value)}, must not be empty")]
    if kind == "union_tag_not_found":
        return [(f"{key}.kind", "is required")]
    if kind == "union_tag_invalid":
        return [(f"{key}.kind", f"was {problem['ctx']['tag']!r}, must be one of {problem['ctx']['expected_tags']}")]
    return [(key, f"was {show(value)}, {must_be(problem)}")]


def must_be(problem: Any) -> str:
    """What a value must be, of one of pydantic's problems; in terms of YAML where pydantic speaks of Python types."""
    ours = {
        "dict_type": "must be a mapping",
        "model_type": "must be a mapping",
        "tuple_type": "must be a list",
        "float_parsing": "must be a valid number",
        "int_parsing": "must be a valid integer",
        "bool_parsing": "must be true or false",
        "bool_type": "must be true or false",
    }
    return ours.get(problem["type"]) or problem["msg"].replace("Input should be", "must be")


def _unknown_key(
    loc: Sequence[str | int], sections: Mapping[str, type[BaseModel]], trainer_fields: frozenset[str]
) -> str:
    """The error text for an unknown key, with the best hint available.

    1. A key of another kind of source: name that kind.
    2. A name similar to a trainer field, unless one similar to a key of this section exists: point to `trainer`.
    3. Otherwise the most similar key of this section, or all of them.
    """
    key, section = str(loc[-1]), _section_of(loc, sections)

    if kinds := _source_kinds_with(key, section, sections):
        return f"unknown key for this kind; it belongs to kind: {', '.join(kinds)}"

    near = difflib.get_close_matches(key, section.model_fields, n=1)
    under_trainer = [] if near else difflib.get_close_matches(key, trainer_fields, n=1, cutoff=0.75)
    if (other := _OTHER_NAMES.get(key)) in trainer_fields:
        under_trainer = [other]
    if key not in section.model_fields and under_trainer:
        return f"unknown key; did you mean 'trainer.{under_trainer[0]}'?"

    return f"unknown key; {did_you_mean(key, section.model_fields)}"


def _path_in_file(loc: Sequence[str | int]) -> list[str | int]:
    """The keys that lead to a mistake in the file, without the kinds that pydantic inserts: a source's, <entry>."""
    kinds = ("<path>", "<entry>")
    return [part for place, part in enumerate(loc) if part not in kinds and (place == 0 or loc[place - 1] != "source")]


def _section_of(loc: Sequence[str | int], sections: Mapping[str, type[BaseModel]]) -> type[BaseModel]:
    """The model of the section that contains the last key of `loc`."""
    names = [part for part in loc[:-1] if isinstance(part, str)]
    keys = [".".join(names[first:]) for first in range(len(names) + 1)]
    return next(sections[key] for key in keys if key in sections)


def _source_kinds_with(key: str, section: type[BaseModel], sections: Mapping[str, type[BaseModel]]) -> list[str]:
    """The other kinds of source that have `key`, if `section` is a kind of source."""
    kinds = {name.removeprefix("source."): model for name, model in sections.items() if name.startswith("source.")}
    return [kind for kind, model in kinds.items() if section in kinds.values() and key in model.model_fields]


def _top_level_hint(key: str, text: str, top: Iterable[str], section: str) -> str:
    """For a top-level key put under `section`: say where it belongs instead of naming a similar field."""
    if text.startswith("unknown key") and key in top:
        return f"unknown key; {key!r} belongs at the top level, not under {section.rpartition('.')[2]}"
    return text


def _override_note(key: str, overrides: Sequence[str]) -> str:
    """A note for a mistake that the command line made, not the file; empty otherwise."""
    for override in overrides:
        set_key = override.partition("=")[0].strip()
        if key == set_key or key.startswith(f"{set_key}."):
            return f" (from the override {override!r})"
    return ""
