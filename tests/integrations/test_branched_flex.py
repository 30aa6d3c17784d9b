"""FlexAttention over rows with branches: its mask against plain loops, its values, and what compiles here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sdpo_kernels.integrations import attention_by_sequence, branched_flex
from sdpo_kernels.integrations.pieces import Piece, pieces
from tests.integrations.test_shared_prefix import rows_seen


@pytest.mark.parametrize("window", [None, 3])
def test_flex_attention_sees_what_the_pieces_see(window: int | None, monkeypatch) -> None:
    """The mask against plain loops, and values of FlexAttention without compilation."""
    found = [Piece(5, 0), Piece(3, 2), Piece(1, 4), Piece(2, 0), Piece(4, 1)]
    firsts = [piece.shared for piece in found]
    positions = torch.cat([torch.arange(p.length) + first for p, first in zip(found, firsts, strict=True)])
    assert pieces(positions[None]) == found

    borders = branched_flex.borders_of(found, torch.device("cpu"))
    assert borders.position.tolist() == positions.tolist()
    sees = branched_flex.visible(borders, window)
    rows = torch.arange(len(positions))
    mask = sees(None, None, rows[:, None], rows[None, :].expand(len(rows), -1))
    for place in range(len(rows)):
        expected = rows_seen(found, place)
        if window is not None:
            expected = [row for row in expected if positions[place] - positions[row] < window]
        assert mask[place].nonzero().squeeze(1).tolist() == expected

    monkeypatch.setattr(branched_flex, "_compiled", lambda: torch.nn.attention.flex_attention.flex_attention)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, len(rows), 16, generator=generator) for heads in (4, 2, 2))
    out = branched_flex.attend(q, k, v, found, window, None, 2.0)  # on the CPU it has no backward
    own, _ = attention_by_sequence.packed_attention(
        torch.nn.Identity(), q, k, v, None, sliding_window=window, softcap=2.0, position_ids=positions[None]
    )
    torch.testing.assert_close(out, own, rtol=1e-5, atol=1e-5)


def flex_row() -> tuple[list[Piece], list[Tensor]]:
    """A row of more than one block of FlexAttention, with branches, and its queries, keys and values."""
    found = [Piece(70, 0), Piece(33, 20), Piece(11, 40), Piece(20, 0), Piece(40, 10)]
    generator = torch.Generator().manual_seed(0)
    rows = sum(piece.length for piece in found)
    return found, [torch.randn(1, heads, rows, 16, generator=generator) for heads in (4, 2, 2)]


@pytest.mark.parametrize("window", [None, 30])
def test_flex_attention_compiles_with_its_mask(window: int | None, monkeypatch) -> None:
    """By inductor for the CPU, which needs fixed lengths: its template fails on others."""
    found, qkv = flex_row()
    expected = branched_flex_eager(found, qkv, window, monkeypatch)
    compiled = torch.compile(torch.nn.attention.flex_attention.flex_attention, dynamic=False)
    monkeypatch.setattr(branched_flex, "_compiled", lambda: compiled)
    with torch.no_grad():
        out = branched_flex.attend(*qkv, found, window, 0.3, 2.0)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)

    # as on CUDA, where the mask is made block by block in a compiled kernel
    sees = branched_flex.visible(branched_flex.borders_of(found, torch.device("cpu")), window)
    rows = qkv[0].shape[2]
    create = torch.nn.attention.flex_attention.create_block_mask
    mask = torch.compile(create, dynamic=True)(sees, None, None, rows, rows, device="cpu")
    assert torch.equal(mask.to_dense(), create(sees, None, None, rows, rows, device="cpu").to_dense())


def branched_flex_eager(found: list[Piece], qkv: list[Tensor], window: int | None, monkeypatch) -> Tensor:
    monkeypatch.setattr(branched_flex, "_compiled", lambda: torch.nn.attention.flex_attention.flex_attention)
    return branched_flex.attend(*qkv, found, window, 0.3, 2.0)


def test_flex_attentions_graph_has_lengths_as_symbols_and_no_number_from_the_device(monkeypatch) -> None:
    """One graph for all lengths; softcap and scaling are constants in it, not read back at each call."""
    graphs = []

    def noting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph.code + "".join(str(part.code) for part in graph.children()))
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: compile_(f, dynamic=dynamic, backend=noting))
    branched_flex._compiled.cache_clear()
    found, qkv = flex_row()
    with torch.no_grad():
        branched_flex.attend(*qkv, found, None, 0.3, 2.0)
        shorter = [t[:, :, :134].contiguous() for t in qkv]
        branched_flex.attend(*shorter, found[:4], None, 0.3, 2.0)
    branched_flex._compiled.cache_clear()
    assert len(graphs) == 1
    assert "0.3" in graphs[0]
    assert ".item()" not in graphs[0]
