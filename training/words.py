"""Train the text encoders alone first: `python -m training.words --minutes 10`.

From the prompt a small reader draws latents at once: a subject's one drawing, plain or in a look; what the
transformer has to make of pure noise. `training.train` starts from the encoders that learned
it, without the reader: beside pictures, words have too little to say for untrained encoders to learn much.
Needs the latents.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.loop import Run, autocast, data_rng, device, launch, layers_by_muon, training_options
from training.models import NATIVE_SIDE, TEXT_WIDTH, build_text_encoders
from training.style import found
from training.text import encode_prompts, load_tokenizers
from training.train import TOKENIZERS, WORDS_CHECKPOINT, load_shards, prepare_tokenizers
from uso.model.geometry import pack_latents

LOOKS = 0.2  # of the batches: the drawing in a look
WIDTH = 192
POSITIONS = (NATIVE_SIDE // 16) ** 2


class Words(nn.Module):
    """Prompts to packed latents `(B, POSITIONS, 64)`."""

    def __init__(self, tokenizers: Path) -> None:
        super().__init__()
        self.tokenizers = load_tokenizers(tokenizers)
        self.conditioning = build_text_encoders(self.tokenizers[0].eos_token_id)
        self.query = nn.Parameter(torch.randn(1, POSITIONS, WIDTH))
        self.pooled = nn.Linear(TEXT_WIDTH, WIDTH)
        self.read = nn.MultiheadAttention(WIDTH, 3, kdim=TEXT_WIDTH, vdim=TEXT_WIDTH, batch_first=True)
        self.draw = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 64))

    def forward(self, prompts: list[str]) -> Tensor:
        states, pooled = encode_prompts(self.tokenizers, self.conditioning, prompts)
        query = self.query + self.pooled(pooled)[:, None]
        return self.draw(query + self.read(query, states, states, need_weights=False)[0])


def train(minutes: float, size: int, lr: float, checkpoint: Path, seed: int) -> None:
    """One process's work: `size` prompts of one shard and kind a step."""
    model = Words(TOKENIZERS).to(device())
    run = Run(model, layers_by_muon(model, lr), lr=lr, minutes=minutes, checkpoint=checkpoint)
    rng = data_rng(seed, run.step)
    shards = [shard for shard in load_shards([], None) if shard.split == "named"]
    seen: np.ndarray | None = None
    while run.progress < 1:
        shard = shards[rng.integers(len(shards))]
        rows = rng.choice(len(shard.target), min(size, len(shard.target)), replace=False)
        plain = rng.random() > LOOKS
        batch = shard.batch("text" if plain else "text + look", rows.tolist(), rng)
        target = pack_latents(batch.target).to(device())
        with autocast():
            drawn = model(batch.prompts).float()
        loss = F.mse_loss(drawn, target)
        run.update(loss)
        if plain:
            vectors = (
                F.normalize((each.detach() - target.mean(0)).flatten(1), dim=1) for each in (drawn, target)
            )
            now = np.array([loss.item(), found(*vectors)])
            seen = now if seen is None else 0.98 * seen + 0.02 * now
            run.show(f"loss {seen[0]:.4f} found {seen[1]:.1%}")


if __name__ == "__main__":
    parser = training_options(__doc__, minutes=10)
    parser.add_argument("--batch", type=int, default=128, help="prompts a process and step")
    a = parser.parse_args()
    prepare_tokenizers(None)
    launch(train, a.minutes, a.batch, a.lr, WORDS_CHECKPOINT, a.seed, processes=a.processes, seed=a.seed)
