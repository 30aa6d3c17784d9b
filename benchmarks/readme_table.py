"""The table on README's first screen, from the same JSON as the page of results; `page.py` puts it there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Report = dict[str, Any]
BEGIN, END = "<!-- figures: made by python -m benchmarks.page -->", "<!-- end of figures -->"
HEADINGS = ["times, memory, errors: less is better", "ours", "TRL", "Liger", "naive PyTorch"]
HEAD = ("ours", "trl_fused_scored", "liger_dpo", "naive")  # cases of `benchmarks.head` in this order
TOKENS = ("ours", "trl", "liger", "naive bf16")  # cases of `benchmarks.mismatch`
CHIPS = {"avx512bf16": "AVX-512-BF16", "avx512bf16, AMX": "AMX", "avx512": "AVX-512", "avx2": "AVX2"}


def put(readme: str, reports: dict[str, Report]) -> str:
    """README's text with the table of these reports."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{text(reports)}\n\n{END}{after}"


def text(reports: dict[str, Report]) -> str:
    """The table, and the versions below it."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *rows(reports)]
    versions = next((r["versions"] for r in reports.values() if r["benchmark"] == "mismatch"), {})
    named = ", ".join(f"{name} {versions[key]}" for name, key in RIVALS.items() if key in versions)
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{table}\n\n{named}. {NOTE}"


NOTE = """Bare GEMMs: torch's four matrix products of the scored rows and nothing else, so
below 1 our products are the faster ones. TRL is given the scored rows alone, as it takes them on a GPU; on a CPU it
multiplies all rows, as Liger and naive PyTorch do, and is slower. The row of whole steps is TRL as it runs. Machines,
shapes, commits, spreads: [benchmarks](docs/benchmarks.md). The words: [glossary](docs/glossary.md)."""
NAMES = {"smollm2": "SmolLM2", "gemma3": "Gemma 3"}
RIVALS = {"TRL": "trl", "Liger": "liger-kernel", "torch": "torch"}


def rows(reports: dict[str, Report]) -> Iterable[list[str]]:
    """A row for each figure that was measured."""
    yield from head_rows([report for report in reports.values() if report["benchmark"] == "head"])

    for report in reports.values():
        if report["benchmark"] == "mismatch":
            yield from token_rows(report)

    steps = [
        result for name, report in reports.items() if report["benchmark"] == "step" for result in report["results"]
    ]
    ratios = [result["trl_over_ours"] for result in steps if "trl_over_ours" in result]
    if ratios:
        yield [
            "whole training step of small models, times ours",
            "1",
            f"{min(ratios):.1f} … {max(ratios):.1f}",
            "–",
            "–",
        ]


def head_rows(reports: list[Report]) -> Iterable[list[str]]:
    """The step at the head wherever rivals were measured, bf16 first; its memory once."""
    shown = 0
    for report in sorted(reports, key=lambda report: report["shape"]["dtype"]):
        of = {result["case"]: result for result in report["results"] if "skipped" not in result}
        if len(of.keys() & set(HEAD)) < len(HEAD):
            continue
        machine = report["machine"]
        chip = f"CPU with {CHIPS[machine['instructions']]}" if machine["device"] == "cpu" else machine["device"]
        kind = f"({report['shape']['dtype']}, {chip})"
        yield cells(f"time of a DPO step at the head ÷ bare GEMMs {kind}", HEAD, of, ratio)
        if not shown:
            yield cells(f"its extra memory, gradients included, MiB {kind}", HEAD, of, memory)
        shown += 1


def token_rows(report: Report) -> Iterable[list[str]]:
    """A token's error on a real model's rows, and whether a batch changes its bits."""
    ran = [result for result in report["results"] if "skipped" not in result]
    for real in dict.fromkeys(result["real"] for result in ran if "real" in result):
        of = {result["case"]: result for result in ran if result.get("real") == real}
        yield cells(
            f"largest error of a token's log-prob (nat; bf16, {NAMES.get(real, real)})",
            TOKENS,
            of,
            lambda r: f"{r['nats']:.0e}",
        )

    kept = {case: [result["same_bits"] for result in ran if result["case"] == case] for case in TOKENS}
    held = {case: all({"order", "batch"} <= set(bits) for bits in found) for case, found in kept.items() if found}
    yield cells(
        "same bits in another order and in half the batch", TOKENS, held, lambda value: "yes" if value else "no"
    )


def cells(title: str, cases: tuple[str, ...], of: dict[str, Any], shown: Callable[[Any], str]) -> list[str]:
    """A row: the title, then each case's cell; a dash for what was not measured."""
    skipped = {case for case, found in of.items() if isinstance(found, dict) and "skipped" in found}
    return [title, *(shown(of[case]) if case in of and case not in skipped else "–" for case in cases)]


def ratio(result: Report) -> str:
    """Times the floor."""
    return f"{result['ratio_to_floor']:.2f}"


def memory(result: Report) -> str:
    """Extra memory in MiB."""
    return f"{result['peak_extra_bytes'] / 2**20:,.0f}"
