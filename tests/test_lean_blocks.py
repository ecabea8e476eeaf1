"""The last block computes the picture's tokens alone, the others copy less; the picture stays the same."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from torch import Tensor, nn

from tests.test_pipeline import SECOND_STYLE, STYLE, draw
from uso.model import pipeline
from uso.model.attention import CPUAttnProcessor
from uso.model.pipeline import USOPipeline


@pytest.fixture
def pipe(tiny_folder: Path) -> USOPipeline:
    pipe = USOPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def last_block(pipe: USOPipeline) -> Any:
    return pipe.transformer.single_transformer_blocks[-1]


def whole(pipe: USOPipeline, **arguments: Any) -> Tensor:
    """As diffusers computes it."""
    with mock.patch.object(pipeline, "lean_blocks", mock.MagicMock()):
        return draw(pipe, **arguments)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"style_images": [STYLE, SECOND_STYLE]}, {"content_image": None}],
    ids=["as is", "two styles", "no content"],
)
def test_the_picture_is_the_same(pipe: USOPipeline, arguments: dict[str, Any], fused: bool) -> None:
    if fused:
        pipe.fuse_qkv_projections()
    expected = whole(pipe, **arguments)
    torch.testing.assert_close(draw(pipe, **arguments), expected, rtol=0, atol=1e-5)


def given_and_expected(pipe: USOPipeline, block: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What a block gives in a picture's last step, and what diffusers' forward makes of the same."""
    seen: list[Any] = []

    def keep(block: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen.append((args, kwargs, output, block.forward.__func__))

    with block.register_forward_hook(keep, with_kwargs=True):
        draw(pipe)
    args, kwargs, output, forward = seen[-1]
    assert forward is not type(block).forward
    with torch.inference_mode():
        return output, block(*args, **kwargs)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["transformer_blocks", "single_transformer_blocks"])
def test_the_other_blocks_give_what_diffusers_own_do(pipe: USOPipeline, kind: str, fused: bool) -> None:
    pipe.transformer.set_attn_processor(CPUAttnProcessor())
    if fused:
        pipe.fuse_qkv_projections()
    given, expected = given_and_expected(pipe, getattr(pipe.transformer, kind)[0])
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_a_single_block_that_holds_less_gives_the_same_bits(pipe: USOPipeline, fused: bool) -> None:
    if fused:
        pipe.fuse_qkv_projections()
    given, expected = given_and_expected(pipe, pipe.transformer.single_transformer_blocks[0])
    assert all(map(torch.equal, given, expected))


def test_a_hook_on_a_projection_sees_attention_and_mlp_side_by_side(pipe: USOPipeline) -> None:
    pipe.transformer.set_attn_processor(CPUAttnProcessor())
    expected, widths = draw(pipe), []
    projection = pipe.transformer.single_transformer_blocks[0].proj_out
    projection.register_forward_hook(lambda module, args, out: widths.append(args[0].shape[2]))
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=1e-5)
    assert set(widths) == {projection.in_features}


def test_only_the_pictures_tokens_go_through_its_mlp(pipe: USOPipeline) -> None:
    rows = []
    last_block(pipe).proj_mlp.register_forward_hook(lambda module, args, out: rows.append(out.shape[1]))
    latents = draw(pipe)
    assert set(rows) == {latents.shape[1]}


def test_nothing_stays_behind(pipe: USOPipeline) -> None:
    pipe.transformer.set_attn_processor(CPUAttnProcessor())
    blocks = [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]
    before = [set(vars(block)) for block in blocks]

    def fail(*_: Any) -> None:
        assert all("forward" in vars(block) for block in blocks)
        raise RuntimeError("in the middle")

    handle = last_block(pipe).proj_mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        draw(pipe)
    handle.remove()
    assert [set(vars(block)) for block in blocks] == before
    draw(pipe)
    assert [set(vars(block)) for block in blocks] == before


def test_a_step_cache_is_left_alone(pipe: USOPipeline) -> None:
    ours = draw(pipe)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    expected = whole(pipe)
    assert torch.equal(draw(pipe), expected)
    pipe.transformer.disable_cache()
    assert torch.equal(draw(pipe), ours), "without it the blocks are lean again"


def test_another_attention_is_asked(pipe: USOPipeline) -> None:
    block = last_block(pipe)
    processor = block.attn.processor
    calls = []

    class Watching(type(processor)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return super().__call__(*args, **kwargs)

    block.attn.set_processor(Watching())
    assert isinstance(block.attn, nn.Module)
    draw(pipe)
    assert calls
