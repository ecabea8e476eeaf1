"""Style pictures as tokens of the text stream.

`SigLIPMultiFeatProjModel` of the official code (bytedance/USO, `uso/flux/modules/layers.py`), with its shape
as configuration. Parameter names are the official ones, so that published weights load without a map.
"""

from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

LEVEL_NAMES = ("high", "mid", "low")


class StyleProjector(ModelMixin, ConfigMixin):
    """Three levels of SigLIP hidden states to `3 * tokens_per_level` style tokens a picture.

    Args:
        hidden_size: width of the transformer's text stream (FLUX: 3072).
        siglip_width: width of the SigLIP hidden states (so400m: 1152).
        siglip_tokens: SigLIP tokens a picture (so400m at 384 px: 729).
        tokens_per_level: style tokens made of each level (USO: 64).
        levels: which SigLIP hidden states are the high, mid and low level, as indices into `hidden_states`.
    """

    @register_to_config
    def __init__(
        self,
        hidden_size: int = 3072,
        siglip_width: int = 1152,
        siglip_tokens: int = 729,
        tokens_per_level: int = 64,
        levels: tuple[int, int, int] = (-2, -11, -20),
    ) -> None:
        super().__init__()
        if len(levels) != len(LEVEL_NAMES):
            raise ValueError(f"`levels` must name {len(LEVEL_NAMES)} hidden states, got {levels}")
        for name in LEVEL_NAMES:
            self.add_module(
                f"{name}_embedding_linear",
                nn.Sequential(nn.Linear(siglip_tokens, tokens_per_level), nn.SiLU()),
            )
            self.add_module(f"{name}_layer_norm", nn.LayerNorm(siglip_width))
            self.add_module(f"{name}_projection", nn.Linear(siglip_width, hidden_size))

    def forward(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """Project all SigLIP hidden states of a batch of pictures.

        Args:
            hidden_states: every SigLIP hidden state, each `(B, siglip_tokens, siglip_width)`.

        Returns:
            `(B, 3 * tokens_per_level, hidden_size)`: high, mid and low tokens in this order.
        """
        tokens = []
        for name, level in zip(LEVEL_NAMES, self.config.levels, strict=True):
            projection = self.get_submodule(f"{name}_projection")
            x = hidden_states[level].to(projection.weight.dtype)
            x = self.get_submodule(f"{name}_embedding_linear")(x.transpose(1, 2))  # (B, T, C) -> (B, C, K)
            x = self.get_submodule(f"{name}_layer_norm")(x.transpose(1, 2))  # (B, C, K) -> (B, K, C)
            tokens.append(projection(x))  # (B, K, C) -> (B, K, hidden)
        return torch.cat(tokens, dim=1)
