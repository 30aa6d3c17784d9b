"""What the sections of a run's settings are built from: the strict base of each and the types of their values."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from sdpo_kernels.stepwise.setting_errors import show


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"was {show(value)}, must be a number")
    return value


Text = Annotated[str, Field(min_length=1)]
Integer = Annotated[int, BeforeValidator(_no_bool)]
Number = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_no_bool)]


class Section(BaseModel):
    """A section of run.yaml: an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
