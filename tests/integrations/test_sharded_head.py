"""A head cut over two processes against the whole one in this process."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sdpo_kernels import linear_logps
from sdpo_kernels.integrations import sharded_head
from sdpo_kernels.integrations.sharded_head import sharded_linear_logps

pytestmark = pytest.mark.xdist_group("sharded head")
H, SHARDS, ROWS = 16, (37, 28), ((0, 9), (9, 20))  # V = 65
CASES = {
    "plain": (torch.float32, {}, True),
    "options": (torch.float32, {"softcap": 3.0, "logit_scale": 1.5, "temperature": 0.7}, True),
    "float64": (torch.float64, {}, True),
    "bfloat16": (torch.bfloat16, {}, True),
    "frozen": (torch.float32, {}, False),
}


def problem(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(20, H, generator=generator).to(dtype)
    weight = torch.randn(sum(SHARDS), H, generator=generator).to(dtype)
    targets = torch.randint(sum(SHARDS), (20,), generator=generator)
    targets[::4] = -100
    return hidden, weight, targets, torch.randn(20, generator=generator)


def one_process(rank: int, folder: Path) -> None:
    """A rank's part of every case; its results go into a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    sent, results = [], {}
    broadcast = dist.broadcast
    sharded_head.dist.broadcast = lambda t, **kw: (sent.append(t.numel()), broadcast(t, **kw))[1]
    for name, (dtype, options, trains) in CASES.items():
        hidden, weight, targets, coefficient = problem(dtype)
        own = slice(*ROWS[rank])
        x = hidden[own].clone().requires_grad_()
        shard = weight.split(SHARDS)[rank].clone().requires_grad_(trains)
        logps = sharded_linear_logps(x, shard, targets[own], chunk_columns=10, **options)
        (logps.double() * coefficient[own]).sum().backward()
        results[name] = (logps.detach(), x.grad, shard.grad)
    try:
        sharded_linear_logps(x, shard, torch.full_like(targets[own], 65), chunk_columns=10)
    except ValueError as error:
        results["error"] = str(error)
    results["largest"] = max(sent)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


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
    dtype, options, trains = CASES[name]
    hidden, weight, targets, coefficient = problem(dtype)
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trains)
    logps = linear_logps(x, w, targets, backend="eager", **options).logps
    (logps.double() * coefficient).sum().backward()
    near = {"rtol": 1e-5, "atol": 1e-6} if dtype != torch.bfloat16 else {"rtol": 2**-7, "atol": 2**-7}
    torch.testing.assert_close(torch.cat([r[name][0] for r in results]), logps.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat([r[name][1] for r in results]), x.grad, **near)
    if trains:
        torch.testing.assert_close(torch.cat([r[name][2] for r in results]), w.grad, **near)
    else:
        assert [r[name][2] for r in results] == [None, None]


def test_no_more_than_a_chunk_is_sent_at_a_time(results):
    assert [r["largest"] for r in results] == [10 * H, 10 * H]


def test_a_target_past_the_whole_vocabulary_is_refused(results):
    assert all("targets: held 65, must be in [0, 65)" in r["error"] for r in results)
