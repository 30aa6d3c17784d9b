"""A head sharded over two ranks against the whole one in this process."""

from __future__ import annotations

import multiprocessing
import os
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from sdpo_kernels import collectives, linear_logps, sharded
from sdpo_kernels.backends import BACKENDS
from sdpo_kernels.integrations.lm_head import LMHead
from sdpo_kernels.integrations.sharded_head import sharded_head_logps
from sdpo_kernels.rows import ScoredRows
from sdpo_kernels.sharded import sharded_linear_logps
from tests.exact import HIDDEN, TARGETS, exact_cases, multiples, root_mean_square, rounded
from tests.reference import Case, check

pytestmark = pytest.mark.xdist_group("sharded head")
H, V = 16, 65
LAYOUT = {"shards": (37, 28), "rows": ((0, 9), (9, 20))}  # each rank's part of the head and of the batch
EXTRAS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
CASES = {  # dtype, options, whether the head trains
    "plain": (torch.float32, {}, True),
    "options": (torch.float32, {"softcap": 3.0, "logit_scale": 1.5, "temperature": 0.7}, True),
    "float64": (torch.float64, {}, True),
    "bfloat16": (torch.bfloat16, {}, True),
    "without a stash": (torch.bfloat16, {"stash_bytes": 0}, True),
    "some of it stashed": (torch.float32, {"stash_bytes": 3 * 64 * 4 * 11}, True),
    "out of range": (torch.float32, {"logit_scale": 8.0}, True),
    "frozen": (torch.float32, {}, False),
    "extras": (torch.float32, {"outputs": EXTRAS}, True),
    "bias": (torch.float32, {"bias": True}, True),
    "nothing here": (torch.float32, {"bias": True, "shards": (V, 0), "rows": ((0, 0), (0, 20))}, True),
}
BF16 = (torch.bfloat16, rounded)
SENDERS = ("all_to_all_single", "broadcast", "reduce")
NOT_ARGUMENTS = ("bias", *LAYOUT)


