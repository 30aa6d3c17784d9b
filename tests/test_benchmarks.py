"""The benchmarks: every rival computes the same correct step, memory is measured right, commands write reports."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from benchmarks import accuracy, head, measure, mismatch, scaling, sharded, stages, vocab_parallel
from benchmarks.names import NAMES
from benchmarks.problem import (
    IGNORE_INDEX,
    CannotRun,
    Problem,
    has_real_masks,
    real_runs,
    scored_positions,
    true_logps,
    true_step,
)
from benchmarks.real import Real
from benchmarks.records import FLOORS, case_results
from benchmarks.rivals import RIVALS
from tests.reference import error, size, target_logps

CPU = torch.device("cpu")


def problem(dtype: torch.dtype = torch.float32) -> Problem:
    return Problem.random(2, 12, 16, 90, 0.4, dtype, "cpu")


def test_the_problem_has_the_requested_shape():
    ours = problem()
    assert ours.hidden.shape == ours.ref_hidden.shape == (4, 12, 16)
    assert ours.weight.shape == ours.ref_weight.shape == (90, 16)
    assert ((ours.labels != IGNORE_INDEX).sum(1) == 5).all()
    assert torch.equal(ours.hidden, problem().hidden)
    assert not torch.equal(ours.hidden, ours.ref_hidden)
    logits = Problem.random(2, 64, 256, 500, 0.4, torch.float32, "cpu")
    assert 2.5 < (logits.hidden @ logits.weight.t()).std().item() < 3.5


def autograds_step(given):
    """Operands with their gradients, summed log-probs and the loss, all logits in float64."""
    hidden, weight = (t.detach().double().requires_grad_() for t in (given.hidden, given.weight))
    policy = target_logps(hidden @ weight.t(), given.labels).sum(1)
    ref = target_logps(given.ref_hidden.double() @ given.ref_weight.double().t(), given.labels).sum(1)
    chosen, rejected = (policy - ref).chunk(2)
    loss = -(0.1 * (chosen - rejected)).sigmoid().log().mean()
    loss.backward()
    return hidden, weight, policy, loss


@pytest.mark.parametrize("name", [name for name in RIVALS if name not in FLOORS])
def test_every_rival_computes_the_same_loss_and_gradients(name):
    given = problem()
    hidden, weight, policy, loss = autograds_step(given)
    try:
        found = RIVALS[name](given)()
    except CannotRun as reason:
        pytest.skip(str(reason))
    assert error(true_logps(given.hidden, given.weight, given.labels), policy.detach()) < 1e-12
    rounding = 16 * torch.finfo(torch.float32).eps * size(policy.detach())  # the same arithmetic in float32
    assert error(found.policy_logps, policy.detach()) < rounding
    assert error(found.loss, loss.detach()) < rounding
    for mine, right in ((given.hidden.grad, hidden.grad), (given.weight.grad, weight.grad)):
        assert error(mine, right) < rounding * size(right)


@pytest.mark.parametrize("name", ["liger_sm90", "cce", "quack", "ours_persistent"])
def test_a_cuda_kernel_gives_the_reason_why_it_cannot_run_on_the_cpu(name):
    with pytest.raises(CannotRun, match="kernels need CUDA"):
        RIVALS[name](problem())


@pytest.mark.parametrize("kind", accuracy.SHIFTS)
def test_the_ground_truth_is_that_of_autograd_in_float64(kind):
    given = accuracy.with_raised_targets(problem(), accuracy.SHIFTS[kind] / 10)
    hidden, weight, policy, loss = autograds_step(given)
    found = true_step(given)
    rights = (loss.detach(), policy.detach(), hidden.grad, weight.grad)
    for mine, right in zip(found, rights, strict=True):
        assert error(mine, right) < 1e-12 * size(right)


def test_raised_targets_are_raised():
    plain = problem()
    raised = accuracy.with_raised_targets(plain, 30.0)
    kept = plain.labels != IGNORE_INDEX
    targets = plain.labels[kept].unsqueeze(1)
    before, after = ((p.hidden[kept] @ p.weight.t()).gather(1, targets) for p in (plain, raised))
    assert error(after, before + 30) < 1e-4
    assert torch.equal(plain.hidden[~kept], raised.hidden[~kept])


@pytest.mark.parametrize("kind", accuracy.SHIFTS)
def test_ours_is_a_hundred_times_more_accurate_than_bf16_logits(kind):
    options = ["--quick", "--child", "--vocabs=300", "--dtypes=bf16", f"--inputs={kind}", "--cases", "naive", "ours"]
    found = accuracy.measure_problem(accuracy.parse(options))["cases"]
    assert 100 * found["ours"]["nats"] < found["naive"]["nats"]
    assert found["ours"]["dx"] < found["naive"]["dx"]
    assert found["ours"]["dw"] < found["naive"]["dw"]


def test_the_accuracy_command_lists_measured_and_skipped_cases(tmp_path, capsys):
    path = tmp_path / "accuracy.json"
    assert accuracy.main(["--quick", "--inputs", "plain", "--cases", "ours", "cce", f"--json={path}"]) == 0
    report = json.loads(path.read_text())
    assert report["command"] == "python -m benchmarks.accuracy --quick --inputs plain --cases ours cce"
    ours, cce = report["results"]
    assert ours["nats"] < 1e-3
    assert "kernels need CUDA" in cce["skipped"]
    assert "cce: not measured" in capsys.readouterr().out


def test_errors_of_a_tokens_probability_as_logits_grow(tmp_path, capsys):
    """Ours as rounding to float32 explains, and the same bits whatever changes; bf16 logits are far off."""
    path = tmp_path / "mismatch.json"
    assert mismatch.main(["--quick", "--cases", "naive bf16", "ours", "liger scaled", f"--json={path}"]) == 0
    results = {(one["case"], one.get("peak")): one for one in json.loads(path.read_text())["results"]}
    if importlib.util.find_spec("liger_kernel") is None:
        assert "make bench-env" in results.pop(("liger scaled", 5))["skipped"]
    for peak in mismatch.QUICK["peaks"]:
        assert results["ours", peak]["of_peak"] < 1e-6 < results["naive bf16", peak]["of_peak"]
        assert {"repeated", "order", "batch", "stash"} <= set(results["ours", peak]["same_bits"])
    assert results["naive bf16", 80]["probability"] > 1e-3 > results["ours", 80]["probability"]
    assert "÷ peak" in capsys.readouterr().out


def test_rows_of_a_real_model_are_measured_too(tmp_path, monkeypatch):
    """In this process: the child would look for the model's file."""
    states, head = torch.randn(40, 16), torch.randn(90, 16)
    real = Real(states, head, torch.randint(90, (40,)), torch.tensor([10, 10, 10, 10]))
    monkeypatch.setattr(mismatch, "load", lambda name: real)
    monkeypatch.setattr(accuracy, "load", lambda name: real)

    options = mismatch.parse(["--pairs=4", "--threads=1"])
    result = mismatch.measured("ours", "smollm2", options)
    peaks = (states.bfloat16().double() @ head.bfloat16().double().t()).amax(1)
    assert peaks.min() < result["peak"] < peaks.max()
    assert result["of_peak"] < 1e-6
    assert mismatch.point_of(result) == f"smollm2 ({result['peak']:.0f})"

    found = accuracy.measure_problem(
        accuracy.parse(
            ["--inputs=smollm2", "--vocabs=90", "--dtypes=bf16", "--cases=ours", "--length=8", "--threads=1"]
        )
    )
    assert 0 < found["cases"]["ours"]["nats"] < 1e-3


