"""Strict YAML 1.2 in and out, and `key=value` overrides: what `config.py` reads a run's settings with.

PyYAML speaks YAML 1.1, in which `5e-7` is a string, `no` is False and `010` is 8; a run file written by a person means
the 1.2 reading. A key given twice is an error here, where PyYAML silently keeps the last.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from sdpo_kernels.stepwise.common.errors import UserError

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_RESOLVERS = [
    ("tag:yaml.org,2002:null", _NULL, ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", _BOOL, list("tTfF")),
    ("tag:yaml.org,2002:int", _INT, list("-+0123456789")),
    ("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789")),
    ("tag:yaml.org,2002:merge", re.compile("<<"), ["<"]),
]


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2 and an error on a key given twice."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - PyYAML fills the class attribute through add_implicit_resolver

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = (key_node.tag, key_node.value) if isinstance(key_node, yaml.ScalarNode) else None
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} is given twice", key_node.start_mark
                )
            if key is not None:
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes a string which either YAML 1.1 or 1.2 would read as something else."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: list(rules) for first, rules in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    try:
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
    except ValueError as error:  # Python refuses integers of more than 4300 digits
        raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from error


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    text = loader.construct_scalar(node).lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def _represent_str(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # PyYAML writes these line breaks of Unicode bare into other styles, where reading folds them into spaces.
    style = '"' if any(character in text for character in "\x85\u2028\u2029\ufeff") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_str)
for _tag, _pattern, _first in _RESOLVERS:
    _whole = re.compile(f"^(?:{_pattern.pattern})$")
    _Loader.add_implicit_resolver(_tag, _whole, _first)
    _Dumper.add_implicit_resolver(_tag, _whole, _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The mapping a YAML file holds; UserError (one line that names the file) when there is none."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder, must be a YAML file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    settings = _parse(text, str(path))
    if settings is None:
        raise UserError(f"{path}: is empty, must hold at least model, output_dir and stages")
    if not isinstance(settings, dict):
        kind = "a list" if isinstance(settings, list) else f"a single value ({settings!r:.40})"
        raise UserError(f"{path}: holds {kind}, must hold keys such as 'model: …' at the top")
    return settings


def write_settings(settings: dict[str, Any]) -> str:
    """YAML text that `read_settings` reads back equal."""
    return yaml.dump(settings, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def apply_override(settings: dict[str, Any], override: str) -> None:
    """Set one 'key=value' in place; dots go down ('trainer.learning_rate=1e-5', 'stages.0.beta=0.05').

    The value is read as YAML. A section that is absent or null is made; a position that a list does not have is a
    UserError. Whether the key is a known one is the schema's business.
    """
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"override {override!r}: must be key=value, such as beta=0.05 or stages.0.beta=0.05")
    value = _parse(text, f"override {override!r}")
    here: Any = settings
    for depth, part in enumerate(parts[:-1]):
        at = _position(here, part, parts[:depth], override)
        below = here[at] if isinstance(here, list) else here.get(at)
        if below is None:
            below = {}
            here[at] = below
        here = below
    here[_position(here, parts[-1], parts[:-1], override)] = value


def _position(container: Any, part: str, above: list[str], override: str) -> Any:
    """`part` as a key of a mapping or an index of a list."""
    if isinstance(container, dict):
        return part
    name = ".".join(above)
    if not isinstance(container, list):
        raise UserError(f"override {override!r}: {name} is {container!r:.40}, which has no {part!r} in it")
    if not (part.isascii() and part.isdigit() and int(part) < len(container)):
        last = len(container) - 1
        raise UserError(f"override {override!r}: {name} is a list, {part!r} must be a position from 0 to {last}")
    return int(part)


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f":{mark.line + 1}" if mark is not None else ""
        raise UserError(f"{source}{line}: is not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{source}: is not valid YAML: {reason}") from None
