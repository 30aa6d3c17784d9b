# ruff: noqa: E402
"""The Triton kernels on CPU tensors, in Triton's interpreter. Run by test_triton.py with TRITON_INTERPRET=1 set."""

from __future__ import annotations

import os
from dataclasses import replace

assert os.environ.get("TRITON_INTERPRET") == "1", "run this file through tests/backends/test_triton.py"

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime.interpreter import InterpreterError

from sdpo_kernels import backends, linear_logps, logps_op
from sdpo_kernels.backends import redone
from sdpo_kernels.backends.base import EXTRAS, HeadCall, Keep
from sdpo_kernels.backends.triton import backend as walk
from sdpo_kernels.backends.triton import launch
from sdpo_kernels.backends.triton import tiles as tile_choice
from sdpo_kernels.backends.triton.tiles import INTERPRETED
from sdpo_kernels.head import Head
from tests.backends import interpreter  # noqa: F401 - sets the interpreter up
from tests.backends.epilogue_cases import check_pair_epilogue, pair_cases
from tests.exact import ROWS, check_exact, exact_case
from tests.lora_cases import check_lora
from tests.reference import Case, check, error, random_case, scored_rows
from tests.sliced import Sliced

TRITON = backends.BACKENDS["triton"]
ALL = 10**12
EPS = torch.finfo(torch.float32).eps


def triton_case(*shape: int, **options) -> Case:
    """A random case that the Triton backend must serve."""
    chosen = {"backend": "triton"} | options.pop("settings", {})
    return random_case(*shape, settings=chosen, **options)


def checked(case: Case, function=linear_logps, roundings: int = 8) -> dict:
    """Check values and gradients."""
    ours = case.ours(function)
    if case.hidden.dtype == torch.float32:
        check(case, ours, factor=4.0, slack=roundings)
        return ours
    plain, truth, terms = case.plain(), case.truth(), case.largest_terms()
    for name, right in truth.items():
        if right is None or right.dtype == torch.bool:
            continue
        eps = 2**-7 if name.startswith("d_") else roundings * EPS
        allowed = 4 * error(plain[name], right) + eps * (terms[name] if name in terms else max(1.0, right.abs().max()))
        assert error(ours[name], right) <= allowed, name
    return ours


