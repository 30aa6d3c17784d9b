"""Triton's interpreter as the tests use it, in a process with TRITON_INTERPRET=1; importing this file sets it up.

It rounds to bfloat16 as GPUs do, looks at assertions, and takes over Triton's language once instead of at every call.
"""

from __future__ import annotations

from functools import cache
from types import FunctionType
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_CONVERT = interpreter._convert_float
_TAKE_OVER = interpreter._patch_lang
_numpy_scalar = cache(interpreter._get_np_dtype)
_taken_over: set[frozenset[int]] = set()


def rounded(values: np.ndarray, source: Any, to: Any, mode: Any) -> np.ndarray:
    """In place of the interpreter's own cast, which truncates: bfloat16's bits, rounded to nearest."""
    if (source, to) != (tl.float32, tl.bfloat16):
        return _CONVERT(values, source, to, mode)
    bits = torch.from_numpy(np.array(values, np.float32)).to(torch.bfloat16).view(torch.uint16).numpy()
    return bits.reshape(values.shape)


def numpy_dtype(of: Any) -> Any:
    """In place of the interpreter's own, which makes a table of all dtypes at each call."""
    element = of.scalar
    return np.dtype(np.uint64) if isinstance(element, tl.pointer_type) else _numpy_scalar(element)


def product(builder: Any, a: Any, b: Any, onto: Any, precision: Any, imprecise: Any) -> Any:
    """In place of the interpreter's own: there the bits of a row depend on its place in the tile, as BLAS's do."""
    assert tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar)  # its bits, which are no numbers
    found = np.einsum("mk,kn->mn", a.data, b.data, dtype=onto.data.dtype)
    return interpreter.TensorHandle(found + onto.data, onto.dtype.scalar)


def asserted(builder: Any, condition: Any, message: str) -> None:
    """In place of the interpreter's own, for which every condition holds: it asserts the object that has the value."""
    assert bool(np.all(condition.data)), message


def taken_over(function: FunctionType) -> Any:
    """In place of the interpreter's own, which replaces hundreds of functions at each call of a device function.

    Here they stay replaced: nothing is compiled in this process. What is returned has nothing to restore.
    """
    modules = frozenset(id(value) for value in function.__globals__.values() if value in (tl, tl.core))
    if modules not in _taken_over:
        _taken_over.add(modules)
        _TAKE_OVER(function)
    return interpreter._LangPatchScope()


interpreter._get_np_dtype = numpy_dtype
interpreter._convert_float = rounded
interpreter._patch_lang = taken_over
interpreter.InterpreterBuilder.create_dot = product
interpreter.InterpreterBuilder.create_assert = asserted
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=True)  # assertions are looked at
