"""Strict YAML 1.2 in and out, and `key=value` overrides: what `config.py` reads a run's settings with.

In YAML 1.2 `5e-7` is a number, `no` is a string and `010` is ten; YAML 1.1, which PyYAML reads, differs in all three.
ruamel.yaml parses and writes in pure Python, so that nothing depends on whether libyaml is installed.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode
from ruamel.yaml.representer import SafeRepresenter
from ruamel.yaml.resolver import VersionedResolver
from ruamel.yaml.tag import Tag

from sdpo_kernels.stepwise.common.errors import UserError

# Plain scalars of YAML 1.2's core schema (section 10.3.2 of its specification), and merge keys. ruamel's table for 1.2
# also has dates, `=`, `1_000` and `0b1`, which the core schema reads as strings, and lacks `.5e3`.
_CORE_SCHEMA = {
    "null": re.compile(r"~|null|Null|NULL|"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    "float": re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
    "merge": re.compile(r"<<"),
}
_YAML_1_1 = VersionedResolver(version=(1, 1))


class _Resolver(VersionedResolver):
    """The type of a plain scalar by the core schema."""

    processing_version = (1, 2)  # also after a `%YAML 1.1` line

    def resolve(self, kind: type[Node], value: str, implicit: Any) -> Tag:
        if kind is not ScalarNode or not implicit[0]:
            return super().resolve(kind, value, implicit)
        name = next((name for name, pattern in _CORE_SCHEMA.items() if pattern.fullmatch(value)), "str")
        return Tag(suffix=f"tag:yaml.org,2002:{name}")


class _Constructor(SafeConstructor):
    """Plain Python values; an error names its line."""

    def construct_mapping(self, node: Node, deep: bool = False) -> dict:
        # ruamel's own check skips mappings with a merge key, and its message quotes both values at any length
        seen = set()
        merged = getattr(node, "merge", None) or ()  # stands first if another mapping has merged this one already
        for key_node, _ in node.value[len(merged) :] if isinstance(node, MappingNode) else ():
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if not isinstance(key_node, ScalarNode):
                raise ConstructorError(None, None, "found unhashable key", key_node.start_mark)
            key = self.construct_object(key_node)
            if key in seen:
                raise ConstructorError(None, None, f"the key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_non_recursive_object(self, node: Node, tag: str | None = None) -> Any:
        # a scalar that Python cannot convert: an integer of more than 4300 digits, `!!bool maybe`
        try:
            return super().construct_non_recursive_object(node, tag)
        except (ValueError, LookupError) as error:
            raise ConstructorError(None, None, str(error), node.start_mark) from error


class _Representer(SafeRepresenter):
    """Numbers and strings that YAML 1.1 and 1.2 read alike: the hub and many tools read 1.1."""

    def represent_float(self, number: float) -> ScalarNode:
        node = super().represent_float(number)
        if "." not in node.value:
            node.value = node.value.replace("e", ".0e")  # 1e-07 is a string in YAML 1.1
        return node

    def represent_str(self, text: str) -> ScalarNode:
        node = super().represent_str(text)
        # the four characters are line breaks or a byte order mark in YAML 1.1; only double quotes escape them
        if _YAML_1_1.resolve(ScalarNode, text, (True, False)) != node.ctag or set(text) & set("\x85\u2028\u2029\ufeff"):
            node.style = '"'
        return node


for _kind in ("binary", "omap", "pairs", "set", "timestamp"):  # no part of the core schema, and no plain values
    _Constructor.add_constructor(f"tag:yaml.org,2002:{_kind}", SafeConstructor.construct_undefined)
_Representer.add_representer(float, _Representer.represent_float)
_Representer.add_representer(str, _Representer.represent_str)


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
    writer = YAML(typ="safe", pure=True)
    writer.Resolver, writer.Representer = _Resolver, _Representer
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    writer.default_flow_style = False
    writer.width = 110
    stream = io.StringIO()
    writer.dump(settings, stream)
    return stream.getvalue()


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
    reader = YAML(typ="safe", pure=True)
    reader.Resolver, reader.Constructor = _Resolver, _Constructor
    try:
        return reader.load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        line = f":{mark.line + 1}" if mark is not None else ""
        raise UserError(f"{source}{line}: is not valid YAML: {error.problem}") from None
    except (YAMLError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{source}: is not valid YAML: {reason}") from None
