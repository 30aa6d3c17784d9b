"""Compile the persistent kernel for Hopper, without a GPU: `python -m benchmarks.compile_persistent FOLDER`.

Needs the extra `quack`. For every way to call the kernel (`sums`, `s`, `sums+s`) it writes the machine code, which
tests/backends/test_persistent.py reads, and with --link a library for machines that have neither QuACK nor a compiler,
to be called through tvm-ffi (`packed_persistent.py`). All else that a library needs is in it, or of the driver.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

WAYS = {"sums": (True, False), "s": (False, True), "sums+s": (True, True)}  # has_sums, stores
ENTRY = "func"

# what a compiled kernel calls when the driver refuses it; the one that CuTe brings has 43 MB of other things beside it
RAISE = r"""
#include <stdint.h>
#include <stdio.h>
typedef void (*raise_type)(const char *kind, const char **parts, int32_t n_parts);
void CuteDSLRT_TVMFFISetRaisedCudaError(raise_type raise, int32_t code) {
    char text[32];
    const char *parts[1] = {text};
    snprintf(text, sizeof text, "CUDA error %d", code);
    raise("RuntimeError", parts, 1);
}
"""


def main(arguments: list[str] | None = None) -> int:
    """Compile all ways."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_persistent")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--link", action="store_true", help="also libraries; needs g++ and CUDA's static runtime")
    options = parser.parse_args(arguments)

    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as dumped:
        # read when CuTe is imported: the chip, and that machine code is kept
        os.environ |= {"CUTE_DSL_ARCH": "sm_90a", "CUTE_DSL_KEEP": "cubin", "CUTE_DSL_DUMP_DIR": dumped}
        os.environ |= {"QUACK_ARCH": "90", "QUACK_CACHE_ENABLED": "0"}
        from sdpo_kernels.backends.triton.persistent_kernel import kernel

        for name, way in WAYS.items():
            compiled = kernel(*way)
            (options.folder / f"{name}.cubin").write_bytes(compiled.__cubin__)
            if options.link:
                link(compiled, options.folder / f"{name}.so")
    return 0


def link(compiled: Any, library: Path) -> None:
    """One library of a compiled kernel."""
    parts, source = library.with_suffix(".o"), library.with_suffix(".c")
    compiled.export_to_c(object_file_path=str(parts), function_name=ENTRY)
    source.write_text(RAISE)
    command = ["g++", "-shared", "-fPIC", "-o", str(library), str(parts), "-xc", str(source), "-xnone"]
    command += ["-Wl,--whole-archive", str(cutes_archive()), "-Wl,--no-whole-archive"]
    subprocess.run([*command, "-L/usr/local/cuda/lib64", "-lcudart_static", "-ldl", "-lpthread", "-lrt"], check=True)
    parts.unlink()
    source.unlink()


def cutes_archive() -> Path:
    """What CuTe brings for linking; of several versions of CUDA the last."""
    package = importlib.util.find_spec("nvidia_cutlass_dsl")
    assert package is not None
    folders = [Path(folder) for folder in package.submodule_search_locations or ()]
    return max(path for folder in folders for path in folder.glob("cu*/lib/libcuda_dialect_runtime_static.a"))


if __name__ == "__main__":
    raise SystemExit(main())
