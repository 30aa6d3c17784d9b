"""`sdpo info`: the versions, libraries and devices to paste into a bug report. Needs none of the extras, nor torch."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sdpo_kernels.version import __version__

PACKAGES = (
    "torch", "triton", "numpy", "transformers", "accelerate", "peft", "bitsandbytes", "datasets", "safetensors", "trl",
    "liger-kernel",
)  # fmt: skip


def info_text() -> str:
    """Lines of a name and a value."""
    lines = [
        ("sdpo_kernels", f"{__version__} in {Path(__file__).parent}"),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        *((name, _version(name)) for name in PACKAGES),
    ]
    lines += [(name, value) for name, value in sorted(os.environ.items()) if name.startswith("SDPO_")]
    try:
        lines += list(_of_torch())
    except (ImportError, OSError) as error:
        lines.append(("torch", f"cannot be imported: {error}"))
    return "\n".join(f"{name:<16} {value}" for name, value in lines)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _of_torch() -> Iterator[tuple[str, str]]:
    """What only torch can tell: the libraries, the chip, the devices and what `auto` takes."""
    import torch

    from sdpo_kernels.backends.describe import describe_auto

    yield "CPU library", _cpu_library()
    yield "CUDA library", _cuda_library()
    yield "CPU", f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads for torch"
    yield "CUDA", f"{torch.version.cuda}, {torch.cuda.device_count()} devices" if torch.version.cuda else "not in torch"

    devices = ["cpu"]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
        devices.append(f"cuda:{index}")

    for device in devices:
        for dtype in (torch.float32, torch.bfloat16):
            name = f"auto {str(dtype).removeprefix('torch.')}"
            yield name, f"on {device}: {describe_auto(torch.device(device), dtype)}"
    if len(devices) == 1:
        yield "auto", "on cuda: no device here"


def _cpu_library() -> str:
    """Whether it loads, its chip, and what it was built from."""
    import torch

    from sdpo_kernels.backends import BACKENDS, native_library
    from sdpo_kernels.backends.describe import chip
    from sdpo_kernels.backends.native import NativeBackend

    native = BACKENDS["native"]
    assert isinstance(native, NativeBackend)
    if reason := native.load_error or native.unavailable_reason:
        return reason
    digest = torch.ops.sdpo_native.built_from()
    return f"{native_library.LIBRARY} loads: {chip()}, built from sources {digest}"


def _cuda_library() -> str:
    import torch

    from sdpo_kernels.backends import native_library

    library = native_library.CUDA_LIBRARY
    try:
        reason = native_library.load_cuda()
    except RuntimeError as error:
        return str(error)
    if reason is not None:
        return f"{library} is there, not loaded: {reason}" if library.exists() else reason
    return f"{library} loads, built from sources {torch.ops.sdpo_native.cuda_built_from()}"


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
