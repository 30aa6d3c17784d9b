"""The steps of `benchmarks/gpu.sh call1` and `call2`, ordered by worth; each call ends within its own deadline.

call1 answers whether everything is right: versions and libraries, the tests with one process a backend (an illegal
access makes a process's CUDA context unusable), accuracy, and our own cases at the first shape. call2 answers how fast
it is: the other shapes, the rivals at two, parts of a step, and last compute-sanitizer.

With SDPO_GPU_STUB=1 the same steps run on the CPU at tiny shapes: a rehearsal without a GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks import packed_persistent
from benchmarks.gpu_steps import Runner, Step

ROOT = Path(__file__).resolve().parents[1]
SECONDS = {"call1": 240.0, "call2": 380.0}
STUB = os.environ.get("SDPO_GPU_STUB") == "1"
DEVICE = "cpu" if STUB else "cuda"
BACKENDS = ("eager", "native") if STUB else ("triton", "native", "eager")

# rows scored, hidden, vocabulary: all positions are scored, 4 pairs a batch
SHAPES = [(16, 32, 300), (16, 32, 200)] if STUB else [
    (8192, 4096, 128256), (8192, 2048, 151936), (16384, 3584, 152064), (4096, 8192, 128256), (8192, 2304, 256000)
]  # fmt: skip
OURS = ("gemms", "ours", "ours_native", "ours_without_stash", "ours_native_without_stash")
PERSISTENT = ("ours_persistent",) if packed_persistent.is_packed() and not STUB else ()
RIVALS = ("gemms", "ours", "ours_native", "cce", "trl_fused_scored", "liger_dpo", "liger_sm90", "quack")
LIGER = ("gemms", "ours", "liger_tp")  # its library starts a communication layer, which may end or hold the process
MODELS = ("smollm2", "gemma3")  # of benchmarks/real.py, whose masks may have come along
TESTED = "tests/cuda"
ALONE = ("test_packed_attention.py", "test_once.py")  # files of TESTED that need a process of their own


def main(arguments: list[str] | None = None) -> int:
    """Run one call; 0 if every step passed."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("call", choices=SECONDS)
    parser.add_argument("--seconds", type=float, help="the deadline, in place of 240 and 380")
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP", help="run these steps alone")
    options = parser.parse_args(arguments)

    out = Path(os.environ["OUT"])
    groups = CALLS[options.call](out / "results.jsonl")
    if unknown := set(options.only) - {step.name for group in groups for step in group}:
        names = ", ".join(step.name for group in groups for step in group)
        parser.error(f"--only: was {', '.join(sorted(unknown))}, must be from: {names}")

    runner = Runner(out, options.seconds or SECONDS[options.call])
    runner.end_on_signals()
    for group in groups:
        if chosen := [step for step in group if not options.only or step.name in options.only]:
            runner.run(chosen)
    return runner.finish()


def first_call(results: Path) -> list[list[Step]]:
    """Is everything right? Groups of steps that run side by side."""
    return [
        *build(),
        [about(results)],
        [*(tests(backend) for backend in BACKENDS), *([tests_of_persistent()] if PERSISTENT else []), once()],
        [accuracy(results)],
        [head(results, SHAPES[0], OURS + PERSISTENT, 60)],
    ]


def second_call(results: Path) -> list[list[Step]]:
    """How fast is it? And last what compute-sanitizer says."""
    own = [[head(results, shape, OURS + PERSISTENT, 40)] for shape in SHAPES[1:]]
    rivals = [[head(results, shape, RIVALS, 70, "rivals")] for shape in (SHAPES[0], SHAPES[-1])]
    parts = [Step("parts", python("-m", "benchmarks.parts", f"--jsonl={results}", f"--device={DEVICE}"), 70)]
    last = [
        [head(results, SHAPES[0], LIGER, 40, "liger")],
        [packed_attention()],
        [sanitizer("memcheck")],
        [sanitizer("racecheck")],
    ]
    kept = [[routed(results, model)] for model in MODELS]
    return [*build(), [about(results)], *own[:1], rivals[0], *kept, *own[1:], parts, rivals[1], *last]


def python(*arguments: str) -> tuple[str, ...]:
    """A command of this Python."""
    return (sys.executable, *arguments)


