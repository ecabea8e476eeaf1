"""FLUX's attention for a CPU: diffusers' own, with fewer passes over queries and keys."""

import inspect
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor

# the fused layer of a `FluxAttention`, and the three it stands for
FUSED = {"to_qkv": ("to_q", "to_k", "to_v"), "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}


def rotate(x: Tensor, image_rotary_emb: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs of `(B, S, H, D)` by cosines and sines `(S, D)`.

    In eager mode on a CPU as one product of complex numbers, written head after head, as attention reads it
    faster; else by diffusers' `apply_rotary_emb`.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        rotated: Tensor = apply_rotary_emb(x, image_rotary_emb, sequence_dim=1)
        return rotated
    turns = _complex(image_rotary_emb)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (B, S, H, D / 2)
    batch, length, heads, half = pairs.shape
    out = None
    if not torch.is_grad_enabled():  # gradients forbid `out`
        out = pairs.new_empty(batch, heads, length, half).transpose(1, 2)
    return torch.view_as_real(torch.mul(pairs, turns, out=out)).flatten(-2).to(x.dtype)


def _complex(image_rotary_emb: tuple[Any, Tensor]) -> Tensor:
    """The turns as complex numbers `(S, 1, D / 2)`, kept with the cosines, which all blocks are given."""
    cos, sin = image_rotary_emb
    if "turns" not in vars(cos):
        cos.turns = torch.complex(cos[:, None, ::2], sin[:, None, ::2])
    turns: Tensor = cos.turns
    return turns


class CPUAttnProcessor(FluxAttnProcessor):
    """diffusers' processor with `rotate`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`(B, S, D)` to the same, for both streams `(B, S, D)` and `(B, T, D)` of a double block."""
        query, key, value = project(attn, "to_qkv", hidden_states)
        query, key = attn.norm_q(query), attn.norm_k(key)
        text = 0
        if encoder_hidden_states is not None:
            text = encoder_hidden_states.shape[1]
            added_query, added_key, added_value = project(attn, "to_added_qkv", encoder_hidden_states)
            query = torch.cat([attn.norm_added_q(added_query), query], dim=1)  # (B, T + S, H, D / H)
            key = torch.cat([attn.norm_added_k(added_key), key], dim=1)
            value = torch.cat([added_value, value], dim=1)
        if image_rotary_emb is not None:
            query, key = rotate(query, image_rotary_emb), rotate(key, image_rotary_emb)
        attended = dispatch_attention_fn(
            query, key, value, attn_mask=attention_mask, backend=self._attention_backend
        ).flatten(2)
        if encoder_hidden_states is None:
            return attended
        return attn.to_out[0](attended[:, text:]), attn.to_add_out(attended[:, :text])

    # `FluxAttention` asks for it in every call; to find it out takes 4 % of a small model's step
    __call__.__signature__ = inspect.signature(__call__)  # type: ignore[attr-defined]


def project(attention: Any, fused: str, x: Tensor) -> tuple[Tensor, ...]:
    """Query, key and value `(B, S, H, D / H)` of `(B, S, D)`."""
    if attention.fused_projections:
        parts = getattr(attention, fused)(x).chunk(3, dim=-1)
    else:
        parts = [getattr(attention, name)(x) for name in FUSED[fused]]
    return tuple(part.unflatten(-1, (-1, attention.head_dim)) for part in parts)
