"""A head whose rows are divided over one, two and four processes against the whole one in this process."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sdpo_kernels import collectives, fused_linear_dpo, linear_logps
from sdpo_kernels.backends import BACKENDS
from sdpo_kernels.backends.base import EXTRAS
from sdpo_kernels.vocab_parallel import vocab_parallel_linear_logps
from tests.exact import HIDDEN, TARGETS, exact_cases, multiples, root_mean_square, rounded
from tests.reference import Case, check, random_case

pytestmark = pytest.mark.xdist_group("vocab parallel")
SLICES = {1: (1000,), 2: (512, 488), 4: (256, 256, 256, 232)}
UNEVEN = {1: (3,), 2: (3, 0), 4: (2, 0, 1, 0)}  # fewer rows of the head than ranks
NATIVE = BACKENDS["native"].unavailable_reason is None
LORA = 4
EXACT = (256, 256, 256, 242)
BF16 = (torch.bfloat16, rounded)


def cases() -> dict[str, tuple[Case, dict[int, tuple[int, ...]], dict[str, Any]]]:
    """Each with how its head is divided, and further arguments of the sliced call."""

    def case(*shape: int, **options: Any) -> Case:
        return random_case(*(shape or (37, 24, 1000)), **{"masked": 0.3, "bias": True, "seed": 5} | options)

    entropy = case(outputs=EXTRAS, masked=0.0)
    entropy.grad_entropy = torch.linspace(-1, 1, 37, dtype=torch.float64)
    bf16 = {"dtype": torch.bfloat16}
    found = {
        "plain": (case(), SLICES, {}),
        "bfloat16": (case(**bf16), SLICES, {}),
        "bfloat16 without a stash": (case(**bf16), SLICES, {"stash_bytes": 0}),
        "options": (case(softcap=3.0, logit_scale=1.5, temperature=0.7), SLICES, {}),
        "float64": (case(dtype=torch.float64), SLICES, {}),
        "float16": (case(dtype=torch.float16), SLICES, {}),
        "extras": (entropy, SLICES, {}),
        "frozen": (case(trains=("hidden",)), SLICES, {}),
        "head alone": (case(trains=("weight", "bias")), SLICES, {}),
        "nothing trains": (case(trains=()), SLICES, {}),
        "out of range": (case(scale=90.0), SLICES, {}),
        "few rows of the head": (case(8, 6, 3, outputs=EXTRAS), UNEVEN, {}),
        "few rows of the head, one output": (case(8, 6, 3, outputs=("log_sum_sq_probs",)), UNEVEN, {}),
        "nothing is scored": (case(masked=1.0), SLICES, {}),
        "known sizes": (case(), SLICES, {"slice_rows": True}),
        "sequence parallel": (case(36, 24, 1000), SLICES, {"sequence_parallel": True}),
        "sequence parallel in bfloat16": (case(36, 24, 1000, **bf16), SLICES, {"sequence_parallel": True}),
        "one row": (case(1, 24, 1000, masked=0.0), SLICES, {}),
    }
    return found


def share(tensor: torch.Tensor, sizes: tuple[int, ...], rank: int) -> torch.Tensor:
    """A rank's rows."""
    return tensor.split(sizes)[rank].clone()


