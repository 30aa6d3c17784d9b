"""The library that nvcc built, inspected without a GPU: symbols, registers, stack, instructions, and that it loads."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sdpo_kernels.backends import native_library

LIBRARY = native_library.CUDA_LIBRARY
SOURCES = native_library.SOURCES / "cuda"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100", "sm_120")

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, at installation and here"),
    pytest.mark.xdist_group("cuda library"),
]


def cuobjdump(*arguments: str) -> str:
    """The output of cuobjdump, which Triton ships, for the library; kernels by their C++ names."""
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    said = subprocess.run([str(tool), *arguments, str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    return subprocess.run(["c++filt"], input=said, capture_output=True, text=True, check=True).stdout


def kernels_of(source: Path) -> list[str]:
    return re.findall(r"(\w+_kernel)\((?![^;{]*;)", source.read_text())


@functools.cache
def usage() -> dict[tuple[str, str], tuple[int, int]]:
    """(architecture, kernel) → the maximum registers and stack of its instances."""
    found: dict[tuple[str, str], tuple[int, int]] = {}
    architecture = kernel = ""
    for line in cuobjdump("-res-usage").splitlines():
        if match := re.match(r"arch = (\S+)", line):
            architecture = match[1]
        elif match := re.search(r"Function .*::(\w+_kernel)", line):
            kernel = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+)", line):
            before = found.get((architecture, kernel), (0, 0))
            found[architecture, kernel] = (max(before[0], int(match[1])), max(before[1], int(match[2])))
    return found


def test_the_library_was_built_from_these_sources():
    assert native_library.is_whole(LIBRARY)
    assert native_library.source_digest(native_library.SOURCES, cuda=True).encode() in LIBRARY.read_bytes()


def test_it_uses_only_the_stable_abi():
    for library in (LIBRARY, native_library.LIBRARY):
        symbols = subprocess.run(
            ["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True
        )
        assert not re.findall(r"\b_ZNK?(?:2at|3c10|5torch)\w*", symbols.stdout)
        assert not re.findall(r"\bU (_?Py\w*)", symbols.stdout)
        assert "torch_call_dispatcher" in symbols.stdout or library != LIBRARY


def test_the_host_code_compiles_without_what_came_after_torch_2_10(tmp_path):
    """`make old-torch` compiles all of it against the headers of 2.10."""
    source = tmp_path / "host.cpp"
    newer = "STABLE_TORCH_ERROR_CODE_CHECK"
    source.write_text(
        f"#include <torch/csrc/stable/ops.h>\n#undef {newer}\n#include <{native_library.SOURCES}/cuda/host.cpp>\n"
    )
    torch_include = Path(torch.__file__).parent / "include"
    definitions = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-isystem{torch_include}"]
    command = ["g++", "-std=c++20", "-fsyntax-only", *definitions, str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_architecture_has_every_kernel_and_later_ones_have_ptx():
    kernels = {kernel for source in SOURCES.glob("*.cu") for kernel in kernels_of(source)}
    assert len(kernels) > 10
    assert set(usage()) == {(architecture, kernel) for architecture in ARCHITECTURES for kernel in kernels}
    assert "sm_120.ptx" in cuobjdump("-lptx")


@pytest.mark.parametrize("source", sorted(SOURCES.glob("*.cu")), ids=lambda path: path.name)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_spills_or_exceeds_its_files_register_budget(architecture, source):
    (budget,) = re.findall(r"// Register budget: (\d+)", source.read_text())
    for kernel in kernels_of(source):
        registers, stack = usage()[architecture, kernel]
        assert stack == 0, kernel
        assert registers <= int(budget), kernel


@functools.cache
def instructions(architecture: str) -> dict[str, str]:
    """Kernel, as `name<types>`, → its machine code."""
    found = {}
    for part in cuobjdump("-sass", "-arch", architecture).split("Function : ")[1:]:
        name, code = part.split("\n", 1)
        found[name.split("(anonymous namespace)::")[1].split("(")[0]] = code
    return found


@pytest.mark.parametrize(
    ("kernel", "store"),
    [
        ("exp_rows_kernel<false, unsigned short>", True),
        ("exp_rows_kernel<true, float>", True),
        ("logits_forward_kernel<unsigned short>", False),
        ("logits_backward_kernel<float>", True),
    ],
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_read_and_s_is_written_in_128_bits(architecture, kernel, store):
    code = instructions(architecture)[kernel]
    assert re.search(r"LDG\.E\.(?:\w+\.)*128", code)
    assert not store or re.search(r"STG\.E\.(?:\w+\.)*128", code)


STUB = """
extern "C" int aoti_torch_get_current_cuda_stream(int, void** stream) { *stream = nullptr; return 0; }
"""  # provided by libtorch_cuda, if there is one


def test_it_loads_next_to_the_cpu_library(tmp_path):
    """In a process with a stub for the one symbol that a CPU torch lacks."""
    (tmp_path / "stub.cpp").write_text(STUB)
    stub = tmp_path / "stub.so"
    subprocess.run(["g++", "-shared", "-fPIC", str(tmp_path / "stub.cpp"), "-o", str(stub)], check=True)
    code = f"""if True:
        import torch, sdpo_kernels.backends
        torch.ops.load_library({str(LIBRARY)!r})
        print(torch.ops.sdpo_native.cuda_built_from())
        for name in ("linear_forward", "linear_backward", "logits_forward", "logits_backward", "pair_epilogue"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key("sdpo_native::" + name, "CUDA"), name
    """
    environment = os.environ | {"LD_PRELOAD": str(stub)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == native_library.source_digest(native_library.SOURCES, cuda=True)


def test_on_a_torch_without_cuda_it_is_not_loaded():
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    assert native_library.load_cuda() == "this torch is built without CUDA"