def test_the_peak_is_as_asked_and_tokens_are_likely_ones():
    given = mismatch.problem_of(mismatch.parse(["--quick"]), 80.0)
    z = given.hidden.detach().flatten(0, 1).double() @ given.weight.detach().double().t()
    assert z.amax(1).mean().item() == pytest.approx(80, rel=0.01)
    assert z.log_softmax(1).gather(1, given.labels).mean() > -3


def test_real_masks_are_runs_of_completion_tokens():
    if not has_real_masks():
        pytest.skip("no real data")
    runs = real_runs(4, 256)
    mask = scored_positions(4, 256, "real", torch.Generator())
    assert mask.sum(1).tolist() == [end - start for start, end in runs]
    assert max(end for _, end in runs) == 256  # the longest sequence fills the batch
    assert all(0 <= start < end for start, end in runs)
    assert 0.05 < mask.float().mean().item() < 0.5


def test_scaling_measures_each_point_once(monkeypatch, tmp_path, capsys):
    asked = []

    def answer(module, arguments, threads):
        asked.append(arguments)
        return {"times_s": [1.0], "peak_extra_bytes": 2**20, "rows": 7, "error_nat": 0.5}

    monkeypatch.setattr(measure, "run_fresh", answer)
    path = tmp_path / "scaling.json"
    assert scaling.main(["--factors", "hidden", "vocab", "--cases", "gemms", "ours", f"--json={path}"]) == 0
    points = [(point["factor"], point["value"]) for point in json.loads(path.read_text())["results"]]
    assert points == [("hidden", n) for n in (256, 512, 1024, 2048)] + [
        ("vocab", n) for n in (16000, 32000, 64000, 128000)
    ]
    assert len(asked) == 2 * 7  # the base is a point of both
    assert "1000.0 / 1" in capsys.readouterr().out


