"""Reads rows from data sources: .jsonl, .jsonl.gz, .json and .parquet files, and datasets of the Hugging Face Hub.

`read_rows(source, columns)` yields one `Row` per record, with its location ('data.jsonl:17'). `pairs.py` and
`prompts.py` interpret the rows. A record that cannot be decoded is yielded with its `problem`; a source that cannot be
read at all raises UserError.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.settings.types import DATA_SUFFIXES, data_suffix, is_file_source


class Row(NamedTuple):
    """One record: its location, and either its values or what is wrong with it."""

    where: str
    values: dict[str, Any]
    problem: str | None = None
    others: tuple[str, ...] = ()  # columns of the source that were not loaded


def read_rows(source: str, columns: list[str] | None) -> Iterator[Row]:
    """The rows of one source in order.

    Args:
        source: A local file, or a Hub dataset as 'org/name' or 'org/name:split'.
        columns: The columns to load from Parquet files and Hub datasets; None loads all. JSON is always read whole.
    """
    if not is_file_source(source):
        yield from _hub_rows(source, columns)
        return

    path = os.path.expanduser(source)
    suffix = data_suffix(path)
    if not os.path.exists(path):
        raise UserError(f"{source}: no such file")
    if os.path.isdir(path):
        raise UserError(f"{source}: is a folder, must be a file ({', '.join(DATA_SUFFIXES)})")
    if suffix is None:
        raise UserError(f"{source}: unknown file type, must end in {', '.join(DATA_SUFFIXES)}")

    try:
        yield from _READERS[suffix](Path(path), source, columns)
    except OSError as error:
        raise UserError(f"{source}: cannot be read: {error.strerror or error}") from error


def _json_lines(path: Path, source: str, columns: list[str] | None) -> Iterator[Row]:
    with path.open("rb") as file:
        yield from _parse_lines(file, source)


def _zipped_json_lines(path: Path, source: str, columns: list[str] | None) -> Iterator[Row]:
    try:
        with gzip.open(path, "rb") as file:
            yield from _parse_lines(file, source)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{source}: is not a complete gzip file: {error}") from error


def _parse_lines(file: Iterable[bytes], source: str) -> Iterator[Row]:
    """JSON lines with their line numbers; blank lines and a byte order mark are skipped."""
    for number, line in enumerate(file, start=1):
        where = f"{source}:{number}"

        # only the first line can start with a byte order mark
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            yield Row(where, {}, f"is not UTF-8 (byte {error.start} of the line is 0x{line[error.start]:02x})")
            continue

        if text.strip():
            yield _parse_row(where, text.rstrip("\r\n"))


def _parse_row(where: str, text: str) -> Row:
    try:
        return _row(where, json.loads(text))
    except json.JSONDecodeError as error:
        return Row(where, {}, f"broken JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # an integer with thousands of digits, or nesting that is too deep
        return Row(where, {}, f"broken JSON: {error}")


def _json_list(path: Path, source: str, columns: list[str] | None) -> Iterator[Row]:
    try:
        records = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        hint = " (if it has one object per line, name it .jsonl)" if error.msg == "Extra data" else ""
        raise UserError(f"{source}:{error.lineno}: broken JSON: {error.msg}{hint}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: broken JSON: {error}") from None

    if not isinstance(records, list):
        raise UserError(f"{source}: contains {_kind(records)}, must contain a list of objects")

    # the parser keeps no line numbers, so records are counted
    for number, record in enumerate(records, start=1):
        yield _row(f"{source}:row {number}", record)


def _row(where: str, record: Any) -> Row:
    if not isinstance(record, dict):
        return Row(where, {}, f"is {_kind(record)}, must be an object with chosen and rejected")
    return Row(where, record)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _parquet(path: Path, source: str, columns: list[str] | None) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0  # counts over all batches
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            present = names if columns is None else [name for name in columns if name in names]
            others = tuple(name for name in names if name not in present)

            # a batch at a time, so that a large file is never in memory as a whole
            for batch in file.iter_batches(columns=present):
                decoders = [_json_decoder(kind) for kind in batch.schema.types]
                for index in range(batch.num_rows):
                    number += 1
                    yield _record_of(batch, index, f"{source}:row {number}", decoders)._replace(others=others)

    except pa.ArrowException as error:
        raise UserError(f"{source}: is not a readable Parquet file: {str(error).splitlines()[0]}") from error


def _record_of(batch: Any, index: int, where: str, decoders: Sequence[Callable[[Any], Any]]) -> Row:
    names = batch.schema.names
    try:
        return Row(where, {name: decoders[at](batch.column(at)[index].as_py()) for at, name in enumerate(names)})
    except UnicodeDecodeError as error:
        return Row(where, {}, f"is not UTF-8 (byte {error.start} of a string)")
    except ValueError as error:
        return Row(where, {}, f"broken JSON: {error}")


def _json_decoder(kind: Any) -> Callable[[Any], Any]:
    """What turns a Parquet value into the Python value that was stored.

    `datasets` 5 stores values of mixed structure, such as the arguments of tool calls, as JSON text (`arrow.json`).
    """
    import pyarrow as pa

    if getattr(kind, "extension_name", "") == "arrow.json":
        return lambda value: None if value is None else json.loads(value)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        decode = _json_decoder(kind.value_type)
        return lambda values: None if values is None else [decode(value) for value in values]
    if pa.types.is_struct(kind):
        fields = {field.name: _json_decoder(field.type) for field in kind}
        return lambda value: None if value is None else {name: fields[name](below) for name, below in value.items()}
    if pa.types.is_map(kind):  # comes as a list of (key, value)
        decode = _json_decoder(kind.item_type)
        return lambda pairs: None if pairs is None else {key: decode(value) for key, value in pairs}
    return lambda value: value


def _hub_rows(source: str, columns: list[str] | None) -> Iterator[Row]:
    import datasets

    name, _, split = source.partition(":")
    try:
        dataset = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # no network, no such dataset or split, a broken file: each has its own class
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{source}: no such file, and it cannot be loaded from the Hub: {type(error).__name__}: {reason}"
        ) from error

    # columns that nobody asked for may be images or audio, which are slow to decode
    names = dataset.column_names
    present = names if columns is None else [column for column in columns if column in names]
    others = tuple(name for name in names if name not in present)
    for number, record in enumerate(dataset.select_columns(present), start=1):
        yield Row(f"{source}:row {number}", record, others=others)


_READERS: dict[str, Callable[[Path, str, list[str] | None], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".jsonl.gz": _zipped_json_lines,
    ".json": _json_list,
    ".parquet": _parquet,
}
