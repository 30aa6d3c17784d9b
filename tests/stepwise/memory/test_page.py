"""docs/memory.md and memory_by_size.md: their plans are what the commands print, their tables those of the results."""

import json
from pathlib import Path

import pytest

from benchmarks import memory_sizes
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


def test_the_page_of_sizes_is_that_of_the_result():
    report = json.loads(memory_sizes.RESULTS.read_text(encoding="utf-8"))
    assert memory_sizes.PAGE.read_text(encoding="utf-8") == memory_sizes.page(report)
    assert [result["model"] for result in report["results"]] == list(memory_sizes.MODELS)
    assert all(result["ways"].keys() == memory_sizes.ways().keys() for result in report["results"])


@pytest.mark.parametrize(("model", "way"), [("SmolLM2 135M", "all weights"), ("Qwen2.5 0.5B", "QLoRA")])
def test_plans_by_size_are_what_the_planner_says(model, way):
    report = json.loads(memory_sizes.RESULTS.read_text(encoding="utf-8"))
    (result,) = [result for result in report["results"] if result["model"] == model]
    assert memory_sizes.planned(model, way) == result["ways"][way]


def test_the_smallest_gpu_leaves_room_for_cuda():
    assert memory_sizes.smallest(7 * 2**30) == "7.0 (8)"
    assert memory_sizes.smallest(7 * 2**30 + 1) == "7.0 (12)"
    assert memory_sizes.smallest(141 * 2**30) == "141.0 (–)"