def test_stages_pairs_differences_by_seed():
    right = {("dpo", 7): 0.5, ("dpo", 8): 0.75, ("sdpo", 7): 0.75, ("sdpo", 8): 0.5}
    rows = [{"method": method, "seed": seed, "exactly_right": value} for (method, seed), value in right.items()]
    assert stages.differences(rows, "sdpo", "dpo") == [0.25, -0.25]


def test_the_floors_run():
    for name in FLOORS:
        assert RIVALS[name](problem(torch.bfloat16))() is None
    with pytest.raises(CannotRun, match="the same as `gemms`"):
        RIVALS["gemms_fp32"](problem())


def test_the_faster_floor_is_the_baseline():
    seconds = {"gemms": 4.0, "gemms_fp32": 2.0, "ours": 3.0}
    results = case_results({case: [{"times_s": [s], "peak_extra_bytes": 1}] for case, s in seconds.items()})
    assert [result["ratio_to_floor"] for result in results] == [2.0, 1.0, 1.5]


def test_every_rival_has_a_name():
    assert NAMES.keys() == RIVALS.keys()


def test_a_float32_head_has_the_error_of_float32():
    """Of bf16 operands; the gradients are rounded to bf16 once."""
    given = problem(torch.bfloat16)
    found = RIVALS["naive_fp32"](given)()
    truth = true_step(given)
    rounding = torch.finfo(torch.float32).eps
    assert error(found.policy_logps, truth.policy_logps) < 16 * rounding * size(truth.policy_logps)
    assert mismatch.relative(given.hidden.grad, truth.hidden_grad) < torch.finfo(torch.bfloat16).eps
    assert mismatch.relative(given.weight.grad, truth.weight_grad) < torch.finfo(torch.bfloat16).eps


ALLOCATION = """
import torch
from benchmarks import measure
def call():
    torch.ones(2**24)  # 64 MiB, freed at once
    torch.ones(2**23)
torch.ones(2**17)  # starts the threads
print(measure.peak_extra_bytes(call, torch.device("cpu")))
"""


def test_peak_memory_is_that_of_a_known_allocation():
    """In a fresh process, as in use: in this one the allocator may reuse freed memory."""
    done = subprocess.run(
        [sys.executable, "-c", ALLOCATION], cwd=measure.ROOT, capture_output=True, text=True, check=True
    )
    if done.stdout.strip() == "None":
        pytest.skip("this system does not report a process's peak memory")
    assert 0.95 * 2**26 < int(done.stdout) < 1.1 * 2**26


def test_a_failing_case_is_answered_with_the_reason(monkeypatch):
    answer = measure.run_fresh("benchmarks.head", ["--child=naive", "--device=nonsense"], 1)
    assert answer["skipped"].startswith("exit status 1: ")
    assert "nonsense" in answer["skipped"]

    def absent(problem):
        raise CannotRun("it is not installed")

    monkeypatch.setitem(RIVALS, "naive", absent)
    assert head.measure_case(head.parse(["--child=naive", "--quick"])) == {"skipped": "it is not installed"}


