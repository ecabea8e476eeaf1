"""Style tokens from SigLIP's hidden states (the recorded tokens are in test_parity.py)."""

from pathlib import Path

import pytest
import torch

from uso.model.style_projector import StyleProjector


def test_levels_are_taken_as_configured_and_in_order() -> None:
    projector = StyleProjector(
        hidden_size=8, siglip_width=6, siglip_tokens=5, tokens_per_level=3, levels=(-1, 2, 0)
    )
    states = [torch.randn(2, 5, 6, requires_grad=True) for _ in range(4)]
    tokens = projector(states)
    assert tokens.shape == (2, 9, 8)
    for part, level in zip(tokens.split(3, dim=1), (3, 2, 0), strict=True):
        gradients = torch.autograd.grad(part.sum(), states, retain_graph=True, allow_unused=True)
        assert [i for i, gradient in enumerate(gradients) if gradient is not None and gradient.any()] == [
            level
        ]


def test_the_configuration_is_saved(tmp_path: Path) -> None:
    projector = StyleProjector(hidden_size=8, siglip_width=6, siglip_tokens=5, tokens_per_level=3)
    projector.save_pretrained(tmp_path)
    again = StyleProjector.from_pretrained(tmp_path)
    assert again.config.tokens_per_level == 3
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), projector.parameters(), strict=True))


def test_three_levels_are_required() -> None:
    with pytest.raises(ValueError, match=r"`levels` must name 3 hidden states, got \(-1, -2\)"):
        StyleProjector(levels=(-1, -2))
