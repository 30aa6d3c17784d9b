"""`benchmarks/gpu.sh`, rehearsed without a GPU: failures reach the exit status, a kill leaves what was measured."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import accuracy, gpu, gpu_pack, gpu_steps, head, measure, page, records, routed
from benchmarks.gpu_steps import Runner, Step
from benchmarks.rivals import RIVALS
from sdpo_kernels.backends.grad_tol import packed

ROOT = Path(__file__).resolve().parents[1]
OWN = "own-16-32-300"


def script(out: Path, *arguments: str) -> subprocess.Popen[str]:
    """The script in a process group of its own, at tiny shapes on the CPU."""
    environment = os.environ | {
        "SDPO_GPU_STUB": "1", "OUT": str(out), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
        "SDPO_COMMIT": "packed", "TRITON_CACHE_DIR": str(out / "triton"),
    }  # fmt: skip
    return subprocess.Popen(
        ["bash", "benchmarks/gpu.sh", *arguments], cwd=ROOT, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def shell(name: str, command: str, at_most: float = 30.0) -> Step:
    return Step(name, ("sh", "-c", command), at_most)


def ends(out: Path) -> dict[str, object]:
    return {line["step"]: line["exit"] for line in records.read(out / "results.jsonl") if "step" in line}


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---- the script ----


def test_a_rehearsal_leaves_results_for_the_page(tmp_path):
    done = script(tmp_path, "call1", "--only", "about", "tests-native", OWN)
    shown, _ = done.communicate(timeout=200)
    assert done.returncode == 0, shown
    assert "all steps passed" in shown
    assert ends(tmp_path) == {"about": 0, "tests-native": 0, OWN: 0}

    reports = page.read_reports(tmp_path)
    assert list(reports) == ["head-16-32-300-results"]
    (report,) = reports.values()
    assert report["commit"] == "packed"
    found = {result["case"]: result for result in report["results"]}
    assert len(found["ours"]["times_s"]) == 10
    assert found["ours"]["error_nat"] < 1e-3
    shape = "Shape: pairs 4, length 2, hidden 32, vocab 300, scored 1.0, dtype bf16, device cpu, rows 16."
    assert shape in page.page(reports)

    log = (tmp_path / "log.txt").read_text()
    assert re.search(r"^\[tests-native\] .*test_repeated_calls_give_the_same_bits\[native\] PASSED", log, re.M)
    assert "[about] CPU library" in log


@pytest.mark.parametrize("wanted", ['"case": "ours", "peak_extra_bytes"', '"case": "ours", "seconds"'])
def test_killed_half_way_it_leaves_whole_lines(tmp_path, wanted):
    """Once while the first cases are tried, once while they take turns."""
    results, running = tmp_path / "results.jsonl", script(tmp_path, "call1", "--only", OWN)
    give_up = time.monotonic() + 120
    while not (results.is_file() and wanted in results.read_text()):
        assert time.monotonic() < give_up
        assert running.poll() is None, running.communicate()[0]
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate(timeout=20)

    # no process of the group goes on writing
    size = results.stat().st_size
    (start, *lines) = records.read(results)
    assert (start["benchmark"], start["commit"]) == ("head", "packed")
    assert {"case", "run"} <= lines[0].keys()
    (report,) = records.reports(results).values()
    ours = next(result for result in report["results"] if result["case"] == "ours")
    assert "median_s" in ours or ours["skipped"] == "the run ended before it was timed"
    time.sleep(0.3)
    assert results.stat().st_size == size


def test_a_signal_ends_the_steps_and_is_noted(tmp_path):
    running = script(tmp_path, "call1", "--only", OWN)
    give_up = time.monotonic() + 120
    while not (tmp_path / "results.jsonl").is_file():
        assert time.monotonic() < give_up
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    shown, _ = running.communicate(timeout=20)
    assert running.returncode == 128 + signal.SIGTERM
    assert records.read(tmp_path / "results.jsonl")[-1]["exit"] == "signal 15"
    assert "step                         seconds  exit" in shown


def test_an_unknown_call_shows_how_it_is_used(tmp_path):
    running = script(tmp_path, "call3")
    shown, _ = running.communicate(timeout=20)
    assert running.returncode == 2
    assert "benchmarks/gpu.sh pack" in shown


# ---- steps and their deadline ----


def test_a_failing_step_reaches_the_exit_status(tmp_path, capsys):
    runner = Runner(tmp_path, seconds=60)
    runner.run([shell("good", "echo fine"), shell("bad", "echo wrong; exit 3")])
    runner.run([Step("absent", ("/nonexistent/compute-sanitizer",), 5), shell("after", "true")])
    assert runner.finish() == 1
    found = ends(tmp_path)
    assert str(found.pop("absent")).startswith("not started: ")
    assert found == {"good": 0, "bad": 3, "after": 0}
    assert "FAILED: bad, absent" in capsys.readouterr().out
    assert set((tmp_path / "log.txt").read_text().splitlines()) == {"[good] fine", "[bad] wrong"}


def test_steps_of_a_group_run_side_by_side(tmp_path):
    """Each waits for what the other makes."""
    first, second = tmp_path / "first", tmp_path / "second"
    wait = "touch {}; while [ ! -e {} ]; do sleep 0.05; done"
    runner = Runner(tmp_path, seconds=60)
    runner.run([shell("one", wait.format(first, second)), shell("other", wait.format(second, first))])
    assert runner.finish() == 0


def test_a_step_that_takes_too_long_is_killed_with_its_children(tmp_path):
    runner = Runner(tmp_path, seconds=60)
    runner.run([shell("slow", f"sleep 50 & echo $! > {tmp_path}/child; wait", at_most=2)])
    assert str(ends(tmp_path)["slow"]).startswith("killed after")
    child = int((tmp_path / "child").read_text())
    give_up = time.monotonic() + 5
    while is_running(child) and time.monotonic() < give_up:
        time.sleep(0.02)
    assert not is_running(child)
    assert runner.finish() == 1


def test_a_step_gets_what_is_left_and_none_starts_without_time(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_steps, "LEAST", 0.1)
    runner = Runner(tmp_path, seconds=gpu_steps.RESERVE + 2)
    runner.run([shell("long", "sleep 60", at_most=100)])
    runner.run([shell("late", f"touch {tmp_path}/late")])
    found = ends(tmp_path)
    assert str(found["long"]).startswith("killed after")
    assert found["late"] == "not started: no time is left"
    assert not (tmp_path / "late").exists()
    assert runner.finish() == 1


# ---- cases that could not be measured ----


@pytest.mark.parametrize("module", [head, accuracy])
def test_a_failing_case_of_ours_is_named_and_reaches_the_exit_status(module, monkeypatch, capsys, tmp_path):
    def broken(problem):
        raise RuntimeError("no kernel\nat line 3")

    monkeypatch.setitem(RIVALS, "ours", broken)
    path = tmp_path / "results.jsonl"
    cases = ["--cases", "ours", "cce", "ours_eager"]
    assert module.main(["--quick", "--together", "--device=cpu", f"--jsonl={path}", *cases]) == 1
    assert "FAILED ours: RuntimeError: no kernel" in capsys.readouterr().err
    assert any("error_nat" in line or "nats" in line.get("result", {}) for line in records.read(path))
    # a rival that says why it cannot run is no failure, nor is one of ours that on the CPU is another
    monkeypatch.undo()
    assert module.main(["--quick", "--together", "--device=cpu", "--cases", "ours", "ours_native", "cce"]) == 0


def test_on_cuda_every_case_of_ours_has_to_run(capsys):
    results = [{"case": "ours", "median_s": 1.0}, {"case": "ours_native", "skipped": "no library"}]
    assert measure.exit_status([*results, {"case": "cce", "skipped": "absent"}], "cuda") == 1
    assert capsys.readouterr().err == "FAILED ours_native: no library\n"
    assert measure.exit_status(results, "cpu") == 0


def test_a_line_that_was_cut_is_dropped(tmp_path):
    path = tmp_path / "results.jsonl"
    run = records.Run(path, {"benchmark": "head", "name": "head-1", "shape": {"rows": 1}})
    run.add(case="gemms", peak_extra_bytes=1)
    run.add(case="gemms", seconds=2.0)
    run.add(case="ours", peak_extra_bytes=5, error_nat=0.5)
    with open(path, "a") as file:
        file.write('{"run": "' + run.id + '", "case": "ours", "sec')
    (report,) = records.reports(path).values()
    gemms, ours = report["results"]
    assert (gemms["median_s"], gemms["ratio_to_floor"]) == (2.0, 1.0)
    assert ours == {"case": "ours", "skipped": "the run ended before it was timed", "failed": True}


# ---- the plan and what is carried ----


def test_every_command_of_the_plan_can_be_parsed(tmp_path):
    steps = [step for call in gpu.CALLS.values() for group in call(tmp_path / "r.jsonl") for step in group]
    parsers = {"benchmarks.head": head.parse, "benchmarks.accuracy": accuracy.parse}
    seen = set()
    for step in steps:
        if step.command[1] != "-m":  # compute-sanitizer, setup.py
            continue
        _, _, module, *rest = step.command
        seen.add(module)
        if module in parsers:
            options = parsers[module](rest)
            assert options.together
            assert "ours" in options.cases
    assert {"head", "accuracy", "parts", "routed", "gpu_about"} == {
        name.removeprefix("benchmarks.") for name in seen
    } - {"pytest"}
    # what makes a context unusable comes after what it would spoil
    assert [step.name for step in steps][-2:] == ["memcheck", "racecheck"]
    for name in gpu.ALONE:
        assert (ROOT / gpu.TESTED / name).is_file()


COMPILED_THEN_LAUNCHED = """
import os
from benchmarks import compile_triton

