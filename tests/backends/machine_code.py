"""What the compilers made of a kernel, read from its machine code with the cuobjdump that Triton carries."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", re.MULTILINE)
FAR = 10**9


def inspected(kernel: Any, tmp_path: Path, option: str) -> str:
    """What cuobjdump says of the kernel's machine code."""
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    return subprocess.run([str(CUOBJDUMP), option, str(binary)], capture_output=True, text=True, check=True).stdout


def stack_bytes(kernel: Any, tmp_path: Path) -> int:
    """Bytes of stack per thread: spilled registers show up here."""
    (found,) = re.findall(r"STACK:(\d+)", inspected(kernel, tmp_path, "-res-usage"))
    return int(found)


def is_in_registers(kernel: Any, tmp_path: Path, reads: int = 0) -> bool:
    """No spilled register: at most `reads` instructions read from the stack.

    On sm_120, Triton 3.6 reserves 8 bytes of stack and writes to them, and nothing reads them.
    """
    if stack_bytes(kernel, tmp_path) == 0:
        return True
    return len(re.findall(r"\bLDL", inspected(kernel, tmp_path, "-sass"))) <= reads


def epilogue_length(kernel: Any, tmp_path: Path, through: str = "") -> int:
    """Instructions of a thread from the last of Hopper's matrix instructions (GMMA) to the end, on the shortest path.

    That is a tile's without a target or padding, where the branches around their masks are taken. With `through`, an
    opcode, the shortest path that has it.
    """
    found = INSTRUCTION.findall(inspected(kernel, tmp_path, "-sass"))
    places = {int(address, 16): place for place, (address, _) in enumerate(found)}
    code = [text for _, text in found]
    first = 1 + max(place for place, text in enumerate(code) if "GMMA" in text)

    # from the end backwards: the shortest path from here to the end, and the shortest one through the opcode
    any_left, right_left = {len(code): FAR}, {len(code): FAR}
    for place in range(len(code) - 1, first - 1, -1):
        text, is_right = code[place], through in code[place]
        after = [place + 1]
        jump = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if jump is not None:  # only a jump forward shortens a path
            to = places.get(int(jump[1], 16), -1)
            after = [*(after if text.startswith("@") else []), *([to] if to > place else [])]
        ends = text.startswith("EXIT")
        shortest = 0 if ends else min((any_left[to] for to in after), default=FAR)
        shortest_right = FAR if ends else min((right_left[to] for to in after), default=FAR)
        any_left[place] = min(FAR, 1 + shortest)
        right_left[place] = min(FAR, 1 + (shortest if is_right else shortest_right))
    return right_left[first]
