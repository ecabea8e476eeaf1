"""The transformer's blocks with less work.

What becomes of text, style and content tokens in the last one is dropped right after, in diffusers' code as
in the official one: here they are keys and values alone, and only the picture's come out. On a CPU the others
make fewer passes over their tokens; elsewhere the single ones hold less at once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn

from uso.model.attention import CPUAttnProcessor, rotate
from uso.model.onednn import is_plain, linear_gelu


@contextmanager
def lean_blocks(transformer: FluxTransformer2DModel, latents: Tensor) -> Iterator[None]:
    """Within it the last block gives the first N tokens of its image stream; `latents` is `(B, N, 64)`.

    To be entered within `precomputed`, by which one row modulates all tokens. A block that something else has
    changed (a step cache, streamed weights, another attention) is left alone.
    """
    *others, last = transformer.single_transformer_blocks
    forwards: dict[Any, Any] = {}
    for block in (*transformer.transformer_blocks, *others):
        if block._compiled_call_impl is not None:
            continue
        single = type(block) is FluxSingleTransformerBlock
        if _unchanged(block, CPUAttnProcessor):
            forwards[block] = _forward_single if single else _forward_double
        elif single and _unchanged(block, FluxAttnProcessor):
            forwards[block] = _forward_holding_less
    if _unchanged(last, FluxAttnProcessor, CPUAttnProcessor):
        last.latents = latents  # a number would be a constant of a compiled block
        forwards[last] = _forward_last
    for block, forward in forwards.items():
        block.forward = MethodType(forward, block)
    try:
        yield
    finally:
        for block in forwards:
            del block.forward
        vars(last).pop("latents", None)


def _unchanged(block: Any, *processors: type) -> bool:
    forward = getattr(block.forward, "__func__", None)
    diffusers = forward in (FluxTransformerBlock.forward, FluxSingleTransformerBlock.forward)
    return diffusers and type(block.attn.processor) in processors


def _forward_double(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor],
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """diffusers' `FluxTransformerBlock.forward`, with fewer passes over the tokens."""
    normed, *rest = _modulate(block.norm1, hidden_states, temb)
    normed_text, *rest_of_text = _modulate(block.norm1_context, encoder_hidden_states, temb)
    attended, attended_text = block.attn(
        hidden_states=normed, encoder_hidden_states=normed_text, image_rotary_emb=image_rotary_emb
    )

    def finish(tokens: Tensor, attended: Tensor, norm: Any, feed_forward: Any, rest: list[Tensor]) -> Tensor:
        gate, shift, scale, gate_mlp = rest
        tokens = torch.addcmul(tokens, gate, attended)
        return torch.addcmul(tokens, gate_mlp, feed_forward(_scale_and_shift(norm, tokens, scale, shift)))

    text = finish(encoder_hidden_states, attended_text, block.norm2_context, block.ff_context, rest_of_text)
    return text, finish(hidden_states, attended, block.norm2, block.ff, rest)


def _modulate(norm: Any, tokens: Tensor, temb: Tensor) -> tuple[Tensor, ...]:
    """What an `AdaLayerNormZero` or `AdaLayerNormZeroSingle` gives: `tokens`, then rows `(1, hidden)`."""
    row = norm.linear(temb)  # precomputed
    shift, scale, *rest = row.chunk(row.shape[1] // tokens.shape[2], dim=1)
    return _scale_and_shift(norm.norm, tokens, scale, shift), *rest


def _scale_and_shift(norm: nn.LayerNorm, tokens: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(tokens, norm.normalized_shape, 1 + scale[0], shift[0], norm.eps)


def _single(compute: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A single block's forward by what `compute` makes of both streams' tokens `(B, T + N, hidden)`."""

    def forward(
        block: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        text = encoder_hidden_states.shape[1]
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        output = compute(block, tokens, temb, image_rotary_emb)
        return output[:, :text], output[:, text:]

    return forward


@_single
def _forward_single(
    block: Any, tokens: Tensor, temb: Tensor, image_rotary_emb: tuple[Tensor, Tensor]
) -> Tensor:
    """diffusers' own, with fewer passes over the tokens."""
    normed, gate = _modulate(block.norm, tokens, temb)
    attended = block.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb)
    return torch.addcmul(
        tokens, gate, _project(block.proj_out, attended, linear_gelu(block.proj_mlp, normed))
    )


@_single
def _forward_holding_less(
    block: Any, tokens: Tensor, temb: Tensor, image_rotary_emb: tuple[Tensor, Tensor]
) -> Tensor:
    """diffusers' own to the bit: the MLP after attention, and neither is kept beside the two joined."""
    normed, gate = block.norm(tokens, emb=temb)
    joined = torch.cat(
        [
            block.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb),
            block.act_mlp(block.proj_mlp(normed)),
        ],
        dim=2,
    )
    output: Tensor = block.proj_out(joined).mul_(gate.unsqueeze(1)).add_(tokens)
    return output


def _project(layer: Any, attended: Tensor, mlp: Tensor) -> Tensor:
    """`layer` of `(B, N, hidden)` and `(B, N, 4 hidden)` side by side; a plain one without joining them."""
    if not is_plain(layer):
        joined: Tensor = layer(torch.cat([attended, mlp], dim=2))
        return joined
    of_attended, of_mlp = layer.weight.split([attended.shape[2], mlp.shape[2]], dim=1)
    output = F.linear(attended, of_attended, layer.bias)
    output.flatten(0, 1).addmm_(mlp.flatten(0, 1), of_mlp.T)
    return output


def _forward_last(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor],
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """diffusers' own forward, with queries, MLP and output of some tokens."""
    attention, text, count = block.attn, encoder_hidden_states.shape[1], block.latents.shape[1]
    tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)  # (B, T + N + content, hidden)
    normed, gate = block.norm(tokens, emb=temb)
    # `narrow`, not slices: these may end where the tokens do or before, which would be two graphs
    picture = normed.narrow(1, text, count)  # (B, N, hidden)
    if attention.fused_projections:
        query, key, value = attention.to_qkv(normed).chunk(3, dim=-1)
        query = query.narrow(1, text, count)
    else:
        query, key, value = attention.to_q(picture), attention.to_k(normed), attention.to_v(normed)
    # (B, tokens, hidden) -> (B, tokens, heads, width)
    query, key, value = (x.unflatten(-1, (-1, attention.head_dim)) for x in (query, key, value))
    cos, sin = (part.narrow(0, text, count) for part in image_rotary_emb)
    query = rotate(attention.norm_q(query), (cos, sin))
    key = rotate(attention.norm_k(key), image_rotary_emb)
    backend = attention.processor._attention_backend
    attended = dispatch_attention_fn(query, key, value, backend=backend).flatten(2, 3)  # (B, N, hidden)
    joined = torch.cat([attended, linear_gelu(block.proj_mlp, picture)], dim=2)  # (B, N, 5 hidden)
    output = block.proj_out(joined).mul_(gate.unsqueeze(1))
    return encoder_hidden_states, output + hidden_states.narrow(1, 0, count)