@st.composite
def cases(draw) -> Case:
    """Any small shape and option."""
    n_rows, width, n_columns = draw(st.integers(1, 20)), draw(st.integers(1, 40)), draw(st.integers(1, 90))
    case = triton_case(
        n_rows, width, n_columns,
        seed=draw(st.integers(0, 2**31)),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        bias=draw(st.booleans()),
        masked=draw(st.sampled_from([0.0, 0.3, 1.0])),
        scale=draw(st.sampled_from([0.1, 1.0, 4.0])),
        temperature=draw(st.sampled_from([1.0, 0.7])),
        logit_scale=draw(st.sampled_from([1.0, -1.5])),
        softcap=draw(st.sampled_from([None, 2.0, 30.0])),
        outputs=tuple(draw(st.sets(st.sampled_from(EXTRAS)))),
        trains=tuple(draw(st.sets(st.sampled_from(["hidden", "weight", "bias"])))),
    )  # fmt: skip
    case.settings["stash_bytes"] = draw(st.sampled_from([0, 4 * n_rows * 64, ALL]))
    case.settings["rows"] = draw(st.sampled_from([None, scored_rows(case.targets)]))
    if "entropy" in case.outputs and draw(st.booleans()):
        case.grad_entropy = torch.randn(n_rows, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return case


@settings(max_examples=60)
@given(cases())
def test_values_and_gradients_of_every_option(case):
    checked(case)


@pytest.mark.parametrize("stash_bytes", [0, 4 * 35 * 64, ALL])
@pytest.mark.parametrize("trains", [("hidden", "weight", "bias"), ("hidden",)], ids="+".join)
@pytest.mark.parametrize("columns", [1, 31, 33, 150])
def test_vocabularies_that_are_no_multiple_of_a_tile(columns, trains, stash_bytes):
    case = triton_case(35, 17, columns, bias=True, trains=trains, settings={"stash_bytes": stash_bytes})
    checked(case)


@pytest.mark.parametrize("stash_bytes", [0, ALL])
@pytest.mark.parametrize("trains", [("hidden", "weight", "bias"), ("hidden",)], ids="+".join)
def test_all_logits_negative(trains, stash_bytes):
    case = triton_case(9, 8, 70, bias=True, trains=trains, settings={"stash_bytes": stash_bytes})
    case.bias -= 40  # padding that counted as a logit of 0 would outweigh all of these
    checked(case)


@pytest.mark.parametrize("stash_bytes", [0, 4 * 20 * 64, ALL])
@pytest.mark.parametrize("trains", [("hidden", "weight", "bias"), ("hidden",)], ids="+".join)
@pytest.mark.parametrize("gap", [100.0, 400.0])
def test_rows_in_and_out_of_range(gap, trains, stash_bytes):
    case = triton_case(20, 12, 150, bias=True, trains=trains, settings={"stash_bytes": stash_bytes})
    case.bias[7] = -gap
    case.targets[::2] = 7
    before = int(redone.counter(case.hidden).total)
    ours = checked(case)
    assert ours["logps"][0] < 12 - gap
    assert int(redone.counter(case.hidden).total) - before == (ours["logps"] < -86.3).sum() >= 10


@pytest.fixture
def larger_tiles(monkeypatch):
    """Tiles for larger cases: still 3 of rows, 8 of columns with a partial one, and 2 of the depth."""
    monkeypatch.setattr(tile_choice, "INTERPRETED", replace(INTERPRETED, rows=32, columns=128, depth=32))


@pytest.mark.usefixtures("larger_tiles")
@pytest.mark.parametrize(("head", "stash_bytes"), [("bias", 0), ("softcap", ALL), ("ignored", 0), ("ignored", ALL)])
def test_gradients_exact_at_the_target(head, stash_bytes):
    """See tests/exact.py."""
    check_exact([exact_case(head, backend="triton", stash_bytes=stash_bytes)], stashed=stash_bytes > 0)


@pytest.mark.usefixtures("larger_tiles")
def test_gradients_exact_at_the_target_in_several_chunks_and_slabs(monkeypatch):
    monkeypatch.setattr(walk, "CHUNK_ELEMENTS", ROWS * 200)
    monkeypatch.setattr(walk, "SLAB_ELEMENTS", 1)
    case = exact_case("plain", backend="triton", stash_bytes=2 * ROWS * 512)
    check_exact([case], stashed=True)


@pytest.mark.parametrize("outputs", [EXTRAS, ("entropy",), ("is_top1",)], ids=str)
def test_extras_of_rows_out_of_range(outputs):
    case = triton_case(10, 12, 100, scale=60.0, outputs=outputs, trains=())
    checked(case)


@pytest.mark.parametrize("gap", [12.0, 25.0, 40.0])
def test_near_certainty_nothing_is_lost(gap):
    logits = torch.tensor([gap, 0.0, -0.5, 0.25, 1.0])
    case = Case(torch.ones(1, 1), logits.unsqueeze(1), torch.tensor([0]), settings={"backend": "triton"})
    ours, z = case.ours(), logits.double()
    rest = torch.sigmoid(z[1:].logsumexp(0) - z[0])
    assert abs(ours["d_weight"][0].item() / rest.item() - 1) <= gap * EPS
    assert abs(-ours["logps"].item() / torch.log1p(rest / (1 - rest)).item() - 1) <= gap * EPS


@pytest.mark.parametrize("trains", [("hidden", "weight"), ("hidden",)], ids="+".join)
@pytest.mark.parametrize(
    "logits",
    [[torch.nan, 0.0, 1.0], [0.0, 1.0, torch.nan], [torch.inf, 0.0, 1.0], [0.0, torch.inf, 1.0]],
    ids=str,
)
def test_nan_where_float64_has_nan(logits, trains):
    case = Case(torch.ones(1, 1), torch.tensor(logits).unsqueeze(1), torch.tensor([0]), trains=trains)
    case.settings = {"backend": "triton"}
    ours = case.ours()
    assert ours["logps"].isnan().all()
    assert ours[f"d_{trains[-1]}"].isnan().all()


def test_a_masked_target_and_masked_columns():
    case = triton_case(6, 5, 60, bias=True, trains=("hidden", "weight"))
    case.bias[[0, 1, 40]] = -torch.inf
    case.targets[:] = torch.tensor([2, 3, 4, 5, 6, 0])
    ours, truth = case.ours(), case.truth()
    assert ours["logps"][5] == -torch.inf
    assert error(ours["logps"][:5], truth["logps"][:5]) <= 8 * EPS * truth["logps"][:5].abs().max()
    assert error(ours["d_weight"], truth["d_weight"]) <= 64 * EPS * truth["d_weight"].abs().max()


@pytest.mark.parametrize("trains", [("hidden", "weight", "bias"), ("hidden",)], ids="+".join)
@pytest.mark.parametrize("stash_bytes", [0, 4 * 13 * 64, ALL])
def test_the_walk_in_several_chunks(monkeypatch, trains, stash_bytes):
    monkeypatch.setattr(walk, "CHUNK_ELEMENTS", 64 * 13)
    checked(triton_case(13, 12, 300, bias=True, trains=trains, settings={"stash_bytes": stash_bytes}))


@pytest.mark.parametrize("stash_bytes", [0, 4 * 13 * 64, ALL])
def test_extras_gathered_from_several_chunks(monkeypatch, stash_bytes):
    monkeypatch.setattr(walk, "PART_ELEMENTS", 4 * 13 * 3)
    checked(triton_case(13, 12, 300, bias=True, outputs=EXTRAS, settings={"stash_bytes": stash_bytes}))


@pytest.mark.parametrize("trains", [("hidden", "weight", "bias"), ("hidden",)], ids="+".join)
def test_strided_bias_and_head(trains):
    case = triton_case(13, 12, 100, bias=True, trains=trains)
    case.bias = torch.stack([case.bias, torch.full_like(case.bias, 9.0)], 1)[:, 0]
    case.weight = case.weight.t().contiguous().t()
    checked(case)
    case.bias = torch.full((1,), 2.0).expand(100)
    case.trains = ("hidden",)
    checked(case)


def test_log_probs_have_the_same_bits_whatever_is_kept():
    case = triton_case(21, 30, 200, scale=3.0)
    found = []
    for trains, stash in (((), 0), (("hidden", "weight"), ALL), (("hidden", "weight"), 6000), (("hidden",), 0)):
        case.trains, case.settings["stash_bytes"] = trains, stash
        found.append(case.ours()["logps"])
    assert all(torch.equal(logps, found[0]) for logps in found[1:])
    with torch.no_grad():
        alone = linear_logps(case.hidden[3:4], case.weight, case.targets[3:4], backend="triton").logps
    assert torch.equal(alone, found[0][3:4])


@pytest.mark.parametrize("stash_bytes", [0, 4 * 20 * 64, ALL])
@pytest.mark.parametrize("trains", [("hidden", "weight", "bias"), ("hidden",), ()], ids="+".join)
def test_policy_and_reference_of_one_head_in_one_launch(monkeypatch, trains, stash_bytes):
    """The bits are those of separate calls; rows of both are out of range."""
    case = triton_case(20, 12, 150, bias=True, trains=trains, masked=0.2, settings={"stash_bytes": stash_bytes})
    case.bias[7] = -160.0
    case.targets[::3] = 7
    ref = triton_case(20, 12, 150, seed=1)
    with torch.no_grad():
        wanted = linear_logps(ref.hidden, case.weight, case.targets, bias=case.bias, backend="triton").logps
    alone = case.ours()
    launches = []
    real = launch.logits
    monkeypatch.setattr(launch, "logits", lambda rows, *args: launches.append(rows.x.shape[0]) or real(rows, *args))
    case.settings["ref_hidden"] = ref.hidden
    both = case.ours()
    assert launches[0] == 2 * int((case.targets >= 0).sum())
    assert torch.equal(both.pop("ref_logps"), wanted)
    assert wanted.min() < -140
    for name, value in alone.items():
        assert value is both[name] or torch.equal(both[name], value), name


def test_autocast_rounds_both_and_gives_the_weight_its_own_dtype():
    case = triton_case(9, 16, 130, masked=0.2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = case.ours()
    by_hand = triton_case(9, 16, 130, masked=0.2)
    by_hand.hidden, by_hand.weight = by_hand.hidden.bfloat16(), by_hand.weight.bfloat16()
    assert error(ours["logps"], by_hand.ours()["logps"]) <= 8 * EPS
    assert ours["d_weight"].dtype == torch.float32


@pytest.mark.parametrize("stash_bytes", [0, 4 * 6 * 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base_trains", [False, True])
def test_a_lora_on_the_head(base_trains, dtype, stash_bytes):
    check_lora("triton", dtype, stash_bytes, base_trains, temperature=0.8)


@pytest.mark.parametrize(
    ("keep", "outputs"),
    [(Keep.nothing(), "entropy"), (Keep.columns(64), ""), (Keep.columns(128), ""), (Keep.direction(), "")],
)
def test_opcheck(keep, outputs):
    case = random_case(5, 4, 100, bias=True)
    frozen = keep.is_direction
    args = (
        case.hidden.requires_grad_(), case.weight.requires_grad_(not frozen), case.targets, case.bias, None,
        1.5, 20.0, 0.8, outputs, torch.float32, "triton", keep.encode(), None, None, 0.0, False,
    )  # fmt: skip
    torch.library.opcheck(logps_op.linear_logps_op, args)


@pytest.mark.parametrize(
    ("targets", "index", "says"),
    [
        ([0, 100, 2], [0, 1, 2], r"targets: must be in \[0, V\)"),
        ([0, -1, 2], [0, 1, 2], r"targets: must be in \[0, V\)"),
        ([0, 1, 2], [3, 5, 5], "rows: its index must be ascending"),
    ],
)
def test_wrong_inputs_are_asserted(targets, index, says):
    """As on CUDA, where the op itself checks nothing."""
    call = HeadCall(
        torch.zeros(3, 8), torch.zeros(100, 8), None, torch.tensor(targets), Head(), torch.float32, (), 3,
        ref_hidden=torch.zeros(3, 8), index=torch.tensor(index),
    )  # fmt: skip
    with pytest.raises(InterpreterError, match=says):
        walk.forward(call, Keep.nothing())
    right = replace(call, targets=torch.tensor([0, 99, 2]), index=torch.tensor([3, 5, 6]))
    walk.forward(right, Keep.nothing())
    walk.forward(replace(right, index=torch.tensor([[3, 9], [5, 1], [6, 0]])[:, 0]), Keep.nothing())


@settings(max_examples=25)
@given(pair_cases(st.sampled_from([1, 2, 3, 6, 70])))  # 70 take two rounds
def test_the_pair_epilogue(case):
    check_pair_epilogue("triton", **case)


def test_autotuning_takes_the_fastest_tile_once_and_the_answers_stay_right(monkeypatch):
    """With a fake clock: a later tile is the fastest, another one cannot run."""
    tiles = [replace(INTERPRETED, rows=rows) for rows in (16, 32, 8)]
    monkeypatch.setenv("SDPO_AUTOTUNE", "1")
    monkeypatch.setattr(launch, "candidates", lambda picked: tiles)
    measured = []

    def clock(call):
        call()
        measured.append(len(measured))
        if len(measured) == 1:
            raise RuntimeError("out of resource")
        return 1.0 / len(measured)

    monkeypatch.setattr(launch.triton.testing, "do_bench", clock)
    case = triton_case(40, 24, 100, dtype=torch.bfloat16)
    checked(case)
    assert len(measured) == 3  # forward and backward have the same shape: timed once
    assert tile_choice._FASTEST[next(reversed(tile_choice._FASTEST))] == tiles[2]
    monkeypatch.setattr(launch.triton.testing, "do_bench", lambda call: 1 / 0)
    with pytest.raises(RuntimeError, match=r"SDPO_AUTOTUNE: no tile could be run: .*division by zero"):
        triton_case(70, 24, 100, dtype=torch.bfloat16).ours()


@pytest.mark.parametrize(
    ("softcap", "pieces", "stash_bytes"),
    [(None, 2, ALL), (None, 4, 4 * 35 * 64), (5.0, 2, 0), (5.0, 8, ALL)],
)
def test_pieces_of_a_tile(softcap, pieces, stash_bytes, monkeypatch):
    """Targets, padding, bias and the stash's border may be in any of the pieces."""
    monkeypatch.setattr(tile_choice, "INTERPRETED", replace(INTERPRETED, pieces=pieces))
    for outputs, trains in ((EXTRAS, ()), ((), ("hidden", "weight", "bias"))):
        case = triton_case(35, 17, 150, bias=True, softcap=softcap, outputs=outputs, trains=trains)
        case.settings["stash_bytes"] = stash_bytes
        checked(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trains", [("hidden", "weight"), ("hidden",)], ids="+".join)
def test_rows_wider_than_the_blocks_of_the_small_kernels(trains, dtype):
    """Target logits, factors, r ⊙ X and the last steps of dX take 1024 columns of H at a time."""
    checked(triton_case(5, 1030, 40, dtype=dtype, trains=trains, masked=0.3, scale=0.1))


@settings(max_examples=30)
@given(cases(), st.sets(st.integers(1, 89), max_size=3))
def test_slices_of_the_vocabulary(case, borders):
    """Any cut of the columns gives the values and gradients of the whole."""
    case.settings = {"backend": "triton", "stash_bytes": int(case.settings["stash_bytes"] != 0)}
    starts = [0, *sorted(border for border in borders if border < len(case.weight))]
    checked(case, Sliced(starts), roundings=16)


@pytest.mark.parametrize("outputs", [(), EXTRAS], ids=["logps", "extras"])
@pytest.mark.parametrize("stash_bytes", [0, 1])
def test_slices_with_rows_out_of_range(stash_bytes, outputs):
    case = triton_case(6, 8, 90, scale=80.0, bias=True, outputs=outputs, settings={"stash_bytes": stash_bytes})
    assert case.plain()["logps"].min() < -100
    cut = case.ours(Sliced([0, 40, 64]))
    if stash_bytes:
        check(case, cut, factor=4.0, slack=8.0)

    # without a stash, a row's sum and its S come from products in different orders: 2e-5 of logits of 300
    case.settings["stash_bytes"] = ALL * stash_bytes
    truth, whole = case.truth(), case.ours()
    for name, right in truth.items():
        if right is None or right.dtype == torch.bool:
            assert right is None or torch.equal(cut[name], whole[name])
            continue
        slack = 8 * EPS * max(1.0, right.abs().max().item())
        assert error(cut[name], right) <= 1.25 * error(whole[name], right) + slack, name


@pytest.mark.parametrize("stash_bytes", [0, 1])
def test_gradients_if_a_slice_is_minus_infinity_with_its_targets_out_of_range(stash_bytes):
    case = triton_case(3, 8, 90, bias=True, settings={"stash_bytes": ALL * stash_bytes})
    case.bias -= 300
    case.bias[32:64] = -torch.inf
    case.targets[0] = 40
    whole = case.ours()
    assert whole["logps"][0] == -torch.inf
    for name, cut in case.ours(Sliced([0, 32, 64])).items():
        torch.testing.assert_close(cut, whole[name], rtol=1e-5, atol=1e-4)
