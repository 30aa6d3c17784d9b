"""linear_logps within a session: autocast, matmul settings, torch.compile, memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sdpo_kernels import LinearLogps, linear_logps, logps_op
from sdpo_kernels.backends import precision
from sdpo_kernels.backends.base import EXTRAS, Keep
from sdpo_kernels.rows import IGNORE_INDEX
from tests.reference import allocations, check, chunk_columns, error, random_case, scored_rows, skip_unless_served

pytestmark = pytest.mark.usefixtures("each_backend")
ALL = 10**12  # stash_bytes that holds everything


def test_no_tensor_of_all_logits_and_flat_memory(tmp_path):
    n_rows, width = 1024, 4
    peaks = []
    for n_columns in (32768, 65536):
        case = random_case(n_rows, width, n_columns, masked=0.1, settings={"stash_bytes": 0})
        case.ours()  # torch's one-time initialisation
        with allocations(tmp_path / "trace.json") as found:
            case.ours()
        assert found["largest"] < 2 * n_rows * n_columns  # the size of bfloat16 logits
        peaks.append(found["peak"] - 2 * 4 * width * n_columns)  # less the copy of the weight and its gradient
    assert peaks[1] < 1.05 * peaks[0]


def test_the_stash_stays_within_its_budget(tmp_path):
    n_rows, n_columns = 256, 65536
    peaks = {}
    for budget in (0, 8_000_000, 40_000_000):
        case = random_case(n_rows, 4, n_columns, settings={"stash_bytes": budget})
        with chunk_columns(512), allocations(tmp_path / "trace.json") as found:
            case.ours()
        peaks[budget] = found["peak"]
    for budget in (8_000_000, 40_000_000):
        assert 0.9 * budget < peaks[budget] - peaks[0] <= budget


# --- the session's settings -------------------------------------------------------------------------------------


def test_autocast_equals_casting_by_hand():
    case = random_case(9, 16, 130, masked=0.2, bias=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        auto = case.ours()
    rounded = dataclasses.replace(case, hidden=case.hidden.bfloat16(), weight=case.weight.bfloat16())
    by_hand = rounded.ours()
    assert torch.equal(auto["logps"], by_hand["logps"])
    assert auto["d_weight"].dtype == torch.float32
    assert torch.equal(auto["d_weight"].bfloat16(), by_hand["d_weight"])
    assert not torch.equal(auto["d_weight"].bfloat16().float(), auto["d_weight"])  # it was not rounded in between
    assert auto["d_hidden"].dtype == torch.float32
    assert torch.equal(auto["d_hidden"].bfloat16(), by_hand["d_hidden"])
    assert torch.equal(auto["d_bias"], by_hand["d_bias"])


def test_autocast_with_a_bfloat16_body_and_a_float32_head():
    case = random_case(9, 16, 130)
    mixed = dataclasses.replace(case, hidden=case.hidden.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = mixed.ours()
        full = case.ours()
    assert torch.equal(ours["logps"], full["logps"])
    assert torch.equal(ours["d_weight"], full["d_weight"])
    assert torch.equal(ours["d_hidden"], full["d_hidden"].bfloat16())


def test_autocast_with_a_float16_body():
    case = random_case(9, 16, 130)
    mixed = dataclasses.replace(case, hidden=case.hidden.half())
    rounded = dataclasses.replace(case, hidden=case.hidden.half().bfloat16(), weight=case.weight.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = mixed.ours()
    by_hand = rounded.ours()
    assert torch.equal(ours["logps"], by_hand["logps"])
    assert ours["d_hidden"].dtype == torch.float16
    assert error(ours["d_hidden"], by_hand["d_hidden"]) <= 2**-8 * by_hand["d_hidden"].abs().max()


def test_autocast_leaves_float64_alone(each_backend):
    skip_unless_served(each_backend, torch.float64)
    case = random_case(5, 6, 40, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = case.ours()
    assert ours["logps"].dtype == torch.float64
    check(case, ours)


def test_the_sessions_matmul_precision_changes_nothing_and_is_not_changed():
    case = random_case(64, 256, 300)
    before = case.ours()
    old = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with_medium = case.ours()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(old)
    assert all(torch.equal(before[name], with_medium[name]) for name in ("logps", "d_hidden", "d_weight"))


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_the_newer_precision_setting(precision):
    case = random_case(64, 256, 300)
    before = case.ours()
    setting = torch.backends.mkldnn.matmul
    old = setting.fp32_precision
    try:
        setting.fp32_precision = precision
        after = case.ours()
        assert setting.fp32_precision == precision
    finally:
        setting.fp32_precision = old
    assert all(torch.equal(before[name], after[name]) for name in ("logps", "d_hidden", "d_weight"))


@pytest.mark.parametrize("older", ["highest", "high", "medium"])
def test_inside_full_precision_older_and_newer_settings_agree(older):
    """TunableOp reads `allow_tf32`, which raises if they do not."""
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul

    def settings():
        return torch.get_float32_matmul_precision(), cuda.allow_tf32, cuda.fp32_precision, cpu.fp32_precision

    old = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(older)
        before = settings()
        for device in ("cpu", "cuda"):
            with precision.full(torch.device(device)), precision.full(torch.device("cpu")):
                both, allow_tf32, *newer = settings()
                assert (both, allow_tf32) == ("highest", False)
                assert set(newer) <= {"ieee", "none"}
            assert settings() == before
    finally:
        torch.set_float32_matmul_precision(old)


def test_full_precision_that_cannot_begin_leaves_nothing_behind(monkeypatch):
    class Refusing:
        fp32_precision = property(lambda self: "tf32", lambda self, value: (_ for _ in ()).throw(RuntimeError("no")))

    with monkeypatch.context() as patch:
        real = precision._matmuls()
        patch.setattr(precision, "_matmuls", lambda: (real[0], Refusing()))
        with pytest.raises(RuntimeError, match="no"), precision.full(torch.device("cpu")):
            pass
    assert (precision._inside, precision._before) == (0, None)
    with precision.full(torch.device("cpu")):
        assert precision._inside == 1


# --- custom op and compiler -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["rows found", "rows given"])
@pytest.mark.parametrize(
    ("keep", "outputs", "trains"),  # hidden, weight, bias and lora_b
    [
        (Keep.nothing(), ",".join(EXTRAS), (True, True, True, False)),
        (Keep.columns(64), "", (True, True, False, True)),
        (Keep.columns(64), "", (True, False, True, True)),
        (Keep.columns(192), "", (False, True, True, False)),
        (Keep.columns(64, 0.1), "", (True, True, True, False)),
        (Keep.columns(64, 0.1, True), "", (True, True, True, False)),
        (Keep.direction(), "", (True, False, False, False)),
    ],
)
def test_opcheck(keep, outputs, trains, given, dtype, each_backend):
    outputs = outputs if each_backend == "eager" else ""
    case = random_case(5, 4, 130, bias=True, dtype=dtype)
    case.targets[2] = IGNORE_INDEX
    index = scored_rows(case.targets).index if given else None
    lora_b = case.weight[:, 2:].contiguous() if trains[3] else None
    weight = case.weight if lora_b is None else case.weight[:, :2].contiguous()
    tensors = (case.hidden, weight, case.bias, lora_b)
    hidden, weight, bias, lora_b = (
        None if t is None else t.requires_grad_(wanted) for t, wanted in zip(tensors, trains, strict=True)
    )
    settings = (1.5, 20.0, 0.8)
    args = (
        hidden,
        weight,
        case.targets,
        bias,
        index,
        *settings,
        outputs,
        dtype,
        each_backend,
        keep.encode(),
        case.hidden.detach() if given else None,
        lora_b,
        keep.grad_tol,
        keep.grad_tol_relative,
    )
    torch.library.opcheck(logps_op.linear_logps_op, args)
    with torch.no_grad():
        logps, state, entropy, *_, kept, _, tiles = logps_op.linear_logps_op(*args)
        grad_entropy = torch.ones(5) if "entropy" in outputs else None
        backward = (
            torch.ones(5), grad_entropy, hidden, weight, case.targets, bias, index, logps, state, entropy, kept,
            lora_b, tiles, *settings, dtype, each_backend, keep.encode(), keep.grad_tol, list(trains),
        )  # fmt: skip
        torch.library.opcheck(logps_op.linear_logps_backward_op, backward)


@pytest.mark.parametrize("given", [False, True], ids=["rows found", "rows given"])
def test_compile_without_a_graph_break(given):
    torch._dynamo.reset()
    case = random_case(7, 5, 90, masked=0.3, bias=True, outputs=EXTRAS, softcap=9.0, grad_entropy=torch.ones(7))
    case.settings = {"rows": scored_rows(case.targets) if given else None, "stash_bytes": ALL}

    def function(hidden, weight, targets, **options):
        out = linear_logps(hidden * 2, weight, targets, **options)
        return LinearLogps(out.logps * 3, *out[1:])  # torch 2.11 cannot compile `return out._replace(...)`

    compiled = case.ours(torch.compile(function, fullgraph=True, backend="aot_eager"))
    for name, value in case.ours(function).items():
        assert torch.equal(compiled[name], value), name


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("option", ["logit_scale", "softcap", "temperature"])
def test_compile_with_numbers_that_change(option, dynamic):
    """A number that changes becomes a symbol, as all are with dynamic=True."""
    torch._dynamo.reset()
    compiled = torch.compile(linear_logps, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for number in (1.0, 0.7, 0.5):
        case = random_case(7, 5, 90, **{option: number})
        found, wanted = case.ours(compiled), case.ours()
        for name, value in wanted.items():
            assert value is None or torch.equal(found[name], value), (name, number)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_with_strided_tensors(backend):
    """A head stored [H, V], as Conv1D does, and hidden states stored [H, N]."""
    torch._dynamo.reset()
    case = random_case(7, 5, 90)
    hidden = case.hidden.t().contiguous().requires_grad_()
    weight = case.weight.t().contiguous().requires_grad_()

    def loss(hidden, weight):
        return linear_logps(hidden.t(), weight.t(), case.targets).logps.sum()

    wanted = torch.autograd.grad(loss(hidden, weight), [hidden, weight])
    found = torch.autograd.grad(torch.compile(loss, backend=backend)(hidden, weight), [hidden, weight])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("frozen", [False, True])
def test_compile_with_nothing_scored(frozen):
    torch._dynamo.reset()
    case = random_case(7, 5, 90, masked=1.0, trains=("hidden",) if frozen else ("hidden", "weight"))
    found = case.ours(torch.compile(linear_logps, backend="aot_eager"))
    assert not any(value.any() for value in found.values() if value is not None)


def test_hidden_states_of_width_0():
    """All logits are the bias, whatever memory held before."""
    linear_logps(torch.randn(64, 64), torch.randn(300, 64), torch.zeros(64, dtype=torch.int64))
    found = linear_logps(torch.zeros(3, 0), torch.zeros(100, 0), torch.tensor([0, 5, 99])).logps
    assert torch.equal(found, torch.full((3,), -4.605170186))
