"""The GPUs that a plan is for, as the command line names them: --gpus 8 --memory 80GiB."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sdpo_kernels.stepwise.common.errors import UserError

_UNITS = {"MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class Target:
    """Some equal GPUs."""

    gpus: int = 1
    memory: int | None = None  # of one, in bytes

    @classmethod
    def of(cls, gpus: int | None, memory: str | None) -> Target | None:
        """The target of the options, None without any; UserError, which names the option, if one is wrong."""
        if gpus is None and memory is None:
            return None
        if gpus is not None and gpus < 1:
            raise UserError(f"--gpus: was {gpus}, must be a number of GPUs, at least 1")
        return cls(gpus or 1, None if memory is None else read_size(memory, "--memory"))


def read_size(text: str, name: str) -> int:
    """Bytes of a size such as 80GiB or 24 GB; UserError, which names the argument `name`, for anything else."""
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
    size = 0 if found is None else round(float(found[1]) * units.get(found[2].lower(), 0))
    if size <= 0:
        raise UserError(f"{name}: was {text!r}, must be a number above 0 with a unit ({', '.join(_UNITS)}), e.g. 80GiB")
    return size
