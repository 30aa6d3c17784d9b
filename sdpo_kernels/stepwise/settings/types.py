"""The building blocks of a run's settings: the base class of every section and the types of values."""

from __future__ import annotations

import os
import re
from datetime import date, datetime
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from sdpo_kernels.stepwise.settings.mistakes import show

DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")  # of data files, in upper or lower case
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(?::(?P<split>[\w.+\[\]%:-]+))?")


def _no_bool(value: Any) -> Any:
    """Refuses true and false, which Python counts among the integers."""
    if isinstance(value, bool):
        raise ValueError(f"was {show(value)}, must be a number")
    return value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_time(value: Any) -> Any:
    """A date, or a date and time, in ISO form."""
    if isinstance(value, date):  # a datetime too
        value = value.isoformat()
    try:
        return datetime.fromisoformat(value).isoformat()
    except (TypeError, ValueError):
        text = f"was {show(value)}, must be a date such as 2026-11-28, or a date and time such as 2026-11-28T10:00:00"
        raise ValueError(text) from None


Text = Annotated[str, Field(min_length=1)]
Integer = Annotated[int, BeforeValidator(_no_bool)]
Number = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_no_bool)]
Count = Annotated[Integer, Field(ge=1)]
Positive = Annotated[Number, Field(gt=0)]
Time = Annotated[str, BeforeValidator(_as_time)]
Sources = Annotated[tuple[Text, ...], Field(min_length=1), BeforeValidator(_as_list)]  # files or Hub datasets


class Section(BaseModel):
    """Base class of all sections of run.yaml: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def data_suffix(path: str) -> str | None:
    """The one of DATA_SUFFIXES that `path` ends in, or None."""
    return next((suffix for suffix in DATA_SUFFIXES if path.lower().endswith(suffix)), None)


def is_json_source(source: str) -> bool:
    """Whether `source` is a file of JSON, whose nulls somebody may have written."""
    return is_file_source(source) and data_suffix(source) not in (None, ".parquet")


def is_file_source(source: str) -> bool:
    """Whether `source` means a local file rather than a Hub dataset ('org/name' or 'org/name:split')."""
    path = os.path.expanduser(source)
    if os.path.exists(path) or data_suffix(path) or not _HUB_NAME.fullmatch(source):
        return True

    # 'data/x.jsnol' next to an existing folder data/ is a mistyped file, not a Hub name
    return os.path.isdir(os.path.dirname(path))
