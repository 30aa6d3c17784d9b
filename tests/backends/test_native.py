"""The native backend: every chip's kernels, reproducible bits, precision at scale, memory, its library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdpo_kernels import backends, epilogue_op, linear_logps
from sdpo_kernels.backends import native, native_library
from sdpo_kernels.backends.base import EXTRAS, Request
from sdpo_kernels.dpo_output import pair_output
from sdpo_kernels.head import Head
from tests.reference import Case, check, error, random_case, target_logps
from tests.test_logps import cases

NATIVE = backends.BACKENDS["native"]
pytestmark = pytest.mark.skipif(NATIVE.unavailable_reason is not None, reason=str(NATIVE.unavailable_reason))
ROOT = Path(__file__).resolve().parents[2]
ALL = 10**12  # stash_bytes that holds everything
CHIPS = ("avx512bf16", "avx512", "avx2", "base")
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(params=CHIPS)
def chip(request, monkeypatch):
    """The kernels for one kind of chip, if this machine supports it."""
    best = torch.ops.sdpo_native.cpu_chip()
    try:
        torch.ops.sdpo_native.use_cpu_chip(request.param)
    except RuntimeError:
        pytest.skip(f"this machine is {best} at best")
    monkeypatch.setattr(NATIVE, "bf16_products", request.param == "avx512bf16")
    yield request.param
    torch.ops.sdpo_native.use_cpu_chip(best)


def native_case(*shape: int, **options) -> Case:
    """A random case that the native backend must serve."""
    settings = {"backend": "native"} | options.pop("settings", {})
    return random_case(*shape, settings=settings, **options)


# --- choice -----------------------------------------------------------------------------------------------------


def request_of(**changes) -> Request:
    """A request that the native backend serves, with `changes`."""
    values = {"device": torch.device("cpu"), "dtype": torch.float32, "weight_dtype": torch.float32, "head": Head()}
    return Request(**{**values, "outputs": (), **changes})


def test_auto_prefers_it_on_the_cpu(monkeypatch):
    monkeypatch.delenv("SDPO_BACKEND", raising=False)
    assert backends.choose_backend("auto", request_of()).name == "native"
    assert backends.choose_backend_of_rows("auto", torch.device("cpu"), torch.bfloat16).name == "native"


def test_auto_takes_it_on_cuda_for_existing_logits_only(monkeypatch):
    """Triton serves the head and the pairs there, and has no kernels for existing logits."""
    monkeypatch.delenv("SDPO_BACKEND", raising=False)
    monkeypatch.setattr(native.NativeBackend, "_library", lambda backend, device: None)
    cuda = torch.device("cuda")
    assert backends.choose_backend_of_rows("auto", cuda, torch.bfloat16).name == "native"
    assert backends.choose_backend_of_rows("auto", cuda, torch.float16).name == "eager"
    request = request_of(device=cuda)
    monkeypatch.setattr(backends, "AUTO_ORDER", ("native", "eager"))
    assert backends.choose_backend("auto", request).name == "eager"
    assert backends.pair_backend("auto", cuda) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": torch.device("mps")}, "it runs on the CPU and on CUDA, not on mps"),
        ({"dtype": torch.float16}, "it takes float32 and bfloat16, not float16"),
        ({"weight_dtype": torch.float64}, "it takes float32 and bfloat16, not float64"),
        ({"outputs": EXTRAS[:1], "device": torch.device("cuda")}, "on cuda it computes log-probs only"),
    ],
)
def test_unsupported_requests_give_the_reason(changes, reason):
    assert NATIVE.supports(request_of(**changes)).startswith(reason)


def test_an_unknown_chip_is_an_error():
    with pytest.raises(RuntimeError, match="chip: was 'vax', must be one that this machine has"):
        torch.ops.sdpo_native.use_cpu_chip("vax")


# --- every chip's kernels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients_of_every_chip(chip, dtype):
    @given(cases(dtype))
    def holds(case):
        case.settings["backend"] = "native"
        check(case, case.ours())

    holds()


@pytest.mark.parametrize("stash_bytes", [0, 4 * 67 * 640, ALL])
@pytest.mark.parametrize("trains", [("hidden", "weight", "bias"), ("hidden",), ("weight",)], ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(67, 65, 1537), (6, 2500, 131), (1, 1, 65), (130, 33, 64)], ids=str)
def test_odd_shapes(chip, shape, dtype, trains, stash_bytes):
    options = {"dtype": dtype, "bias": True, "masked": 0.2, "scale": 3.0, "trains": trains, "softcap": 20.0}
    case = native_case(*shape, **options, settings={"stash_bytes": stash_bytes})
    check(case, case.ours())


@pytest.mark.parametrize("scale", [30.0, 100.0])
@pytest.mark.parametrize("stash_bytes", [0, 4 * 40 * 128, ALL])
@pytest.mark.parametrize("trains", [("hidden", "weight", "bias"), ("hidden",)], ids="+".join)
def test_rows_out_of_range_are_recomputed(chip, trains, stash_bytes, scale):
    """Log-probs far below −109 next to ordinary ones; separate, because plain float32 is inaccurate here, too."""
    case = native_case(40, 16, 300, bias=True, scale=scale, trains=trains, settings={"stash_bytes": stash_bytes})
    case.hidden[::3] /= scale  # some rows stay in range
    ours = case.ours()
    assert ours["logps"].min() < -109 < ours["logps"].max()
    check(case, ours)


def test_autocast_from_float32_weights(chip):
    case = native_case(9, 31, 130, bias=True, masked=0.2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = case.ours()
    assert {ours[name].dtype for name in ("d_hidden", "d_weight", "d_bias")} == {torch.float32}
    by_hand = native_case(9, 31, 130, bias=True, masked=0.2)
    by_hand.hidden, by_hand.weight = by_hand.hidden.bfloat16(), by_hand.weight.bfloat16()
    assert torch.equal(ours["logps"], by_hand.ours()["logps"])


# --- bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_rows_log_prob_does_not_depend_on_the_batch_nor_on_what_is_kept(dtype):
    case = native_case(61, 70, 1000, dtype=dtype, scale=4.0)
    whole = case.ours()["logps"]
    for trains, stash in (((), 0), (("hidden", "weight"), ALL), (("hidden", "weight"), 10**5), (("hidden",), 0)):
        case.trains, case.settings["stash_bytes"] = trains, stash
        assert torch.equal(case.ours()["logps"], whole)
    with torch.no_grad():
        for rows in (slice(0, 1), slice(5, 12), slice(60, 61)):
            alone = linear_logps(case.hidden[rows], case.weight, case.targets[rows], backend="native").logps
            assert torch.equal(alone, whole[rows])


@pytest.mark.parametrize("stash_bytes", [0, ALL])
def test_bits_do_not_depend_on_the_number_of_threads(stash_bytes):
    case = native_case(97, 130, 2000, dtype=torch.bfloat16, bias=True, settings={"stash_bytes": stash_bytes})
    before, answers = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5, 8):
            torch.set_num_threads(threads)
            answers.append(case.ours())
    finally:
        torch.set_num_threads(before)
    for answer in answers[1:]:
        assert all(torch.equal(answer[name], answers[0][name]) for name in answer)


# --- precision at scale -----------------------------------------------------------------------------------------


def summed_error(hidden, weight, targets, bias=None) -> tuple[float, float]:
    """The error of the summed log-prob in nats, and the largest one of a token relative to its log-prob."""
    with torch.no_grad():
        ours = linear_logps(hidden, weight, targets, bias=bias, backend="native").logps.double()
    truth = []
    for x, y in zip(hidden.split(64), targets.split(64), strict=True):
        z = x.double() @ weight.double().t()
        truth.append(target_logps(z if bias is None else z + bias.double(), y))
    right = torch.cat(truth)
    return abs(ours.sum() - right.sum()).item(), ((ours - right) / right).abs().max().item()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["a vocabulary of 152k", "bias -60", "log-probs near -100"])
def test_summed_log_probs_of_512_bfloat16_tokens_are_within_a_thousandth_of_a_nat(what):
    n_columns = 151936 if what == "a vocabulary of 152k" else 50257
    case = native_case(512, 256, n_columns, dtype=torch.bfloat16, scale=36.0 if "near" in what else 3.0)
    bias = torch.full((n_columns,), -60.0).bfloat16() if what == "bias -60" else None
    if "near" in what:
        logps = (case.hidden.float() @ case.weight.float().t()).log_softmax(1)
        case.targets = (logps + 100).abs().argmin(1)
    nats, relative = summed_error(case.hidden, case.weight, case.targets, bias)
    assert nats < 1e-3
    assert relative < 1e-6


def ideal(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """dX and dW from float32 logits, with dlogits and both products rounded to bfloat16 once: the best of peers."""
    x, w = case.hidden.float(), case.weight.float()
    dlogits = -(x @ w.t()).softmax(1)
    dlogits[torch.arange(len(x)), case.targets] += 1
    dlogits = (dlogits * case.grad.float().unsqueeze(1)).bfloat16().float()
    return (dlogits @ w).bfloat16(), (dlogits.t() @ x).bfloat16()


@pytest.mark.parametrize("stash_bytes", [0, ALL])
def test_bfloat16_gradients_are_near_those_of_ideal_float32_logits(stash_bytes):
    case = native_case(512, 128, 8000, dtype=torch.bfloat16, scale=3.0, settings={"stash_bytes": stash_bytes})
    truth, ours = case.truth(), case.ours()
    for name, best in zip(("d_hidden", "d_weight"), ideal(case), strict=True):
        distance = (ours[name].double() - truth[name]).norm()
        assert distance <= 1.3 * (best.double() - truth[name]).norm()


# --- size -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_more_logits_than_an_int32_can_count_forward_and_backward():
    """All rows but five are the same row, so six rows are enough for the ground truth."""
    n_rows, n_columns = 36000, 60100
    assert n_rows * n_columns > 2**31
    case = native_case(6, 2, n_columns, dtype=torch.bfloat16, scale=2.0, settings={"stash_bytes": ALL})
    case.targets[-1] = n_columns - 1
    copies = torch.cat([torch.zeros(n_rows - 6, dtype=torch.int64), torch.arange(6)])
    case.grad[0] /= n_rows - 5
    large = Case(case.hidden[copies], case.weight, case.targets[copies], grad=case.grad[copies], settings=case.settings)
    ours = large.ours()
    small = Case(case.hidden, case.weight, case.targets, grad=case.grad * torch.tensor([n_rows - 5, 1, 1, 1, 1, 1]))
    plain, truth = small.plain(), small.truth()
    assert error(ours["logps"][-6:], truth["logps"]) <= 3 * error(plain["logps"], truth["logps"]) + 8 * EPS * 12
    for name, found in (("d_weight", ours["d_weight"]), ("d_hidden", ours["d_hidden"][-5:])):
        right = truth[name] if name == "d_weight" else truth[name][-5:]
        assert error(found, right) <= 2**-7 * right.abs().max().item()


MEMORY = """
import torch
from benchmarks.measure import peak_extra_bytes
from sdpo_kernels import linear_logps
torch.set_num_threads(2)
def step(n, h, v):
    x, w = torch.randn(n, h).bfloat16().requires_grad_(), torch.randn(v, h).bfloat16().requires_grad_()
    y, go = torch.randint(v, (n,)), torch.randn(n)
    return lambda: linear_logps(x, w, y, backend="native", stash_bytes=0).logps.backward(go)