def folders():
    return set(os.listdir(os.environ["TRITON_CACHE_DIR"]))

with compile_triton.without_a_gpu():
    compile_triton.pair_loss(4, 2, True, "cuda")
    compiled = folders()
assert len(compiled) >= 1

# the driver still launches nothing, but now the tensors are real and the arguments those of a real launch
compile_triton.pair_loss(4, 2, True, "cpu")
assert folders() == compiled
compile_triton.pair_loss(4, 3, True, "cpu")
assert folders() > compiled
"""


def test_a_kernel_compiled_without_data_is_found_by_a_launch(tmp_path):
    """Same key, so that what was packed is not compiled again; another loss is another kernel."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    code = [sys.executable, "-c", COMPILED_THEN_LAUNCHED]
    done = subprocess.run(code, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_masks_that_did_not_come_along_are_no_failure(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(routed.real, "RUNS", tmp_path)
    assert routed.main(["--model=gemma3", "--device=cuda"]) == 0
    assert "gemma3/tiles.safetensors is missing" in capsys.readouterr().out


def test_the_structure_of_masks_and_its_cost():
    """Every second row keeps the first half of the tiles, the others one tile more than none."""
    tiles = torch.zeros(256, 100, dtype=torch.bool)
    tiles[::2, :50] = True
    tiles[1::2, 99] = True
    found = routed.structure(packed(tiles, 256), 6400)
    assert found["kept"] == pytest.approx(0.255)
    assert (found["blocks_sorted"], found["blocks_as_they_come"]) == (pytest.approx(0.255), pytest.approx(0.51))
    assert (found["lists_of_64"], found["lists_of_128"]) == (pytest.approx(0.255), pytest.approx(0.255))

    everything = dict.fromkeys(found, 1.0)
    dense, sparse = (routed.predicted(shares, 8192, 640, 262144) for shares in (everything, found))
    assert dense["backward_ratio"] > 1 > sparse["backward_ratio"] > 0.255


def test_the_calls_fit_the_limits():
    text = gpu_pack.calls(2**20, 10 * 2**20)
    given = [json.loads(line.removeprefix("run ")) for line in text.splitlines() if line.startswith("run ")]
    assert [call["command"] for call in given] == ["bash benchmarks/gpu.sh call1", "bash benchmarks/gpu.sh call2"]
    assert sum(call["timeout_s"] for call in given) <= 15 * 60 - 2 * 60  # two starts of the machine
    for call in given:
        assert call["timeout_s"] <= 600
        assert len(call["carry"]) <= 8
    with pytest.raises(SystemExit, match="carried: was 70 MiB, must be at most 64 MiB"):
        gpu_pack.calls(10 * 2**20, 60 * 2**20)


def test_libraries_that_were_not_carried_are_built_there_or_the_call_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    for call in gpu.CALLS.values():
        (step,) = call(tmp_path / "r.jsonl")[0]
        assert step.name == "build"
        assert step.environment == {"SDPO_REQUIRE_NATIVE": "1"}
    (tmp_path / "sdpo_kernels").mkdir()
    (tmp_path / "sdpo_kernels" / "_cuda.so").touch()
    assert [[step.name for step in call(tmp_path)[0]] for call in gpu.CALLS.values()] == [["about"]] * 2


def test_the_commit_is_given_where_there_is_no_git(monkeypatch):
    monkeypatch.setenv("SDPO_COMMIT", "0123456789ab")
    assert measure.surroundings(1, torch.device("cpu"))["commit"] == "0123456789ab"
    monkeypatch.delenv("SDPO_COMMIT")
    monkeypatch.setenv("PATH", "/nonexistent")
    assert measure.surroundings(1, torch.device("cpu"))["commit"] == "unknown"