def test_the_head_command_measures_and_writes_its_report(tmp_path, capsys):
    path = tmp_path / "results" / "head.json"
    assert head.main(["--quick", "--cases", "gemms", "ours", "--threads=1", f"--json={path}"]) == 0
    shown = capsys.readouterr().out
    report = json.loads(path.read_text())
    assert report["shape"] == {
        "pairs": 1, "length": 16, "hidden": 32, "vocab": 200, "scored": 0.4, "rows": 12,
        "dtype": "bf16", "device": "cpu",
    }  # fmt: skip
    # a wheel from the registry is called 2.11.0 and calls itself 2.11.0+cu130 once imported
    assert report["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert report["machine"]["threads"] == 1
    floor, ours = report["results"]
    assert (floor["case"], ours["case"]) == ("gemms", "ours")
    assert floor["ratio_to_floor"] == 1.0
    assert ours["ratio_to_floor"] == ours["median_s"] / floor["median_s"]
    assert ours["error_nat"] < 1e-4
    assert "gemms" in shown
    assert '× floor: ratio to gemms or gemms_fp32, the bare-GEMM baseline ("floor"), whichever is faster' in shown


def test_cases_take_turns_and_one_that_cannot_run_is_tried_once(monkeypatch, capsys):
    asked = []

    def answer(module, arguments, threads):
        case = next(a.removeprefix("--child=") for a in arguments if a.startswith("--child="))
        asked.append((case, "--with-error" in arguments))
        if case == "naive":
            return {"skipped": "it is too slow"}
        return {"times_s": [1.0, 2.0 + len(asked)], "peak_extra_bytes": len(asked), "rows": 7, "error_nat": 0.5}

    monkeypatch.setattr(measure, "run_fresh", answer)
    assert head.main(["--rounds=2", "--cases", "gemms", "naive", "ours"]) == 0
    assert asked == [("gemms", True), ("naive", True), ("ours", True), ("gemms", False), ("ours", False)]
    shown = capsys.readouterr().out
    assert "naive: not measured, it is too slow" in shown
    report = head.measure_all(head.parse(["--rounds=1", "--cases", "ours"]))
    assert "ratio_to_floor" not in report["results"][0]  # no floor was measured


SMALL = ["--rows=16", "--width=32", "--vocab=301", "--rounds=1"]


@pytest.mark.slow
def test_a_vocabulary_over_two_processes_beside_torchs_own(tmp_path, capsys):
    """Bytes by hand: 24 a row of the sums and logits, and dX; torch's are 8 or 16 a row, and dX or the logits."""
    path = tmp_path / "vocab_parallel.json"
    assert vocab_parallel.main([*SMALL, f"--json={path}"]) == 0
    found = {result["case"]: result for result in json.loads(path.read_text())["results"]}
    rows, dx = 16, 16 * 32
    assert found["ours"]["received_bytes"] == found["ours_without_stash"]["received_bytes"] == 24 * rows + 4 * dx
    # its maxima and sums are float32, the target's log-prob and dX are in the dtype of the logits and of the product
    assert found["loss_parallel"]["received_bytes"] == (4 + 4 + 2) * rows + 2 * dx
    assert found["loss_parallel_fp32"]["received_bytes"] == (4 + 4 + 4) * rows + 2 * dx
    # slices are padded to one size
    assert found["naive"]["received_bytes"] == 2 * rows * 151 + 2 * dx
    assert found["naive_fp32"]["received_bytes"] == 4 * rows * 151 + 4 * dx
    assert found["ours"]["error_nat"] < 1e-2 * found["loss_parallel_fp32"]["error_nat"]
    assert found["naive_fp32"]["error_nat"] < 1e-2 * found["naive"]["error_nat"]
    assert "loss_parallel_fp32" in capsys.readouterr().out


@pytest.mark.slow
def test_a_head_sharded_over_two_processes(tmp_path):
    """Bytes of the gathered side by hand: half of the padded head, and half of its gradient in float32."""
    path = tmp_path / "sharded.json"
    assert sharded.main([*SMALL, f"--json={path}"]) == 0
    found = {result["case"]: result for result in json.loads(path.read_text())["results"]}
    assert list(found) == ["sharded", "sharded_without_stash", "gathered"]
    assert found["gathered"]["received_bytes"] == 151 * 32 * (2 + 4)
    # the targets' rows of the head come twice, and the head itself in each pass
    assert 151 * 32 * (2 + 2 + 4) < found["sharded"]["received_bytes"] < 151 * 32 * (2 + 2 + 4) + 2 * 16 * (32 + 8)
