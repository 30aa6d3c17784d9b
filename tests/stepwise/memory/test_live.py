"""Counting the bytes of tensors that exist."""

import torch

from sdpo_kernels.stepwise.memory.live import LiveBytes


def test_views_cost_nothing_and_dropped_tensors_no_longer_count():
    with LiveBytes() as live:
        tensor = torch.zeros(1000)
        view = tensor[:10]
        del tensor
        assert live.now == 4000
        del view
        assert (live.now, live.peak) == (0, 4000)


def test_what_existed_before_is_left_out():
    layer, rows = torch.nn.Linear(100, 100, bias=False), torch.randn(50, 100)
    with LiveBytes([*layer.parameters(), rows]) as live:
        out = layer(rows)
        assert live.now == 4 * 50 * 100
        out.sum().backward()
        del out
        assert live.now == 4 * 100 * 100  # the weight's gradient
