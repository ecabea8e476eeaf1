"""Tokens, positions and the schedule's shift."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from uso.model.geometry import (
    pack_latents,
    position_ids,
    reference_position_ids,
    schedule_mu,
    schedule_tokens,
    unpack_latents,
)


@given(rows=st.integers(1, 12), columns=st.integers(1, 12), batch=st.integers(1, 2))
def test_packing_is_undone_by_unpacking(rows: int, columns: int, batch: int) -> None:
    latents = torch.randn(batch, 16, 2 * rows, 2 * columns)
    tokens = pack_latents(latents)
    assert tokens.shape == (batch, rows * columns, 64)
    assert torch.equal(unpack_latents(tokens, width=16 * columns, height=16 * rows), latents)


def test_a_token_is_channel_row_column() -> None:
    latents = torch.arange(2 * 2 * 4).view(1, 2, 2, 4)
    assert pack_latents(latents)[0, 1].tolist() == [2, 3, 6, 7, 10, 11, 14, 15]


def test_position_ids_are_row_and_column() -> None:
    assert position_ids(2, 2, row_offset=5).tolist() == [[0, 5, 0], [0, 5, 1], [0, 6, 0], [0, 6, 1]]


@pytest.mark.parametrize(
    ("offset", "first", "second"),
    [("d", (4, 6), (7, 8)), ("h", (4, 0), (7, 0)), ("w", (0, 6), (0, 8)), ("o", (0, 0), (0, 0))],
)
def test_references_lie_beyond_what_is_before_them(
    offset: str, first: tuple[int, int], second: tuple[int, int]
) -> None:
    ids = reference_position_ids((4, 6), [(3, 2), (1, 1)], offset=offset)
    assert [len(i) for i in ids] == [6, 1]
    assert [tuple(i[0, 1:].int().tolist()) for i in ids] == [first, second]
    assert not torch.cat(ids)[:, 0].any()


def test_an_unknown_offset_is_named() -> None:
    with pytest.raises(ValueError, match="`offset` must be one of d, h, w, o, got 'x'"):
        reference_position_ids((1, 1), [(1, 1)], offset="x")


def test_the_schedule_s_shift_at_1024_is_that_of_64_tokens() -> None:
    assert schedule_tokens(width=1024, height=1024) == 64
    assert schedule_mu(width=1024, height=1024) == pytest.approx(0.4675)
    assert schedule_mu(width=1024, height=1024, base_shift=2.5, max_shift=2.5) == 2.5
