"""The persistent kernel without a GPU: when it is used, what goes to it, its machine code, what it accepts."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from sdpo_kernels.backends.triton import persistent
from sdpo_kernels.backends.triton.tiles import PERSISTENT_COLUMNS, PERSISTENT_ROWS
from tests.backends.in_interpreter import check_in_interpreter
from tests.backends.machine_code import INSTRUCTION, epilogue_length, inspected, stack_bytes

ROOT = Path(__file__).resolve().parents[2]
CUDA_RUNTIME = Path("/usr/local/cuda/lib64/libcudart_static.a")
WAYS = ("sums", "s", "sums+s")
ELEMENTS = PERSISTENT_ROWS * PERSISTENT_COLUMNS // 128  # of a thread
needs_quack = pytest.mark.skipif(importlib.util.find_spec("quack") is None, reason="quack-kernels is not installed")


# ---- when it is used ----


def test_it_is_off_unless_asked_for(monkeypatch):
    monkeypatch.delenv("SDPO_QUACK", raising=False)
    assert persistent.serves(None, None, None) is False


@pytest.mark.parametrize(
    ("device", "capability", "installed", "message"),
    [
        ("cpu", None, True, r"SDPO_QUACK: was 1, which needs a GPU of compute capability 9.0 \(Hopper\), not cpu"),
        ("cuda", (10, 0), True, r"capability 9.0 \(Hopper\), not compute capability 10.0"),
        ("cuda", (9, 0), False, r"which needs quack-kernels; run: pip install sdpo-kernels\[quack\]"),
    ],
)
def test_a_machine_that_cannot_run_it_is_an_error(monkeypatch, device, capability, installed, message):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(persistent, "is_installed", lambda: installed)
    with pytest.raises(ValueError, match=message):
        persistent.check_machine(torch.device(device))


def test_columns_in_whole_tiles():
    assert [persistent.whole_tiles(n) for n in (0, 191, 192, 128256, 151936)] == [0, 0, 192, 128256, 151872]


def test_in_the_interpreter():
    check_in_interpreter("persistent_interpreted.py")


# ---- its machine code ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What was compiled for Hopper, in a process of its own: CuTe reads the chip when it is imported."""
    folder = tmp_path_factory.mktemp("persistent")
    link = ["--link"] if CUDA_RUNTIME.is_file() else []
    command = [sys.executable, "-m", "benchmarks.compile_persistent", str(folder), *link]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def kernels(folder) -> dict[str, Any]:
    """Each kernel, as machine_code.py takes it."""
    return {name: SimpleNamespace(asm={"cubin": (folder / f"{name}.cubin").read_bytes()}) for name in WAYS}


def opcodes(kernel: Any, tmp_path: Path) -> list[str]:
    """Every instruction's name, without the predicate before it."""
    found = INSTRUCTION.findall(inspected(kernel, tmp_path, "-sass"))
    return [re.sub(r"^@!?U?P\w+\s+", "", text).split()[0] for _, text in found]


@needs_quack
@pytest.mark.parametrize("way", WAYS)
def test_its_machine_code(kernels, way, tmp_path):
    code = opcodes(kernels[way], tmp_path)
    counts = {name: sum(found.startswith(name) for found in code) for name in ("HGMMA", "MUFU.EX2", "F2FP.BF16")}
    assert counts["HGMMA"] > 0
    assert counts["MUFU.EX2"] == ELEMENTS

    # warps that load give registers to those that multiply; w's tiles go to both blocks of a cluster
    assert {"USETMAXREG.DEALLOC.CTAPOOL", "USETMAXREG.TRY_ALLOC.CTAPOOL", "UTMALDG.2D.MULTICAST"} <= set(code)
    # S leaves in bfloat16, two numbers an instruction, by the copy engine, if it is stored
    assert counts["F2FP.BF16"] == (ELEMENTS // 2 if "s" in way.split("+") else 0)
    assert any(found.startswith("UTMASTG") for found in code) is ("s" in way.split("+"))
    assert any(found.startswith("STG") for found in code) is ("sums" in way.split("+"))

    # the order of every sum is fixed, and no register goes through memory
    assert not [found for found in code if re.match(r"RED|ATOM|UTMARED|STL|LDL", found)]
    assert stack_bytes(kernels[way], tmp_path) == 0


# of a thread whose rows have no target in the tile: 4.9, 4.7, 6.0; one multiply-add, one exponential, one sum and half
# a conversion, and what the twelve pieces of a tile need besides
LENGTHS = {"sums": 5.0, "s": 5.0, "sums+s": 6.2}


@needs_quack
@pytest.mark.parametrize("way", WAYS)
def test_instructions_of_an_element_after_its_product(kernels, way, tmp_path):
    """Each takes 192 cycles of a tile, whose products at H = 4096 take 49,152, of the other four warps."""
    last = "STG" if way == "sums" else "UTMASTG"
    assert epilogue_length(kernels[way], tmp_path, last) <= LENGTHS[way] * ELEMENTS


# ---- what it is called with ----


@needs_quack
@pytest.mark.skipif(torch.cuda.is_available(), reason="the addresses are the CPU's")
@pytest.mark.parametrize("packed", [False, True], ids=["compiled", "packed"])
def test_it_accepts_what_it_is_called_with(packed, folder):
    """The kernel checks its arguments and then asks for a driver, of which there is none."""
    if packed and not CUDA_RUNTIME.is_file():
        pytest.skip("no CUDA runtime to link with")
    script = [sys.executable, "-m", "tests.backends.persistent_call", *([str(folder)] if packed else [])]
    environment = os.environ | {"CUTE_DSL_ARCH": "sm_90a", "QUACK_ARCH": "90", "QUACK_CACHE_ENABLED": "0"}
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
