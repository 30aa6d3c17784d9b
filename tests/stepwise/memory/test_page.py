"""docs/memory.md: its plans are what the command prints, its table is that of the result."""

import json
from pathlib import Path

import pytest

from benchmarks.memory import CASES, RESULTS, markdown
from benchmarks.memory_plans import large_runs, printed

PAGE = (Path(__file__).resolve().parents[3] / "docs/memory.md").read_text(encoding="utf-8")
SLOW = {"Llama 3 70B, LoRA on a bfloat16 base, FSDP2 on 8 GPUs of 80 GiB"}
SLOW |= {"Llama 3 70B, all weights, FSDP2 on 8 GPUs of 80 GiB"}  # LoRA is one of the changes it lists


@pytest.mark.parametrize(
    "title", [pytest.param(title, marks=[pytest.mark.slow] * (title in SLOW)) for title in large_runs()]
)
def test_the_plans_are_what_the_command_prints(title):
    assert f"### {title}\n\n```\n{printed(*large_runs()[title])}\n```\n" in PAGE


def test_the_table_is_that_of_the_result_and_every_plan_is_close():
    report = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert markdown(report) in PAGE
    assert [result["case"] for result in report["results"]] == list(CASES)
    measured = [result for result in report["results"] if "skipped" not in result]
    assert len(measured) >= len(CASES) - 1
    for result in measured:
        assert result["plan"] == pytest.approx(result["resident"], rel=0.15), result["case"]
        if result["tensors"] is not None:
            assert result["plan_tensors"] == pytest.approx(result["tensors"], rel=0.15), result["case"]
