"""Mistakes in a run's settings as lines a person can act on: 'run.yaml: beta: was -1, must be greater than 0'."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError


class SettingErrors(ValueError):
    """Mistakes in settings, each a (key, what it was and what it should be)."""

    def __init__(self, mistakes: list[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{key}: {text}" for key, text in mistakes))
        self.mistakes = mistakes


def show(value: Any) -> str:
    """A value as one short piece of an error line."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def did_you_mean(key: str, known: Iterable[str]) -> str:
    """The end of an error line about an unknown key: the nearest known one, else all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known are: {', '.join(known)}" if len(known) <= 40 else "no known key is near it"


def error_lines(
    error: ValidationError,
    file: str,
    overrides: Sequence[str],
    sections: Mapping[str, type[BaseModel]],
    trainer_fields: Iterable[str],
) -> list[str]:
    """One line a mistake. `sections` are the schema's models by the key they stand under ('' is the top)."""
    lines = []
    for problem in error.errors():
        at = ".".join(str(part) for part in _written(problem["loc"]))
        for key, text in _mistakes(problem, at, sections, frozenset(trainer_fields)):
            lines.append(f"{file}: {key}: {text}{_origin(key, overrides)}")
    return lines


def _mistakes(
    problem: Any, at: str, sections: Mapping[str, type[BaseModel]], trainer_fields: frozenset[str]
) -> list[tuple[str, str]]:
    kind, raised = problem["type"], problem.get("ctx", {}).get("error")
    top = sections[""].model_fields
    if isinstance(raised, SettingErrors):
        return [(f"{at}.{key}" if at else key, _not_trainer(key, text, top)) for key, text in raised.mistakes]
    if raised is not None:
        return [(at, str(raised))]
    if kind == "missing":
        return [(at, "is required")]
    if kind == "extra_forbidden":
        key = str(problem["loc"][-1])
        section = _section(problem["loc"], sections)
        if kinds := _kinds_with(key, section, sections):
            return [(at, f"unknown key for this kind; it belongs to kind: {', '.join(kinds)}")]
        near = difflib.get_close_matches(key, section.model_fields, n=1)
        under_trainer = [] if near else difflib.get_close_matches(key, trainer_fields, n=1, cutoff=0.75)
        if key not in section.model_fields and under_trainer:
            return [(at, f"unknown key; did you mean 'trainer.{under_trainer[0]}'?")]
        return [(at, f"unknown key; {did_you_mean(key, section.model_fields)}")]
    if kind in ("too_short", "string_too_short"):
        # pydantic counts only the items that are right; the wrong ones have lines of their own
        return [] if problem["input"] else [(at, f"was {show(problem['input'])}, must not be empty")]
    if kind == "union_tag_not_found":
        return [(f"{at}.kind", "is required")]
    if kind == "union_tag_invalid":
        return [(f"{at}.kind", f"was {problem['ctx']['tag']!r}, must be one of {problem['ctx']['expected_tags']}")]
    wanted = {
        "dict_type": "must be keys with values",
        "model_type": "must be keys with values",
        "tuple_type": "must be a list",
        "finite_number": "must be finite",
    }.get(kind, problem["msg"].replace("Input should be", "must be"))
    return [(at, f"was {show(problem['input'])}, {wanted}")]


def _written(loc: Sequence[str | int]) -> list[str | int]:
    """Where a mistake stands in the file: pydantic puts a source's kind between `source` and its keys."""
    return [part for place, part in enumerate(loc) if place == 0 or loc[place - 1] != "source"]


def _section(loc: Sequence[str | int], sections: Mapping[str, type[BaseModel]]) -> type[BaseModel]:
    """The schema's model that holds the last key of `loc`."""
    names = [part for part in loc[:-1] if isinstance(part, str)]
    keys = [".".join(names[first:]) for first in range(len(names) + 1)]
    return next(sections[key] for key in keys if key in sections)


def _kinds_with(key: str, section: type[BaseModel], sections: Mapping[str, type[BaseModel]]) -> list[str]:
    """The other kinds of source that have `key`, where `section` is a kind of source."""
    kinds = {name.removeprefix("source."): model for name, model in sections.items() if name.startswith("source.")}
    return [kind for kind, model in kinds.items() if section in kinds.values() and key in model.model_fields]


def _not_trainer(key: str, text: str, top: Iterable[str]) -> str:
    """A key of the run that stands under trainer: say so rather than name a field that merely looks like it."""
    if text.startswith("unknown key") and key in top:
        return f"unknown key; {key!r} stands at the top, not under trainer"
    return text


def _origin(key: str, overrides: Sequence[str]) -> str:
    for override in overrides:
        set_key = override.partition("=")[0].strip()
        if key == set_key or key.startswith(f"{set_key}."):
            return f" (from the override {override!r})"
    return ""