def one_process(rank: int, folder: Path) -> None:
    """A rank's part of every case, in groups of one, two and four; writes its results to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    groups = {1: dist.new_group([0]), 2: dist.new_group([0, 1]), 4: dist.group.WORLD}
    results: dict[str, Any] = {}
    for count, group in groups.items():
        if rank >= count:
            continue
        for name, (case, division, options) in cases().items():
            sizes = division[count]
            results[f"{name} {count}"] = sliced(case, sizes, rank, group, **options)
        results[f"lora {count}"] = lora(SLICES[count], rank, group)
        results[f"autocast {count}"] = autocast(SLICES[count], rank, group)
        results[f"dpo {count}"] = dpo(SLICES[count], rank, group)
        results[f"poisoned {count}"] = sliced(poisoned_case(), SLICES[count], rank, group)
        results[f"poisoned without a stash {count}"] = sliced(
            poisoned_case(), SLICES[count], rank, group, stash_bytes=0
        )
    results["errors"] = errors(rank)
    results["twice"] = twice(rank)
    results["sent"] = sent(rank)
    results["exact"] = exact(rank)
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # as in tests/integrations/test_sharded_head.py


def sliced(case: Case, sizes: tuple[int, ...], rank: int, group: Any, **options: Any) -> dict[str, Any]:
    """Values and gradients of this rank: all rows, and its rows of the head."""
    if options.get("slice_rows"):
        options["slice_rows"] = sizes

    def run(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, **given: Any) -> Any:
        bias = given.pop("bias", None)
        if options.get("sequence_parallel"):
            hidden = hidden.chunk(len(sizes))[rank]
        own_bias = None if bias is None else bias.split(sizes)[rank]
        return vocab_parallel_linear_logps(
            hidden, weight.split(sizes)[rank], targets, bias_slice=own_bias, group=group, **given, **options
        )

    return case.ours(run)


def lora(sizes: tuple[int, ...], rank: int, group: Any) -> dict[str, torch.Tensor]:
    """A LoRA on the head: r more columns, whose rows are divided as those of the head are."""
    x, w, a, b, targets = lora_problem()
    own = [share(t, sizes, rank).requires_grad_(t is b) for t in (w, b)]
    out = vocab_parallel_linear_logps(torch.cat([x, x @ a.T], 1), torch.cat(own, 1), targets, group=group)
    out.logps.sum().backward()
    return {"logps": out.logps.detach(), "x": x.grad, "a": a.grad, "b": own[1].grad}


def lora_problem() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, w, a, b = (torch.randn(*s, generator=generator) for s in ((9, 16), (1000, 16), (LORA, 16), (1000, LORA)))
    return [x.requires_grad_(), w, a.requires_grad_(), b, torch.randint(1000, (9,), generator=generator)]


def autocast(sizes: tuple[int, ...], rank: int, group: Any) -> dict[str, torch.Tensor]:
    """float32 tensors under bfloat16 autocast."""
    case = cases()["plain"][0]
    x, w = case.hidden.clone().requires_grad_(), share(case.weight, sizes, rank).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = vocab_parallel_linear_logps(x, w, case.targets, group=group)
    out.logps.sum().backward()
    return {"logps": out.logps.detach(), "x": x.grad, "w": w.grad}


DPO_WAYS = ("cached", "own head", "same head")


def dpo_problem() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(1000, (4, 7), generator=generator)
    labels[:, :2] = -100
    shapes = {"hidden": (4, 7, 16), "weight": (1000, 16), "ref_hidden": (4, 7, 16), "ref_weight": (1000, 16)}
    return {name: torch.randn(*s, generator=generator) for name, s in shapes.items()} | {"labels": labels}


def dpo_call(way: str, given: dict[str, torch.Tensor], weight: torch.Tensor, ref_weight: torch.Tensor, **more: Any):
    x = given["hidden"].clone().requires_grad_()
    ref: dict[str, Any] = {"ref_logps": torch.linspace(-40, -30, 4)}
    if way != "cached":
        ref = {"ref_hidden": given["ref_hidden"], "ref_weight": weight if way == "same head" else ref_weight}
    out = fused_linear_dpo(x, weight, given["labels"], beta=0.3, loss_type="wpo", **ref, **more)
    out.loss.backward()
    return [out.loss.detach(), out.margins.detach(), x.grad, weight.grad]


def dpo(sizes: tuple[int, ...], rank: int, group: Any) -> dict[str, list[torch.Tensor]]:
    """`fused_linear_dpo` with every kind of reference."""
    given, found = dpo_problem(), {}
    for way in DPO_WAYS:
        weight, ref_weight = (share(given[name], sizes, rank) for name in ("weight", "ref_weight"))
        weight.requires_grad_()
        found[way] = dpo_call(way, given, weight, ref_weight, vocab_group=group)
    return found


def errors(rank: int) -> list[str]:
    """What each rank is told if one of them is called wrongly."""
    x, w, y = torch.zeros(3, 8), torch.zeros(5, 8), torch.zeros(3, dtype=torch.int64)
    wrong: list[dict[str, Any]] = [
        {"temperature": 1.0 + rank},
        {"targets": y + rank},
        {"hidden": torch.zeros(3 + rank, 8), "targets": torch.zeros(3 + rank, dtype=torch.int64)},
        {"weight_slice": torch.zeros(5, 8 if rank != 2 else 9)},
        {"hidden": x.clone().requires_grad_(rank == 1)},
        {"targets": y + 20},
        {"outputs": ("perplexity",)},
        {"sequence_parallel": True},
        {"slice_rows": (5, 5)},
        {"softcap": -1.0 if rank == 1 else None},
        {"stash_bytes": -1 if rank == 1 else 0},
        {"backend": "cuda" if rank == 1 else "auto"},
        {"bias_slice": torch.zeros(5) if rank == 1 else None},
    ]
    found = []
    for changes in wrong:
        try:
            vocab_parallel_linear_logps(**{"hidden": x, "weight_slice": w, "targets": y} | changes)
            found.append("nothing")
        except ValueError as error:
            found.append(str(error))
    return found


def twice(rank: int) -> str:
    """The error of a backward that is to be differentiated."""
    case = random_case(3, 8, 1000)
    x = case.hidden.requires_grad_()
    out = vocab_parallel_linear_logps(x, share(case.weight, SLICES[4], rank), case.targets)
    with pytest.raises(RuntimeError) as caught:
        torch.autograd.grad(out.logps.sum(), x, create_graph=True)
    return str(caught.value)


SENDS = (
    (dist, "all_reduce", 0),
    (dist, "all_gather", 1),
    (collectives, "all_gather", 1),
    (collectives, "reduce_scatter", 1),
)


def sent(rank: int) -> dict[str, dict[str, int]]:
    """Bytes that a rank gives to each collective in a forward and a backward: 32 scored rows, H 24, in four ways."""
    known: dict[str, Any] = {"slice_rows": SLICES[4]}
    return {
        "all": bytes_of(rank, ("hidden", "weight"), outputs=("mean_logits",), **known),
        "frozen head": bytes_of(rank, ("hidden",), **known),
        "head alone": bytes_of(rank, ("weight",), **known),
        "sequence parallel": bytes_of(rank, ("hidden", "weight"), sequence_parallel=True, **known),
        "sequence parallel, autocast": bytes_of(
            rank, ("hidden", "weight"), autocast=True, sequence_parallel=True, **known
        ),
    }


def bytes_of(rank: int, trains: tuple[str, ...], autocast: bool = False, **options: Any) -> dict[str, int]:
    found: dict[str, int] = {}

    def counting(real: Any, name: str, place: int) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            found[name] = found.get(name, 0) + args[place].numel() * args[place].element_size()
            return real(*args, **kwargs)

        return counted

    case = random_case(32, 24, 1000)
    x = case.hidden.chunk(4)[rank] if options.get("sequence_parallel") else case.hidden
    x, w = x.clone().requires_grad_("hidden" in trains), share(case.weight, SLICES[4], rank)
    with pytest.MonkeyPatch.context() as patch:
        for module, name, place in SENDS:
            patch.setattr(module, name, counting(getattr(module, name), name, place))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = vocab_parallel_linear_logps(x, w.requires_grad_("weight" in trains), case.targets, **options)
        out.logps.sum().backward()
    return found


def poisoned_case() -> Case:
    """Rows whose hidden states are not numbers, and whose log-probs count for nothing."""
    case = random_case(9, 16, 1000, trains=("hidden", "weight"))
    case.hidden[3], case.hidden[5, 2] = torch.nan, torch.inf
    case.grad[3] = case.grad[5] = 0
    return case


def exact(rank: int) -> list[dict[str, Any]]:
    """The gradients of the cases of `tests/exact.py`, whose V of 1010 is cut in four."""
    return [sliced(case, EXACT, rank, dist.group.WORLD) for case in exact_cases()]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=one_process, args=(rank, folder)) for rank in range(4)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
        process.kill()
    assert [process.exitcode for process in ranks] == [0] * 4
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(4)]


def joined(results: list[dict[str, Any]], name: str, count: int) -> dict[str, Any]:
    """The results of `count` ranks as those of one process: equal values once, and gradients of all rows."""
    options = cases()[name][2]
    parts = [results[rank][f"{name} {count}"] for rank in range(count)]
    found = dict(parts[0])
    for key, value in found.items():
        others = [part[key] for part in parts]
        if value is None or key not in ("d_weight", "d_bias", "d_hidden"):
            assert all(other is value is None or torch.equal(other, value) for other in others), key
        elif key == "d_hidden" and not options.get("sequence_parallel"):
            assert all(torch.equal(other, value) for other in others)
        else:
            found[key] = sum(others)  # a rank has the gradient of its own rows, and 0 in the others
    return found


@pytest.mark.parametrize("count", SLICES)
@pytest.mark.parametrize("name", cases())
def test_values_and_gradients_are_those_of_the_whole_head(results, name, count):
    case = cases()[name][0]
    slack = {torch.float64: 256, torch.float16: 8}.get(case.hidden.dtype, 4)
    check(case, joined(results, name, count), slack=slack)


@pytest.mark.skipif(not NATIVE, reason="eager sums in chunks, whose borders move with the slices")
@pytest.mark.parametrize("name", ["plain", "bfloat16", "bfloat16 without a stash", "options", "out of range"])
def test_one_two_and_four_ranks_give_the_same_bits(results, name):
    case, _, options = cases()[name]
    case.settings |= {"backend": "native"} | options
    whole = case.ours()
    for count in SLICES:
        found = joined(results, name, count)
        assert torch.equal(found["logps"], whole["logps"])
        if name != "out of range":  # there k is the log-sum of a slice
            assert torch.equal(found["d_weight"], whole["d_weight"])
            assert torch.equal(found["d_bias"], whole["d_bias"])


@pytest.mark.parametrize("count", SLICES)
def test_a_lora_on_the_head(results, count):
    x, w, a, b, targets = lora_problem()
    b.requires_grad_()
    out = linear_logps(torch.cat([x, x @ a.T], 1), torch.cat([w, b], 1), targets)
    out.logps.sum().backward()
    parts = [results[rank][f"lora {count}"] for rank in range(count)]
    for part in parts:
        torch.testing.assert_close(part["logps"], out.logps.detach(), rtol=1e-6, atol=1e-6)
        for name, truth in (("x", x.grad), ("a", a.grad)):
            torch.testing.assert_close(part[name], truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([part["b"] for part in parts]), b.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", SLICES)
def test_under_autocast(results, count):
    case = cases()["plain"][0]
    x, w = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_logps(x, w, case.targets)
    out.logps.sum().backward()
    parts = [results[rank][f"autocast {count}"] for rank in range(count)]
    for part in parts:
        assert torch.equal(part["logps"], out.logps.detach())
        torch.testing.assert_close(part["x"], x.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([part["w"] for part in parts]), w.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("way", DPO_WAYS)
@pytest.mark.parametrize("count", SLICES)
def test_the_loss_and_its_gradients(results, count, way):
    given = dpo_problem()
    weight = given["weight"].clone().requires_grad_()
    loss, margins, dx, dw = dpo_call(way, given, weight, given["ref_weight"])
    parts = [results[rank][f"dpo {count}"][way] for rank in range(count)]
    for part in parts:
        torch.testing.assert_close(part[0], loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(part[1], margins, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(part[2], dx, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(torch.cat([part[3] for part in parts]), dw, rtol=1e-5, atol=1e-7)


def test_a_mistake_on_one_rank_is_an_error_on_all(results):
    for rank, found in enumerate(r["errors"] for r in results):
        assert found[0].startswith("options: was (2.0, 1.0, None, (), False) on rank 1 of the group, must be (1.0, 1.0")
        assert found[1] == "targets: was other ones on rank 1 of the group, must be the same as on rank 0"
        assert found[2].startswith("hidden: was ([4, 8], 'torch.float32') on rank 1 of the group, must be ([3, 8], ")
        own = "weight_slice: was of shape [5, 9], must be [V, 8], hidden's H"
        assert found[3] == (own if rank == 2 else f"rank 2 of the group: {own}")
        assert found[4].startswith("gradients: was [True, False, True] on rank 1 of the group, must be [False, False")
        assert found[5] == "targets: was 20, must be in [0, 20) or -100 (not scored)"
        assert found[6].startswith("outputs: was ('perplexity',), must be a sequence of names from")
        assert found[7] == "hidden: was of 3 rows, must be 3 / 4 with sequence_parallel"
        assert (
            found[8] == f"slice_rows: was [5, 5], must be a number of rows for each of 4 ranks, 5 for this one ({rank})"
        )
        for place, argument in ((9, "softcap: was -1.0"), (10, "stash_bytes: was -1"), (11, "backend: was 'cuda'")):
            assert found[place].startswith(argument if rank == 1 else f"rank 1 of the group: {argument}")
        assert found[12] == "bias_slice: was torch.float32 on rank 1 of the group, must be None as on rank 0"


def test_a_second_derivative_is_an_error(results):
    expected = "create_graph: was True, must be False: a head in slices has no second derivative"
    assert [r["twice"] for r in results] == [expected] * 4


def test_the_bytes_that_are_sent(results):
    """N 32, H 24: 8·N of the targets' logits and 4·N·H of dX are summed, 16·N and the extra's 8·N are gathered.

    A frozen head adds nothing, and a hidden state that needs no gradient saves dX. With sequence parallelism a rank
    gives its N / 4 rows to the forward and to the backward, under autocast in its dtype.
    """
    n, h = 32, 24
    sums = {"all_reduce": 8 * n, "all_gather": 16 * n}
    rows = 2 * n // 4 * h
    for result in results:
        found = result["sent"]
        assert found["all"] == {"all_reduce": 8 * n + 4 * n * h, "all_gather": 24 * n}
        assert found["frozen head"] == {"all_reduce": 8 * n + 4 * n * h, "all_gather": 16 * n}
        assert found["head alone"] == sums
        scattered = sums | {"reduce_scatter": 4 * n * h}
        assert found["sequence parallel"] == scattered | {"all_gather": 16 * n + 4 * rows}
        assert found["sequence parallel, autocast"] == scattered | {"all_gather": 16 * n + 2 * rows}


@pytest.mark.parametrize("stash", ["poisoned", "poisoned without a stash"])
@pytest.mark.parametrize("count", SLICES)
def test_rows_that_count_for_nothing_may_be_nan(results, count, stash):
    case = poisoned_case()
    whole = case.ours()
    parts = [results[rank][f"{stash} {count}"] for rank in range(count)]
    assert all(bool(whole[name].isfinite().all()) for name in ("d_hidden", "d_weight"))
    for part in parts:
        torch.testing.assert_close(part["d_hidden"], whole["d_hidden"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sum(part["d_weight"] for part in parts), whole["d_weight"], rtol=1e-5, atol=1e-5)


def test_bfloat16_gradients_are_rounded_once(results):
    """dX is summed over four ranks before it is rounded: the error of one rounding, as without ranks."""
    found = [
        multiples(case, {"d_hidden": result[0]["d_hidden"], "d_weight": sum(r["d_weight"] for r in result)}, *BF16)
        for case, *result in zip(exact_cases(), *(r["exact"] for r in results), strict=True)
    ]
    assert all(one.hidden <= HIDDEN for one in found), found
    assert root_mean_square(one.targets for one in found) <= TARGETS
