"""What one rank does when the others wait for it in a collective of their own."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.common.errors import UserError
from tests.stepwise import runs
from tests.stepwise.ranks_of_a_run import _free_port

ENDS = {"its own error": 3, "lost process": 4}


def as_rank(rank: int, port: int) -> None:
    """Rank 1 fails while rank 0 is in a collective that is none of the driver's."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    ranks.PATIENCE = 0.5
    try:
        with ranks.joined(lambda: dist.init_process_group("gloo")):
            if rank == 1:
                raise UserError("a disk is full")
            dist.all_reduce(torch.ones(1))
    except ranks.SingleRankError as error:
        os._exit(ENDS["its own error"] if str(error) == "rank 1: a disk is full" and ranks.says(error) else 1)
    except ranks.LostProcess:
        os._exit(ENDS["lost process"])


def test_an_error_that_the_others_cannot_learn_of_ends_its_rank_and_so_them():
    """Each forward of a cut model is such a collective: a rank that failed before it would wait for ever."""
    port = _free_port()
    started: list[Any] = [runs._server().Process(target=as_rank, args=(rank, port)) for rank in (0, 1)]
    for process in started:
        process.start()
    for process in started:
        process.join(30)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    assert codes == [ENDS["lost process"], ENDS["its own error"]]
