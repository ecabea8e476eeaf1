"""Windows over a picture: where they lie, and what becomes of what they show."""

import pytest
import torch

from uso.model.windows import Windows, continue_edges

SIZES = [(512, 1536), (1536, 512), (768, 1024), (1024, 1008), (1024, 1024), (1536, 528)]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_windows_cover_the_picture_and_one_is_in_the_middle(width: int, height: int) -> None:
    windows = Windows.over(width, height, scale=0.25, side=128)
    assert min(windows.width, windows.height) == 128
    assert max(windows.width, windows.height) / 128 >= max(width, height) / min(width, height)
    assert max(windows.width, windows.height) / 128 < max(width, height) / min(width, height) + 0.25
    columns = windows.width // 16
    tokens = torch.stack([windows.index // columns, windows.index % columns])  # (2, B, 64)
    assert windows.index.shape == (len(windows), windows.tokens)
    assert set(windows.index.flatten().tolist()) == set(range(columns * windows.height // 16))
    assert len(windows) % 2 == 1
    middle = tokens[:, len(windows) // 2].float().mean(1)
    assert middle.tolist() == [windows.height / 32 - 0.5, windows.width / 32 - 0.5]
    starts = tokens[:, :, 0].sum(0)
    assert all(0 < step <= 4 for step in starts.diff().tolist())


def test_without_a_side_one_window_is_all() -> None:
    windows = Windows.over(1040, 512, scale=1.0, side=None)
    assert (windows.width, windows.height, windows.window, len(windows)) == (1040, 512, (1040, 512), 1)
    tokens = torch.rand(1, windows.tokens, 3)
    assert windows.split(tokens) is tokens
    assert windows.merge(tokens) is tokens
    assert Windows.over(100, 60, scale=0.25, side=None).window == (32, 16)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_what_is_split_is_merged_again(width: int, height: int) -> None:
    windows = Windows.over(width, height, scale=0.25, side=128)
    tokens = torch.randn(1, windows.width * windows.height // 256, 64)
    assert (windows.merge(windows.split(tokens)) - tokens).abs().max() < 1e-5


def test_a_window_that_differs_fades_out() -> None:
    windows = Windows.over(1536, 512, scale=0.25, side=128)
    predictions = torch.zeros(len(windows), windows.tokens, 1)
    predictions[len(windows) // 2] = 1
    row = windows.merge(predictions).view(8, 24)[3]
    assert row[8:16].max() > 0.7
    assert row[:8].max() == row[16:].max() == 0
    assert row.diff().abs().max() < 0.3


def test_edges_are_continued_on_both_sides() -> None:
    picture = torch.zeros(2, 16, 8)
    picture[..., 0], picture[..., -1], picture[:, -1] = 1, 2, 3
    wide = continue_edges(picture, width=19, height=16)
    assert wide.shape == (2, 16, 19)
    assert torch.equal(wide[..., 5:13], picture)
    assert (wide[:, :8, :5] == 1).all()
    assert (wide[:, :8, 13:] == 2).all()
    assert (wide[:, -1, 13:] > 2).all()
    assert (wide[:, -1, 13:] < 3).all()
    both = continue_edges(picture, width=8, height=20)
    assert torch.equal(both[:, 2:18], picture)
    assert torch.equal(continue_edges(picture, width=8, height=16), picture)


def test_continued_edges_have_no_stripes() -> None:
    stripes = torch.zeros(64, 64)
    stripes[:, ::4] = 1
    tall = continue_edges(stripes, width=64, height=192)
    for around in (tall[:64], tall[128:]):
        assert around.diff(dim=1).abs().max() < 0.08
        assert (around[:, 16:-16] - stripes.mean()).abs().max() < 0.06
