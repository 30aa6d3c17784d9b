"""Durations, sizes and counts in human-readable form."""

from __future__ import annotations


def write_seconds(seconds: float) -> str:
    """A duration such as 4.2s, 3m05s or 2h07m."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def counted(number: int, what: str) -> str:
    """A count with its noun: '1 bad row', '1,200 bad rows'."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def write_bytes(size: float) -> str:
    """A memory size in MiB or GiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def write_part(count: int, total: int) -> str:
    """A part of a total, such as 320 of 2,000; the total alone if it is all of it."""
    return f"{total:,}" if count == total else f"{count:,} of {total:,}"
