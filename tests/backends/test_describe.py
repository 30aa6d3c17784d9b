"""The words for what `auto` takes: each chip, no library, a broken one, SDPO_BACKEND."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch

from sdpo_kernels import backends
from sdpo_kernels.backends import native, native_library
from sdpo_kernels.backends.describe import describe_auto
from tests.backends.test_native import CHIPS, NATIVE, chip  # noqa: F401

WORDS = ("AVX-512-BF16", "AVX-512", "AVX2", "base instructions")


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv("SDPO_BACKEND", raising=False)


def on_cpu(dtype: torch.dtype = torch.float32) -> str:
    return describe_auto(torch.device("cpu"), dtype)


@pytest.mark.skipif(NATIVE.unavailable_reason is not None, reason=str(NATIVE.unavailable_reason))
def test_the_chip_is_named(chip):  # noqa: F811
    for dtype in (torch.float32, torch.bfloat16):
        assert on_cpu(dtype) == f"native, {dict(zip(CHIPS, WORDS, strict=True))[chip]}"


def test_without_a_library_the_command_that_builds_it_is_named(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(native_library, "LIBRARY", tmp_path / "_cpu.so")
    monkeypatch.setitem(backends.BACKENDS, "native", native.NativeBackend())
    assert on_cpu() == (
        f"eager; native skipped: no library was built ({tmp_path}/_cpu.so does not exist); with a C++ compiler "
        f"installed, run: cd {native_library.SOURCES.parent} && python setup.py build_ext --inplace"
    )
    assert caplog.text == ""  # only a call that falls back warns


def test_a_library_that_cannot_be_loaded_is_no_fallback(monkeypatch, tmp_path):
    (tmp_path / "_cpu.so").write_bytes(b"")
    monkeypatch.setattr(native_library, "LIBRARY", tmp_path / "_cpu.so")
    monkeypatch.setitem(backends.BACKENDS, "native", native.NativeBackend())
    assert on_cpu().startswith(f"none: native: {tmp_path}/_cpu.so is truncated")


def test_the_variable_and_other_devices(monkeypatch):
    assert describe_auto(torch.device("cuda"), torch.float32) == f"triton {version('triton')}"
    monkeypatch.setenv("SDPO_BACKEND", "eager")
    assert on_cpu() == "eager"
    monkeypatch.setenv("SDPO_BACKEND", "triton")
    assert on_cpu() == "none: 'triton' cannot serve this call: it runs on CUDA, not on cpu"
