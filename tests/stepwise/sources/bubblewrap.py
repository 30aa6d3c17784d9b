"""A mark for tests that run programs in the sandbox: skipped, with the reason, where bubblewrap cannot run."""

import pytest

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.sources.sandbox import Limits, run_limited


def _unavailable_reason() -> str:
    try:
        run_limited(["true"], "", Limits())
    except UserError as error:
        return str(error)
    return ""


_reason = _unavailable_reason()
needs_bubblewrap = pytest.mark.skipif(_reason != "", reason=_reason)
