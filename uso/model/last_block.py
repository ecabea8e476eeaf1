"""The transformer's last block for the tokens that are kept: those of the picture.

What becomes of text, style and content tokens in it is dropped right after, in diffusers' code as in the
official one: here they are keys and values alone, and only the picture's come out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor

from uso.model.attention import CPUAttnProcessor, rotate


@contextmanager
def last_block_for_picture(transformer: FluxTransformer2DModel, latents: Tensor) -> Iterator[None]:
    """Within it the last block gives the first N tokens of its image stream; `latents` is `(1, N, 64)`.

    A block that something else has changed (a step cache, streamed weights, another attention) is left alone.
    """
    block: Any = transformer.single_transformer_blocks[-1]
    if "forward" in vars(block) or type(block.attn.processor) not in (FluxAttnProcessor, CPUAttnProcessor):
        yield
        return
    block.latents = latents  # a number would be a constant of a compiled block
    block.forward = MethodType(_forward, block)
    try:
        yield
    finally:
        del block.forward, block.latents


def _forward(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor],
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """diffusers' `FluxSingleTransformerBlock.forward` with queries, MLP and output of some tokens."""
    attention, text, count = block.attn, encoder_hidden_states.shape[1], block.latents.shape[1]
    tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)  # (1, T + N + content, hidden)
    normed, gate = block.norm(tokens, emb=temb)
    # `narrow`, not slices: these may end where the tokens do or before, which would be two graphs
    picture = normed.narrow(1, text, count)  # (1, N, hidden)
    if attention.fused_projections:
        query, key, value = attention.to_qkv(normed).chunk(3, dim=-1)
        query = query.narrow(1, text, count)
    else:
        query, key, value = attention.to_q(picture), attention.to_k(normed), attention.to_v(normed)
    # (1, tokens, hidden) -> (1, tokens, heads, width)
    query, key, value = (x.unflatten(-1, (-1, attention.head_dim)) for x in (query, key, value))
    cos, sin = (part.narrow(0, text, count) for part in image_rotary_emb)
    query = rotate(attention.norm_q(query), (cos, sin))
    key = rotate(attention.norm_k(key), image_rotary_emb)
    backend = attention.processor._attention_backend
    attended = dispatch_attention_fn(query, key, value, backend=backend).flatten(2, 3)  # (1, N, hidden)
    mlp = block.act_mlp(block.proj_mlp(picture))
    output = gate.unsqueeze(1) * block.proj_out(torch.cat([attended, mlp], dim=2))
    return encoder_hidden_states, hidden_states.narrow(1, 0, count) + output