step(8, 8, 100)()
n, h, v = 4096, 128, {columns}
print(peak_extra_bytes(step(n, h, v), torch.device("cpu")) - 2 * h * (n + v))
"""


@pytest.mark.slow
def test_without_a_stash_memory_is_small_and_flat_in_the_vocabulary():
    found = []
    for columns in (16000, 128000):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY.replace("{columns}", str(columns))],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        found.append(int(done.stdout))
    assert max(found) < 160e6
    # allocators vary by half of that; logits would take 9e8 more, and dW in float32 6e7
    assert found[1] < 1.1 * found[0] + 32e6


# --- the pair epilogue ------------------------------------------------------------------------------------------


@given(
    st.sampled_from([("sigmoid", {}), ("sigmoid", {"label_smoothing": 0.3}), ("robust", {"label_smoothing": 0.2}),
                     ("hinge", {}), ("ipo", {})]),
    st.integers(1, 9), st.floats(0.01, 2.0), st.sampled_from([1.0, 30.0, 2000.0]), st.integers(0, 2**31),
)  # fmt: skip
def test_the_pair_epilogue_is_the_losses_own_arithmetic(loss, n_pairs, beta, spread, seed):
    name, options = loss
    generator = torch.Generator().manual_seed(seed)
    policy = (spread * torch.randn(2 * n_pairs, generator=generator)).requires_grad_()
    ref = spread * torch.randn(2 * n_pairs, generator=generator)
    counts = torch.randint(1, 40, (2 * n_pairs,), generator=generator)
    settings = {"beta": beta, "loss_type": name, **options}
    assert epilogue_op.serving_backend("native", policy, n_pairs, name) == "native"
    ours = pair_output(policy, ref, counts, **settings)
    (grad,) = torch.autograd.grad(ours.loss, policy)
    exact = policy.detach().double().requires_grad_()
    truth = pair_output(exact, ref.double(), counts, **settings)
    (right,) = torch.autograd.grad(truth.loss, exact)
    for field in truth._fields:
        mine, wanted = getattr(ours, field).detach(), getattr(truth, field).detach()
        torch.testing.assert_close(mine.double(), wanted, rtol=4 * EPS, atol=4 * EPS * beta)
    torch.testing.assert_close(grad.double(), right, rtol=4 * EPS, atol=1e-30)


@pytest.mark.parametrize("name", ["sigmoid", "hinge"])
def test_the_pair_epilogue_at_a_kink_and_with_nan(name):
    policy = torch.tensor([10.0, torch.nan, 0.0, 0.0], requires_grad=True)  # z = 1 exactly, and NaN
    out = pair_output(policy, torch.zeros(4), torch.ones(4, dtype=torch.int64), beta=0.1, loss_type=name)
    assert out.loss.isnan()
    (grad,) = torch.autograd.grad(out.loss, policy)
    assert grad.isnan().tolist() == [False, True, False, True]
    if name == "hinge":
        assert grad[0] == 0
    torch.library.opcheck(
        epilogue_op._pair_epilogue,
        (
            torch.randn(4, requires_grad=True),
            None,
            None,
            torch.zeros(4),
            torch.ones(4, dtype=torch.int64),
            0,
            0.1,
            0.0,
            "native",
        ),
    )


# --- the library ------------------------------------------------------------------------------------------------


def test_it_holds_no_symbols_of_torchs_unstable_interfaces():
    done = subprocess.run(["nm", "-DCu", str(native_library.LIBRARY)], capture_output=True, text=True, check=True)
    assert "aoti_torch_" in done.stdout
    unstable = [line for line in done.stdout.splitlines() if " at::" in line or " c10::" in line or "Py" in line]
    assert unstable == []


def broken_library(tmp_path, monkeypatch, content: bytes) -> Path:
    library = tmp_path / "_cpu.so"
    library.write_bytes(content)
    monkeypatch.setattr(native_library, "LIBRARY", library)
    return library


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_library_is_an_error_that_says_how_to_rebuild(tmp_path, monkeypatch, share):
    whole = native_library.LIBRARY.read_bytes()
    broken_library(tmp_path, monkeypatch, whole[: int(share * len(whole))])
    with pytest.raises(RuntimeError, match=r"is truncated .* to rebuild it: cd .* python setup.py build_ext --inplace"):
        native_library.load()


def test_a_file_that_is_not_a_library_is_an_error_that_says_how_to_rebuild(tmp_path, monkeypatch):
    broken_library(tmp_path, monkeypatch, b"not a library " * 100)
    with pytest.raises(RuntimeError, match=r"cannot be loaded \(.*\); to rebuild it: "):
        native_library.load()


def test_a_library_of_other_sources_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "csrc").mkdir()
    monkeypatch.setattr(native_library, "SOURCES", tmp_path / "csrc")
    (tmp_path / "csrc" / "kernel.cpp").write_text("// of another project, next to the installed package")
    assert native_library.load() is None
    (tmp_path / "csrc" / "walk.h").write_text("// changed since")
    with pytest.raises(RuntimeError, match=r"was built from other sources .* to rebuild it: "):
        native_library.load()


def test_without_a_library_auto_takes_eager_and_one_that_cannot_be_loaded_raises(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(native_library, "LIBRARY", tmp_path / "_cpu.so")
    monkeypatch.delenv("SDPO_BACKEND", raising=False)
    absent = native.NativeBackend()
    assert "does not exist" in absent.unavailable_reason
    monkeypatch.setitem(backends.BACKENDS, "native", absent)
    backends._warn_once.cache_clear()
    with caplog.at_level("WARNING", logger="sdpo_kernels.backends"):
        assert backends.choose_backend("auto", request_of()).name == "eager"
    assert "python setup.py build_ext --inplace" in caplog.text
    (tmp_path / "_cpu.so").write_bytes(b"")
    monkeypatch.setitem(backends.BACKENDS, "native", native.NativeBackend())
    with pytest.raises(RuntimeError, match=r"backend: native: .* is truncated .* or set SDPO_BACKEND=eager"):
        backends.choose_backend("auto", request_of())


@pytest.mark.slow
def test_without_a_compiler_the_build_continues_with_a_message(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "sdpo_kernels"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = os.environ | {"CXX": "/nonexistent/c++", "CC": "/nonexistent/cc"}
    environment |= {"SDPO_REQUIRE_NATIVE": "0", "SDPO_CUDA": "0"}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", "lib", "--build-temp", "temp"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "other backends will serve there" in done.stderr
    assert not list(tmp_path.glob("lib/**/*.so"))
    required = subprocess.run(
        command, cwd=tmp_path, env=environment | {"SDPO_REQUIRE_NATIVE": "1"}, capture_output=True, text=True
    )
    assert required.returncode != 0


# --- extras -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["one column", "masked columns", "no number", "infinite", "far", "twins"])
def test_extras_of_awkward_logits_are_those_of_the_eager_backend(chip, kind):
    case = native_case(12, 16, 1 if kind == "one column" else 200, bias=True, masked=0.2, outputs=EXTRAS)
    bias = case.bias
    assert bias is not None
    if kind == "masked columns":
        bias[70:] = -torch.inf
        case.targets.clamp_(max=69)
    elif kind == "no number":
        case.hidden[3] = torch.nan
    elif kind == "infinite":
        bias[150] = torch.inf
    elif kind == "far":  # one block's logits dominate, then those of an earlier one
        bias[130] += 150.0
        bias[5] += 300.0
    elif kind == "twins":  # no other logit is above the target's
        case.weight[1::2], bias[1::2] = case.weight[::2].clone(), bias[::2].clone()
    ours = case.ours()
    case.settings["backend"] = "eager"
    for name, expected in case.ours().items():
        if expected is None or expected.dtype == torch.bool:
            assert expected is None or torch.equal(ours[name], expected), name
        elif name in EXTRAS or name == "logps":
            torch.testing.assert_close(ours[name], expected, rtol=2e-6, atol=2e-6, equal_nan=True)