def problem(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(20, H, generator=generator).to(dtype)
    weight = torch.randn(V, H, generator=generator).to(dtype)
    targets = torch.randint(V, (20,), generator=generator)
    targets[::4] = -100
    return hidden, weight, targets, torch.randn(20, generator=generator)


def bias_of(options: dict, dtype: torch.dtype):
    return torch.linspace(-2, 2, V).to(dtype) if options.get("bias") else None


def loss_of(out, coefficient):
    """Reaches every output that has a gradient."""
    loss = (out.logps.double() * coefficient).sum()
    return loss if out.entropy is None else loss + (out.entropy.double() * coefficient.flip(0)).sum()


def one_process(rank: int, folder: Path) -> None:
    """A rank's part of every case; writes its results to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    sent, results = [], {}
    broadcast, gather = dist.broadcast, collectives.all_gather
    dist.broadcast = lambda t, **kw: (sent.append(t.numel()), broadcast(t, **kw))[1]
    collectives.all_gather = lambda t, *more, **kw: (sent.append(t.numel()), gather(t, *more, **kw))[1]
    for name, (dtype, options, trains) in CASES.items():
        hidden, weight, targets, coefficient = problem(dtype)
        layout = LAYOUT | options
        own = slice(*layout["rows"][rank])
        x = hidden[own].clone().requires_grad_()
        shard = weight.split(layout["shards"])[rank].clone().requires_grad_(trains)
        bias = bias_of(options, dtype)
        bias = None if bias is None else bias.split(layout["shards"])[rank].clone().requires_grad_()
        given = {key: value for key, value in options.items() if key not in NOT_ARGUMENTS}
        out = sharded_linear_logps(x, shard, targets[own], bias_shard=bias, chunk_columns=10, **given)
        loss_of(out, coefficient[own]).backward()
        values = [value.detach() for value in out if value is not None]
        results[name] = (values, x.grad, shard.grad, None if bias is None else bias.grad)
    results["largest"] = max(sent)
    results["errors"] = [refusal(targets=torch.full((2,), 80)), refusal(outputs=("perplexity",))]
    results["errors"].append(refusal(shard_rows=[60, 20]))
    results["errors"].append(refusal(rows=ScoredRows(torch.tensor([1, 1]), torch.zeros(2).long(), torch.tensor([2]))))
    results["poisoned"] = of_poisoned(rank)
    results["collectives"] = collectives_of(rank)
    results["exact"] = of_exact_cases(rank)
    results["fsdp"] = of_fsdp(rank)
    results["in bfloat16"] = in_bfloat16(rank)
    results["autocast"] = under_autocast(rank)
    results["alive"] = chunks_alive(rank)
    results["whole blocks"] = of_whole_blocks(rank)
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    # torch's threads may abort an interpreter that shuts down (seen once in CI); an exception above still fails
    os._exit(0)


def refusal(**changes) -> str:
    """The error of a call with these arguments."""
    given = {
        "hidden": torch.zeros(2, H),
        "weight_shard": torch.zeros(40, H),
        "targets": torch.zeros(2).long(),
    } | changes
    given["targets"][0] = -100
    try:
        sharded_linear_logps(**given)
    except ValueError as error:
        return str(error)
    return "nothing"


def of_fsdp(rank: int):
    """The case "bias" with a head sharded by FSDP2, in three micro-batches of an accumulated step."""
    hidden, weight, targets, coefficient = problem(torch.float32)
    linear = nn.Linear(H, V)
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias_of({"bias": True}, torch.float32))
    fully_shard(linear)
    head = LMHead(body=linear, module=linear)
    assert head.is_cut
    values, gradients = [], []
    for own in torch.arange(*LAYOUT["rows"][rank]).tensor_split(3):
        x = hidden[own].clone().requires_grad_()
        out = sharded_head_logps(head, x, targets[own])
        loss_of(out, coefficient[own]).backward()
        values.append(out.logps.detach())
        gradients.append(x.grad)
    of_head = [parameter.grad.full_tensor() for parameter in (linear.weight, linear.bias)]
    return torch.cat(values), torch.cat(gradients), *of_head


def blocks_problem():
    generator = torch.Generator().manual_seed(4)
    hidden, weight = (torch.randn(n, 32, generator=generator).bfloat16() for n in (40, 512))
    return hidden, weight, torch.randint(512, (40,), generator=generator)


def in_bfloat16(rank: int):
    """What the ranks add up for the bias of a bfloat16 head, and the error of a backward with create_graph."""
    hidden, weight, targets, coefficient = problem(torch.bfloat16)
    own = slice(*LAYOUT["rows"][rank])
    shard, bias = (t.split(LAYOUT["shards"])[rank].clone() for t in (weight, bias_of({"bias": True}, torch.bfloat16)))
    added, add_up = [], sharded._Call.add_up
    sharded._Call.add_up = lambda call, part, *more: (added.append(part.clone()), add_up(call, part, *more))[1]
    out = sharded_linear_logps(hidden[own], shard, targets[own], bias_shard=bias.requires_grad_())
    loss_of(out, coefficient[own]).backward(retain_graph=True)
    sharded._Call.add_up = add_up
    with pytest.raises(RuntimeError) as caught:
        torch.autograd.grad(out.logps.sum(), bias, create_graph=True)
    return torch.cat(added), str(caught.value)


def chunks_alive(rank: int) -> int:
    """The most chunks of the head that are in memory at one time, in a forward and a backward over seven of them."""
    hidden, weight, targets, _ = problem(torch.float32)
    alone = [dist.new_group([each]) for each in (0, 1)][rank]
    given, most, gather = [], 0, collectives.all_gather

    # in place of gloo, whose threads let go of a tensor some time after they have filled it
    def filled(whole: torch.Tensor, part: torch.Tensor, *more, **kw):
        nonlocal most
        given.append(weakref.ref(whole))
        most = max(most, sum(one() is not None for one in given))
        whole.copy_(part)
        return SimpleNamespace(wait=lambda: None)

    collectives.all_gather = filled
    head = weight[:64].clone().requires_grad_()
    out = sharded_linear_logps(hidden.requires_grad_(), head, targets % 64, group=alone, chunk_columns=10)
    out.logps.sum().backward()
    collectives.all_gather = gather
    assert len(given) == 14
    return most


def under_autocast(rank: int):
    """Log-probs of a float32 head in bfloat16, and the dtypes that are sent for its targets' logits."""
    hidden, weight, targets, _ = problem(torch.float32)
    own, sent, exchange = slice(*LAYOUT["rows"][rank]), [], dist.all_to_all_single
    dist.all_to_all_single = lambda out, *more, **kw: (sent.append(str(out.dtype)), exchange(out, *more, **kw))[1]
    with torch.autocast("cpu", torch.bfloat16):
        out = sharded_linear_logps(hidden[own], weight.split(LAYOUT["shards"])[rank], targets[own], chunk_columns=10)
    dist.all_to_all_single = exchange
    return out.logps, sent


def poisoned():
    """Rows whose hidden states are not numbers, and whose log-probs count for nothing."""
    hidden, weight, targets, coefficient = problem(torch.float32)
    hidden[2], hidden[13, 4] = torch.nan, torch.inf
    coefficient[[2, 13]] = 0
    return hidden, weight, targets, coefficient


def of_poisoned(rank: int):
    """Gradients with a stash and without."""
    found = []
    for stash_bytes in ("auto", 0):
        hidden, weight, targets, coefficient = poisoned()
        own = slice(*LAYOUT["rows"][rank])
        x, w = hidden[own].clone().requires_grad_(), weight.split(LAYOUT["shards"])[rank].clone().requires_grad_()
        out = sharded_linear_logps(x, w, targets[own], chunk_columns=10, stash_bytes=stash_bytes)
        out.logps.backward(coefficient[own])
        found.append((x.grad, w.grad))
    return found


def of_exact_cases(rank: int):
    """dX and dW of the cases of `tests/exact.py`, half of the rows and about half of the head on each rank."""
    found = []
    for case in exact_cases():
        own, grad = slice(48 * rank, 48 * rank + 48), case.grad[48 * rank : 48 * rank + 48]
        x, w = case.hidden[own].clone().requires_grad_(), case.weight.split(512)[rank].clone().requires_grad_()
        bias = None if case.bias is None else case.bias.split(512)[rank]
        out = sharded_linear_logps(x, w, case.targets[own], bias_shard=bias, **case.head)
        out.logps.backward(grad.float())
        found.append((x.grad, w.grad))
    return found


def collectives_of(rank: int):
    """How often a forward and a backward call each collective, for a head with a bias."""
    found = {}
    for name, of_hidden, of_head in (("frozen head", True, False), ("head alone", False, True)):
        hidden, weight, targets, _ = problem(torch.float32)
        own, count = slice(*LAYOUT["rows"][rank]), Counter()
        shards = [t.split(LAYOUT["shards"])[rank].clone() for t in (weight, bias_of({"bias": True}, torch.float32))]
        shard, bias = (t.requires_grad_(of_head) for t in shards)
        with pytest.MonkeyPatch.context() as patch:
            for module, names in ((collectives, ("all_gather", "reduce_scatter")), (dist, SENDERS)):
                for each in names:
                    patch.setattr(module, each, counted(count, each, getattr(module, each)))
            x = hidden[own].clone().requires_grad_(of_hidden)
            out = sharded_linear_logps(
                x, shard, targets[own], bias_shard=bias, chunk_columns=10, shard_rows=LAYOUT["shards"]
            )
            out.logps.sum().backward()
        found[name] = dict(count)
    return found


def counted(count, name, real):
    def call(*args, **kwargs):
        count[name] += 1
        return real(*args, **kwargs)

    return call


def of_whole_blocks(rank: int):
    """Shards and chunks of whole blocks of 64 columns."""
    hidden, weight, targets = blocks_problem()
    own = slice(20 * rank, 20 * rank + 20)
    return sharded_linear_logps(hidden[own], weight.split(256)[rank], targets[own], chunk_columns=256).logps


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=one_process, args=(rank, folder)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_whole_head(results, name):
    case = whole_case(name)
    check(case, joined(case, [r[name] for r in results]), slack=256 if case.hidden.dtype == torch.float64 else 4)


def whole_case(name: str) -> Case:
    """The case as one process has it."""
    dtype, options, trains = CASES[name]
    hidden, weight, targets, coefficient = problem(dtype)
    rows = (LAYOUT | options)["rows"]
    head = {key: options[key] for key in ("softcap", "logit_scale", "temperature", "outputs") if key in options}
    case = Case(hidden, weight, targets, bias_of(options, dtype), grad=coefficient.double(), **head)
    case.trains = ("hidden", "weight", "bias") if trains else ("hidden",)
    if "entropy" in case.outputs:  # as in `loss_of`
        case.grad_entropy = torch.cat([coefficient[slice(*own)].flip(0) for own in rows]).double()
    return case


def joined(case: Case, parts: list) -> dict:
    """The ranks' results as those of one process."""
    values = [torch.cat(each) for each in zip(*(part[0] for part in parts), strict=True)]
    names = [f"d_{name}" for name in ("hidden", "weight", "bias") if name != "bias" or case.bias is not None]
    gradients = [[part[1 + place] for part in parts] for place in range(len(names))]
    whole = [None if None in each else torch.cat(each) for each in gradients]
    return dict(zip(["logps", *case.outputs, *names], [*values, *whole], strict=True))


@pytest.mark.skipif(BACKENDS["native"].unavailable_reason is not None, reason="eager's sums depend on its chunks")
def test_log_probs_are_bit_for_bit_those_of_the_whole_head(results):
    whole = linear_logps(*blocks_problem()).logps
    assert torch.equal(torch.cat([r["whole blocks"] for r in results]), whole)


def test_what_is_stashed() -> None:
    """Whole chunks in their order, as long as they fit."""
    plan = sharded._plan((37, 28), 10)
    equal = [sharded._Chunk(first, 5, None) for first in (0, 5, 10, 15, 20)]
    assert plan == [*equal, sharded._Chunk(25, 3, None), sharded._Chunk(28, 9, 0)]
    options = (torch.float32, None, (37, 28), plan, ())
    call = sharded._Call(BACKENDS["eager"], sharded.Head(), *options, budget=3 * 64 * 4 * 11)
    device = torch.device("cpu")
    assert [keep.n_columns for keep in call.keeps(11, device)] == [64, 64, 64, 0, 0, 0, 0]
    assert [keep.n_columns for keep in call.keeps(0, device)] == [0] * 7


def test_at_most_a_chunk_is_broadcast_at_a_time(results):
    assert [r["largest"] for r in results] == [10 * H, 10 * H]


def test_the_gradient_of_a_bfloat16_bias_is_rounded_after_its_sum(results):
    for added, _ in (r["in bfloat16"] for r in results):
        assert added.dtype == torch.float32
        assert not torch.equal(added, added.bfloat16().float())


def test_a_second_derivative_is_an_error(results):
    expected = "create_graph: was True, must be False: a head in slices has no second derivative"
    assert [r["in bfloat16"][1] for r in results] == [expected] * 2


def test_under_autocast_the_targets_rows_are_sent_in_its_dtype(results):
    hidden, weight, targets, _ = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        whole = linear_logps(hidden, weight, targets).logps
    torch.testing.assert_close(torch.cat([r["autocast"][0] for r in results]), whole, rtol=1e-6, atol=1e-6)
    assert [r["autocast"][1] for r in results] == [["torch.int64", "torch.int64", "torch.bfloat16"]] * 2


def test_two_chunks_of_the_head_are_in_memory_at_a_time(results):
    assert [r["alive"] for r in results] == [2, 2]


def test_mismatched_arguments_are_errors(results):
    for target, output, sizes, rows in (r["errors"] for r in results):
        assert rows.startswith("rows: its index was not ascending, must hold each scored row once")
        assert sizes.startswith("shard_rows: was [60, 20], must be a number of rows for each of 2 ranks, 40 for this")
        assert target.startswith("targets: was 80, must be in [0, 80)")
        assert output.startswith("outputs: was ('perplexity',), must be a sequence of names from")


def test_a_head_sharded_by_fsdp_averages_its_gradients(results):
    case = whole_case("bias")
    ours = [([r["fsdp"][0]], r["fsdp"][1], None, None) for r in results]
    found = joined(case, ours)
    for r in results:
        check(case, found | {"d_weight": 2 * r["fsdp"][2], "d_bias": 2 * r["fsdp"][3]})


def test_rows_that_count_for_nothing_may_be_nan(results):
    hidden, weight, targets, coefficient = poisoned()
    x, w = hidden.requires_grad_(), weight.requires_grad_()
    linear_logps(x, w, targets).logps.backward(coefficient)
    assert bool(w.grad.isfinite().all())
    for parts in zip(*(r["poisoned"] for r in results), strict=True):
        for found, truth in zip(zip(*parts, strict=True), (x.grad, w.grad), strict=True):
            torch.testing.assert_close(torch.cat(found), truth, rtol=1e-5, atol=1e-5)


def test_what_is_sent_for_each_gradient(results):
    """Every chunk in both passes, and what belongs to dW where the head trains; targets' rows once."""
    # chunks of both ranks, and those of the longer shard's end
    passes, both, ends = 2, 6, 1
    walk = {"all_to_all_single": 4, "all_gather": passes * both * 2, "broadcast": passes * ends * 2}
    for r in results:
        assert r["collectives"]["frozen head"] == walk
        assert r["collectives"]["head alone"] == walk | {"reduce_scatter": both * 2, "reduce": ends * 2}


def test_bfloat16_gradients_are_rounded_once(results):
    """dW is summed over the ranks before it is rounded: the error of one rounding, as without ranks."""
    found = [
        multiples(
            case, {"d_hidden": torch.cat([x for x, _ in parts]), "d_weight": torch.cat([w for _, w in parts])}, *BF16
        )
        for case, *parts in zip(exact_cases(), *(r["exact"] for r in results), strict=True)
    ]
    assert all(one.hidden <= HIDDEN for one in found), found
    assert root_mean_square(one.targets for one in found) <= TARGETS


def test_a_targets_owner_may_be_followed_by_ranks_without_rows():
    targets = sharded._Targets.of(torch.tensor([0, 2, 3, 6]), (0, 3, 0, 4, 0))
    assert targets.owner.tolist() == [1, 1, 3, 3]
    assert targets.row.tolist() == [0, 2, 0, 3]