def build() -> list[list[Step]]:
    """Both libraries, if none were carried along; nvcc takes a minute."""
    if STUB or (ROOT / "sdpo_kernels" / "_cuda.so").is_file():
        return []
    command = python("setup.py", "-q", "build_ext", "--inplace")
    return [[Step("build", command, 120, {"SDPO_REQUIRE_NATIVE": "1"})]]


def about(results: Path) -> Step:
    """Versions, tools, libraries, kernels."""
    return Step("about", python("-m", "benchmarks.gpu_about", f"--jsonl={results}", f"--device={DEVICE}"), 60)


def pytest(*arguments: str) -> tuple[str, ...]:
    """The tests, with one line each: a killed process has said how far it came."""
    return python("-m", "pytest", "-v", "-rfEs", "--tb=short", "-p", "no:cacheprovider", *arguments)


def tests(backend: str) -> Step:
    """The tests that run once for each backend, for one of them."""
    apart = [f"--ignore={TESTED}/{name}" for name in ALONE]
    few = ("-k", "repeated_calls") if STUB else ()
    return Step(f"tests-{backend}", pytest(TESTED, *apart, *few), 110, {"SDPO_TEST_BACKENDS": backend} | on_device())


def tests_of_persistent() -> Step:
    """Those of Triton once more with the packed persistent kernel, which takes the calls that are its own."""
    step = tests("triton")
    command = (*step.command, "-p", "benchmarks.packed_persistent")
    return replace(step, name="tests-persistent", command=command, environment={**step.environment, "SDPO_QUACK": "1"})


def once() -> Step:
    """The tests that no backend repeats: Trainer, DDP, and those that end their process."""
    few = ("-k", "refused") if STUB else ()
    return Step("tests-once", pytest(f"{TESTED}/test_once.py", *few), 110, on_device())


def packed_attention() -> Step:
    """Last of the tests and alone: it compiles attention kernels that others wrote."""
    return Step("tests-packed", pytest(f"{TESTED}/test_packed_attention.py"), 40, on_device())


def on_device() -> dict[str, str]:
    """The tests' device."""
    return {"SDPO_TEST_DEVICE": DEVICE}


def accuracy(results: Path) -> Step:
    """Summed log-probs of 512 tokens and gradients against float64, with and without a stash."""
    cases = ["ours", "ours_native", "ours_without_stash", "ours_native_without_stash", "ours_eager", "trl_fused_scored"]
    size = ["--length=8", "--hidden=16", "--vocabs", "90"] if STUB else ["--hidden=2048", "--vocabs", "151936"]
    command = ["-m", "benchmarks.accuracy", f"--device={DEVICE}", "--together", "--dtypes", "bf16", *size]
    command += ["--inputs", "plain", "confident", "--cases", *cases, *PERSISTENT, f"--jsonl={results}"]
    return Step("accuracy", python(*command), 45)


def head(results: Path, shape: tuple[int, int, int], cases: tuple[str, ...], at_most: float, kind: str = "own") -> Step:
    """One DPO step at the head at one shape, cases in turn."""
    rows, hidden, vocab = shape
    command = ["-m", "benchmarks.head", f"--device={DEVICE}", "--together", "--pairs=4", f"--length={rows // 8}"]
    command += ["--scored=1.0", f"--hidden={hidden}", f"--vocab={vocab}", "--rounds=1", "--repeats=10"]
    chosen = [case for case in cases if not (STUB and case.startswith("liger"))]
    command += [f"--jsonl={results}", "--cases", *chosen]
    return Step(f"{kind}-{rows}-{hidden}-{vocab}", python(*command), at_most)


def routed(results: Path, model: str) -> Step:
    """The backward with grad_tol, by the masks of real rows; without these it says so and ends."""
    command = ("-m", "benchmarks.routed", f"--model={model}", f"--device={DEVICE}", f"--jsonl={results}")
    return Step(f"routed-{model}", python(*command), 40)


def sanitizer(tool: str) -> Step:
    """A small run of every kernel under compute-sanitizer, without torch's own pool, which hides accesses."""
    test = pytest(f"{TESTED}/test_logps.py", "-k", "small_run and not eager")
    command = test if STUB else ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *test)
    return Step(tool, command, 75, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} | on_device())


CALLS = {"call1": first_call, "call2": second_call}


if __name__ == "__main__":
    raise SystemExit(main())
