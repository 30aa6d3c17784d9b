"""Names the sources that a compiled library was built from. It imports nothing of torch: setup.py uses it, too."""

from __future__ import annotations

import hashlib
from pathlib import Path

SUFFIXES = (".cpp", ".h", ".inl", ".cu", ".cuh")


def source_digest(sources: Path, cuda: bool) -> str:
    """A digest of the files under `sources` that go into a library."""
    digest = hashlib.sha256()
    other = "cpu" if cuda else "cuda"
    for path in sorted(path for path in sources.rglob("*") if path.suffix in SUFFIXES):
        name = path.relative_to(sources)
        if name.parts[0] != other:
            digest.update(name.as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
