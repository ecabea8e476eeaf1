"""Train the nano transformer with its style encoder and projector: `python -m training.train --minutes 75`.

Resumes from its checkpoint; a new run starts from the encoders that `training.style` and `training.words`
have trained, or, by `--init assets/nano`, from shipped weights. Needs the latents. Rectified flow: noise and
conditions to the velocity, over a mix of condition kinds. Then the true picture: by its first prediction, at
pure noise, and on the way that it draws itself, decoded too, and, with `training.reward`'s network, that look
and subject asked for are found there, the more the guidance is turned up; of photographs less the pixels than
their colours and texture (`training.textures`). In one step of 24 its own guided velocity, so that one pass
at inference does what two would, and to mix two looks; in all others the style tokens learn to tell their
look (`training.tells`).
"""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from training.data import CACHE, PHOTOS
from training.latents import LATENTS, as_encoded, unit_normal
from training.loop import (
    MuonAdamW,
    Run,
    autocast,
    averaged_weights,
    data_rng,
    device,
    launch,
    training_options,
)
from training.models import (
    SHIFT,
    STYLE_SIZE,
    STYLE_TOKENS,
    build_conditioning,
    build_transformer,
)
from training.pool import PICTURES, POOL, TRAINED
from training.reward import CHECKPOINT as REWARD_CHECKPOINT
from training.reward import Reward, load_reward, shown
from training.style import CHECKPOINT as STYLE_CHECKPOINT
from training.tells import Tells, to_be_told
from training.text import build_tokenizers, encode_prompts, load_tokenizers
from training.textures import textures_off
from training.vae import load_vae
from uso.model.geometry import pack_latents, position_ids, reference_position_ids, unpack_latents
from uso.model.pipeline import USOPipeline

CHECKPOINT = CACHE / "nano.pt"
WORDS_CHECKPOINT = CACHE / "words.pt"
TOKENIZERS = CACHE / "tokenizers"

# Condition kinds: style pictures, content picture, prompt; and their share of the batches.
# "look" is the look in words. Without style and look the target is the plain picture. By "text" the prompt
# alone tells the subject, which is always drawn alike: of all its drawings the mean would be a blur.
KINDS = {
    "content + style": 0.68,
    "content + 2 styles": 0.06,
    "style + text": 0.12,
    "content + look": 0.03,
    "content": 0.01,
    "text": 0.07,
    "text + look": 0.03,
}
# What the steps learn, one after the other. From pictures mixed with noise it learns to see things in noise,
# and each seed's are others: no more of it than keeps guidance and mixing. Most of what is coarse is
# settled by the first prediction, and learned there at a sixth of what a way costs.
TURNS = ("first", "drawn") * 11 + ("first", "guided")
LATENTS_FIRST = {1: 0.4, 2: 0.4, 4: 0.2}  # weights of the first prediction's decibels, by sides of squares
MIXED = 0.5  # of the batches that learn guidance: two style pictures of different looks
PATH = 8  # steps that lead from noise to the picture, where it learns what it draws itself
COUNTED = 3  # of them, the last one and others at random
PARTS = 0.5  # weight of the squared error there
COLOURS = 1.5  # and of that of colours
PIXELS = {1: 0.2, 4: 0.4, 16: 0.4}  # and of the decibels of what the decoder shows, by sides of squares
DECODED = 0.65  # of the pictures, there, photographs first
REWARD = 0.26  # its weight at the end of the slider
TEXTURE = 20.0  # beside finding the look: its texture as in the true picture; a gradient twice as large
LEAST = 1e-3  # of the squared error of pixels in [-1, 1]: 36 dB and more count alike
LEAST_LATENTS = 1e-2  # of that of unit-normal latents
PHOTOGRAPHS = 0.3  # weight of these errors where the content is a photograph: most is guessed there
TEXTURES = 1.0  # and of its texture's and colours', of the last prediction, often of an earlier one too
TELLS = 0.5  # of what the style tokens shall tell of a look
SAME = 0.2  # of the style pictures beside content: a part of them is that of the one to be drawn
LEAST_PART = 0.6  # of either side
SHEETS = 0.06  # of the others: four subjects in the look on one sheet, not one subject
RELOAD = 100  # steps
SLIDER = (1.0, 5.0)  # `guidance_scale` as the user gives it
TEMPLATES = ("{}", "a {}", "a picture of a {}", "{} in this style", "the {}", "a photo of a {}")
LOOK_TEMPLATES = ("{}", "{} style", "in the style of {}", "make it {}")


def guidance_weight(slider: Tensor, sigma: Tensor) -> Tensor:
    """Classifier-free guidance that a slider value stands for: 1 at 1, 2.2 at the default 4, below sigma .88.

    Nearer pure noise it is less, there none: it would drive the colours beyond those asked for (Kynkäänniemi
    et al., 2024, on the interval).
    """
    return 1 + (slider - 1) * 0.4 * ((1 - sigma) / 0.12).clamp(max=1)


@dataclass
class Batch:
    """Pictures of one size and one kind of conditions.

    `target` and `content`: unit-normal latents `(B, 16, h, w)`; `pixels`, of the target: `(B, 3, 8h, 8w)`,
    and `style`: `(B, S, 3, 128, 128)`, in [-1, 1].
    """

    target: Tensor
    pixels: Tensor
    content: Tensor | None
    style: Tensor | None
    prompts: list[str]
    mixed: bool = False  # the two style pictures are of different looks
    looks: Tensor | None = None  # `(L, E)`: what `Reward` makes of the shard's looks
    right: Tensor | None = None  # `(B,)`: which of them is each picture's
    named: Tensor | None = None  # `(B,)`: the subject that only the prompt tells; -1: none
    told: Tensor | None = None  # `(B, D)`: what `Tells` shall read from the first style picture's tokens
    photographs: int = 0  # so many of the first contents are photographs

    @property
    def conditions(self) -> dict[str, Any]:
        """What `Nano` is called with beside noise."""
        return {"content": self.content, "style": self.style, "prompts": self.prompts}

    def first(self, count: int) -> "Batch":
        """Its first pictures."""
        parts: dict[str, Any] = {
            name: part[:count]
            for name, part in vars(self).items()
            if name != "looks" and isinstance(part, Tensor | list)
        }
        return replace(self, photographs=min(self.photographs, count), **parts)

    @property
    def weights(self) -> Tensor:
        """Of each picture's errors, `(B,)`."""
        weights = torch.ones(len(self.target), device=self.target.device)
        weights[: self.photographs] = PHOTOGRAPHS
        return weights

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        moved: dict[str, Any] = {
            name: part.to(device) for name, part in vars(self).items() if isinstance(part, Tensor)
        }
        return replace(self, **moved)


class Shard:
    """One shard of the pool with its latents."""

    def __init__(self, name: str, subjects: list[str], reward: Reward | None) -> None:
        self.name, self.split = name, name.partition("-")[0]
        self.content, self.target = (
            np.load(LATENTS / name / f"{kind}.npy", mmap_mode="r") for kind in ("content", "target")
        )
        self.plain, self.pictures = (
            np.load(POOL / name / f"{kind}.npy", mmap_mode="r") for kind in ("content", "target")
        )
        self.shown = shown(name)
        self.subjects = [subjects[row] for row in self.shown]
        self.photographs = np.isin(self.subjects, [subject for *_, subject in PHOTOS])
        looks = json.loads((POOL / name / "looks.json").read_text())  # "words": family, then colours
        self.looks = [look["words"] for look in looks for _ in range(PICTURES)]
        self.told = np.stack([to_be_told(look) for look in looks])
        self.reward = reward

    @cached_property
    def look_vectors(self) -> Tensor | None:
        """Its looks as the reward knows them, `(L, E)`."""
        if self.reward is None:
            return None
        with torch.no_grad(), autocast():
            return self.reward.describe_looks(unit_normal(self.target).to(device())).float()

    def style(self, row: int) -> Tensor:
        """Target picture `row` as the style encoder sees it, `(3, 128, 128)`."""
        return _as_style(self.pictures[row])

    def sheet(self, rows: Sequence[int]) -> Tensor:
        """Four target pictures side by side as the style encoder sees them, `(3, 128, 128)`."""
        a, b, c, d = self.pictures[rows]
        return _as_style(np.vstack([np.hstack([a, b]), np.hstack([c, d])]))

    def random_style(self, row: int, rng: np.random.Generator, same: float) -> tuple[Tensor, bool]:
        """The look of picture `row` and whether it is in its size and place.

        It is told by another picture, by one of which a part is that of picture `row` (by a chance of
        `same`), or by a sheet of others.
        """
        if rng.random() < same:
            other = self.siblings(row, rng, 1)[0]
            return _as_style(with_part(rng, self.pictures[other], self.pictures[row])), True
        if rng.random() < SHEETS:
            return self.sheet(self.siblings(row, rng, 4)), False
        return self.style(self.siblings(row, rng, 1)[0]), True

    def siblings(self, row: int, rng: np.random.Generator, count: int) -> list[int]:
        """`count` other pictures in the look of picture `row`."""
        first = row - row % PICTURES
        others = [r for r in range(first, first + PICTURES) if self.subjects[r] != self.subjects[row]]
        return [int(r) for r in rng.choice(others, count, replace=len(others) < count)]

    def targets(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """The latents to be drawn under conditions of one kind, and their pictures."""
        plain = kind in ("content", "text")
        return (self.content, self.plain) if plain else (self.target, self.pictures)

    def prompt(self, kind: str, row: int, rng: np.random.Generator) -> tuple[str, bool]:
        """A prompt for picture `row` under conditions of one kind, and whether it tells the subject."""
        subject = TEMPLATES[rng.integers(len(TEMPLATES))].format(self.subjects[row])
        words = self.looks[row] if rng.random() < 0.75 else self.looks[row].partition(",")[0]
        look = LOOK_TEMPLATES[rng.integers(len(LOOK_TEMPLATES))].format(words)
        # Empty prompts and no content at all are needed too: guidance is measured from there.
        chance = 0.9 if "text" in kind else 0.4 if "look" in kind else 0.3 if "style" in kind else 0
        told = bool(rng.random() < chance)
        return ", ".join([subject] * told + [look] * ("look" in kind)), told

    def batch(self, kind: str, rows: Sequence[int], rng: np.random.Generator) -> Batch:
        """The pictures `rows` under conditions of one kind, photographs first."""
        rows = sorted(rows, key=lambda row: not self.photographs[row])
        mixed = "mixed" in kind
        styles = 2 if "styles" in kind else int("style" in kind)
        prompts, pictures, named, known = [], [], [], []
        alone = "text" in kind  # the prompt alone tells the subject
        targets, drawings = self.targets(kind)
        for row in rows:
            prompt, told = self.prompt(kind, row, rng)
            prompts.append(prompt)
            named.append(self.shown[row] if told else -1)
            if styles:
                of = [row, int(rng.integers(len(self.looks)))] if mixed else [row] * styles
                drawn = [self.random_style(r, rng, 0 if alone else SAME) for r in of]
                pictures.append(torch.stack([picture for picture, _ in drawn]))
                known.append([drawn[0][1]])
        looks = np.array(rows) // PICTURES
        return Batch(
            target=unit_normal(targets[rows]),
            pixels=torch.stack([_as_style(drawings[row]) for row in rows]),
            content=unit_normal(self.content[rows]) if "content" in kind else None,
            style=torch.stack(pictures) if styles else None,
            prompts=prompts,
            mixed=mixed,
            looks=self.look_vectors if styles and not mixed else None,
            right=torch.from_numpy(looks),
            photographs=int(self.photographs[rows].sum()),
            named=torch.tensor(named) if alone else None,
            told=torch.from_numpy(np.where(known, self.told[looks], np.nan)) if styles else None,
        )


def with_part(rng: np.random.Generator, picture: np.ndarray, other: np.ndarray) -> np.ndarray:
    """A uint8 `(H, W, 3)` picture in which a random rectangle is that of another one."""
    out = picture.copy()
    height, width = (round(rng.uniform(LEAST_PART, 1) * length) for length in picture.shape[:2])
    top, left = rng.integers(len(out) - height + 1), rng.integers(out.shape[1] - width + 1)
    part = slice(top, top + height), slice(left, left + width)
    out[part] = other[part]
    return out


def _as_style(picture: np.ndarray) -> Tensor:
    small = cv2.resize(picture, (STYLE_SIZE, STYLE_SIZE), interpolation=cv2.INTER_AREA)
    return torch.from_numpy(small / np.float32(127.5) - 1).permute(2, 0, 1)


def load_shards(known: list[Shard], reward: Reward | None, kind: type[Shard] = Shard) -> list[Shard]:
    """The training shards that are encoded by now, beside those already known."""
    subjects = [subject["name"] for subject in json.loads((POOL / "subjects.json").read_text())]
    names = {path.name for split in TRAINED for path in LATENTS.glob(f"{split}-*")}
    return known + [kind(name, subjects, reward) for name in sorted(names - {shard.name for shard in known})]


def draw_kind(rng: np.random.Generator, *, guided: bool) -> str:
    """A kind of conditions."""
    if guided and rng.random() < MIXED:
        return "content + mixed styles"
    return str(rng.choice(list(KINDS), p=list(KINDS.values())))


def draw_batch(shards: list[Shard], kind: str, rng: np.random.Generator, size: int) -> Batch:
    """A batch of one shard: `size` pictures, without content twice as many."""
    split = "named" if "text" in kind else "train"
    fitting = [shard for shard in shards if shard.split == split]
    shard = fitting[rng.integers(len(fitting))]
    if "content" not in kind:
        size *= 2  # without its tokens they are shorter
    rows = rng.choice(len(shard.target), size, replace=False)
    return shard.batch(kind, rows.tolist(), rng).to(device())


Encoded = tuple[Tensor, Tensor, Tensor | None]


class Nano(nn.Module):
    """Transformer and condition encoders, called as the pipeline calls them, on batches; a frozen decoder."""

    def __init__(self, tokenizers: Path) -> None:
        super().__init__()
        self.tokenizers = load_tokenizers(tokenizers)
        self.transformer = build_transformer()
        self.conditioning = build_conditioning(self.tokenizers[0].eos_token_id)
        self.vae = load_vae().to(memory_format=torch.channels_last)
        self.tells = Tells()
        for block in [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]:
            for name, module in block.named_modules():
                if name.startswith("norm") and isinstance(module, nn.Linear):
                    nn.init.zeros_(module.weight)  # adaLN-zero: each block starts as the identity
        nn.init.zeros_(self.transformer.proj_out.weight)
        self.style_tokens: Tensor | None = None
        self.transformer.context_embedder.register_forward_hook(self._prepend_style)

    def _prepend_style(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output if self.style_tokens is None else torch.cat([self.style_tokens, output], dim=1)

    def references(self, content: Tensor | None, style: Tensor | None) -> list[Tensor]:
        """The pictures that stand beside the noise as latents: the content alone."""
        return [] if content is None else [content]

    def encode_style(self, pictures: Tensor) -> Tensor | None:
        """`(B, S, 3, H, W)` pictures to tokens `(B, S * K, hidden)`."""
        hidden_states = self.conditioning["image_encoder"](
            pictures.flatten(0, 1), output_hidden_states=True
        ).hidden_states
        return (
            self.conditioning["style_projector"](hidden_states).unflatten(0, pictures.shape[:2]).flatten(1, 2)
        )

    def encode(self, style: Tensor | None, prompts: list[str]) -> Encoded:
        """T5 states `(B, T, D)`, pooled CLIP `(B, P)` and style tokens `(B, S * K, hidden)`."""
        states, pooled = encode_prompts(self.tokenizers, self.conditioning, prompts)
        return states, pooled, None if style is None else self.encode_style(style)

    def forward(
        self,
        latents: Tensor,
        sigma: Tensor,
        slider: Tensor,
        *,
        content: Tensor | None,
        style: Tensor | None,
        prompts: list[str],
        encoded: Encoded | None = None,
    ) -> Tensor:
        """Velocity `(B, N, 64)` of noisy `latents` `(B, 16, h, w)` at `sigma` `(B,)`.

        `encoded`: what `encode` makes of style and prompts, if it is known.
        """
        states, pooled, self.style_tokens = encoded or self.encode(style, prompts)
        pictures = [latents, *self.references(content, style)]
        grids = [(picture.shape[2] // 2, picture.shape[3] // 2) for picture in pictures]
        tokens = torch.cat([pack_latents(picture) for picture in pictures], dim=1)
        length = grids[0][0] * grids[0][1]
        ids = [position_ids(*grids[0]), *reference_position_ids(grids[0], grids[1:])]
        text_length = states.shape[1] + (0 if self.style_tokens is None else self.style_tokens.shape[1])
        return self.transformer(
            hidden_states=tokens,
            timestep=sigma,
            guidance=slider,
            pooled_projections=pooled,
            encoder_hidden_states=states,
            txt_ids=torch.zeros(text_length, 3, device=latents.device),
            img_ids=torch.cat(ids).to(latents.device),
            return_dict=False,
        )[0][:, :length]

    def told_loss(self, encoded: Encoded, batch: Batch) -> Tensor:
        """What the first style picture's tokens do not tell of its look."""
        if encoded[2] is None or batch.told is None:
            return torch.zeros((), device=batch.target.device)
        return TELLS * self.tells.loss(encoded[2][:, :STYLE_TOKENS], batch.told)

    def load_exported(self, folder: Path) -> None:
        """Take the weights of an exported pipeline."""
        pipeline = USOPipeline.from_pretrained(folder, dtype=torch.float32)
        self.transformer.load_state_dict(pipeline.transformer.state_dict())
        self.vae.load_state_dict(pipeline.vae.state_dict())
        for name, module in self.conditioning.items():
            module.load_state_dict(pipeline.components[name].state_dict())

    def optimizer(self, lr: float) -> MuonAdamW:
        """Muon for the matrices of all blocks, AdamW for all else but the frozen autoencoder."""
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, p in self.named_parameters():
            inner = (
                "blocks." in name or ".layers." in name or ".block." in name
            ) and "relative_attention" not in name
            if p.requires_grad:
                (matrices if inner and p.ndim == 2 else others).append(p)
        return MuonAdamW(matrices, others, lr)


@torch.no_grad()
def guided_velocity(
    teacher: Nano, noisy: Tensor, sigma: Tensor, slider: Tensor, velocity: Tensor, batch: Batch
) -> Tensor:
    """`velocity` pushed from the teacher's prediction without any condition towards its full one.

    Measured from the content alone, guidance keeps the look and loses the subject. Two different looks have
    no true velocity: the mean of what the teacher predicts for each stands in for it.
    """
    lowest = torch.full_like(slider, SLIDER[0])
    styles = batch.style.split(1, dim=1) if batch.mixed and batch.style is not None else [batch.style]
    full = torch.stack(
        [
            teacher(noisy, sigma, lowest, content=batch.content, style=style, prompts=batch.prompts)
            for style in styles
        ]
    ).mean(0)
    if batch.mixed:
        velocity = full
    empty = teacher(noisy, sigma, lowest, content=None, style=None, prompts=[""] * len(noisy))
    return velocity + (guidance_weight(slider, sigma) - 1)[:, None, None] * (full - empty)


def loss_of(model: Nano, batch: Batch, teacher: Nano | None) -> Tensor:
    """Mean squared error of the velocity at random noise levels; with a teacher, of the guided velocity."""
    clean, noise = batch.target, torch.randn_like(batch.target)
    # Logit-normal, well above the middle: near 1 the conditions alone decide what the picture becomes.
    # At .9 the noisy picture tells its subject, and the prompt nothing more.
    middle = 1.2 if batch.named is None else 3.0
    sigma = torch.sigmoid(1.3 * torch.randn(len(clean), device=clean.device) + middle)
    noisy = torch.lerp(clean, noise, sigma[:, None, None, None])
    velocity = pack_latents(noise - clean)
    slider = torch.full_like(sigma, SLIDER[0])
    if teacher is not None:
        slider = random_slider(len(clean), clean.device)
        velocity = guided_velocity(teacher, noisy, sigma, slider, velocity, batch)
    output = model(noisy, sigma, slider, **batch.conditions)
    return F.mse_loss(output.float(), velocity.float())


def random_slider(count: int, device: torch.device) -> Tensor:
    """Slider values `(count,)`, more of the upper end."""
    return SLIDER[0] + (SLIDER[1] - SLIDER[0]) * torch.rand(count, device=device).sqrt()


def shifted(t: Tensor) -> Tensor:
    """Noise levels where `t` goes evenly from 1 to 0, as in the schedule: most of them high.

    There it is told apart what the picture becomes; in small steps at lower levels errors add up.
    """
    return t / (t + math.exp(-SHIFT) * (1 - t))


def unpacked(tokens: Tensor, *, like: Tensor) -> Tensor:
    """Tokens `(B, N, 64)` as latents of the shape of `like`."""
    return unpack_latents(tokens.float(), height=8 * like.shape[2], width=8 * like.shape[3])


def first_loss(model: Nano, batch: Batch) -> Tensor:
    """Decibels of the latents that are predicted at pure noise, by squares of one to four."""
    clean = batch.target
    slider, noise = random_slider(len(clean), clean.device), torch.randn_like(clean)
    encoded = model.encode(batch.style, batch.prompts)
    output = model(noise, torch.ones_like(slider), slider, **batch.conditions, encoded=encoded)
    off = noise - unpacked(output, like=clean) - clean
    errors = batch.weights * decibels(off, LATENTS_FIRST, LEAST_LATENTS)
    return errors.mean() + model.told_loss(encoded, batch)


def drawn_loss(model: Nano, batch: Batch, reward: Reward | None) -> Tensor:
    """How far what is predicted at COUNTED of PATH steps of its own, from pure noise on, is from the picture.

    There no trace of the true picture helps, as there is in noise mixed with it. Counted are the squared
    error, most of all that of colours 16 pixels square, for finer parts would be blurred; with a reward also
    texture, and whether look and subject that only style picture and prompt tell are found, the more
    guidance is asked for. Of the last prediction the decoder's picture counts as well; where it is a
    photograph redrawn, errors count less, and colours and texture, wherever they lie, of that one and, two
    times in three, of an earlier one.
    """
    clean = batch.target
    slider = random_slider(len(clean), clean.device)
    encoded = model.encode(batch.style, batch.prompts)
    latents, sigma = torch.randn_like(clean), torch.ones_like(slider)
    if batch.looks is None and batch.named is None:
        reward = None  # nothing that it knows is asked for
    highest = guidance_weight(torch.tensor(SLIDER[1]), torch.tensor(0.0))
    with torch.no_grad():
        texture = None if reward is None or batch.looks is None else reward(clean)[2]
    loss = torch.zeros((), device=clean.device)
    counted = [*(1 + torch.randperm(PATH - 1)[: COUNTED - 1]).tolist(), PATH]
    textured = counted[int(torch.randint(COUNTED, ()))]
    weights, photographs = batch.weights[:, None, None, None], batch.photographs
    for step in range(1, PATH + 1):
        with torch.set_grad_enabled(step in counted):
            output = model(latents, sigma, slider, **batch.conditions, encoded=encoded)
        velocity = unpacked(output, like=latents)
        if step in counted:
            predicted = latents - sigma[:, None, None, None] * velocity
            loss += PARTS * (weights * (predicted - clean).square()).mean()
            loss += COLOURS * (weights * F.avg_pool2d(predicted - clean, 2).square()).mean()
            if step == textured != PATH and photographs:
                seen = model.vae.decoder(as_encoded(predicted[:photographs])).float()
                off = textures_off(seen, batch.pixels[:photographs])
                loss += COUNTED * TEXTURES * off.sum() / len(clean)
            asked = REWARD * (guidance_weight(slider, sigma) - 1) / (highest - 1)
            if reward is not None:
                loss += (asked * missed(reward, predicted, batch, texture)).mean()
        then = shifted(1 - (step - torch.rand_like(sigma)) / (PATH - 1))
        latents = (latents + (then - sigma)[:, None, None, None] * velocity).detach()
        sigma = then
    part = batch.first(round(DECODED * len(clean)))
    loss = loss / COUNTED + shown_loss(model.vae, predicted, part, reward, asked, texture)
    return loss + model.told_loss(encoded, batch)


def shown_loss(
    vae: AutoencoderKL,
    predicted: Tensor,
    batch: Batch,
    reward: Reward | None,
    asked: Tensor,
    texture: Tensor | None,
) -> Tensor:
    """How far the decoder's pictures of the first `predicted` latents are from those of a batch.

    Counted are decibels, more those of squares of four pixels, for finer parts would be blurred; colours and
    texture of photographs; and what the reward misses in the picture encoded again, as much as `asked`.
    `texture`: what it has of the true pictures'.
    """
    count = len(batch.target)
    seen = vae.decoder(as_encoded(predicted[:count])).float()
    loss = batch.weights * decibels(seen - batch.pixels, PIXELS)
    if photographs := batch.photographs:
        loss[:photographs] += TEXTURES * textures_off(seen[:photographs], batch.pixels[:photographs])
    if reward is not None:
        again = unit_normal(vae.encoder(seen).chunk(2, dim=1)[0])
        loss += asked[:count] * missed(reward, again, batch, None if texture is None else texture[:count])
    return loss.mean()


def decibels(off: Tensor, weights: dict[int, float], least: float = LEAST) -> Tensor:
    """Weighted logarithms of the squared errors `off` `(B, C, H, W)` of squares, by their sides: `(B,)`."""
    loss = torch.zeros(len(off), device=off.device)
    for side, weight in weights.items():
        loss += weight * (F.avg_pool2d(off, side).square().mean((1, 2, 3)) + least).log()
    return loss


def missed(reward: Reward, predicted: Tensor, batch: Batch, true_texture: Tensor | None) -> Tensor:
    """What the reward misses in predicted latents, `(B,)`: look and its texture, and a named subject.

    `true_texture`: `(B, F)`, that of the true pictures, where a look is asked for.
    """
    look, subject, texture = reward(predicted)
    lost = torch.zeros(len(predicted), device=predicted.device)
    if batch.looks is not None and batch.right is not None and true_texture is not None:
        lost += reward.look_loss(look, batch.looks, batch.right)
        lost += TEXTURE * F.smooth_l1_loss(texture, true_texture, reduction="none").mean(1)
    if batch.named is not None:
        lost += reward.subject_loss(subject, batch.named)
    return lost


def prepare_tokenizers(init: Path | None) -> None:
    """Those of `init`, whose weights know no others; else those of the cache, trained first if need be."""
    if init:
        for name in ("tokenizer", "tokenizer_2"):
            shutil.copytree(init / name, TOKENIZERS / name, dirs_exist_ok=True)
    elif not TOKENIZERS.exists():
        build_tokenizers(TOKENIZERS)


def encoder_weights(checkpoint: Path) -> dict[str, Tensor]:
    """What `Nano` has of the averaged weights of `training.style` or `training.words`, by its names."""
    weights = averaged_weights(checkpoint)
    return {name: tensor for name, tensor in weights.items() if name.startswith(("conditioning.", "tells."))}


def train(
    minutes: float,
    size: int,
    lr: float,
    distill_from: float,
    init: Path | None,
    checkpoint: Path,
    seed: int,
    compiled: bool = False,
    nano: type[Nano] = Nano,
    shard: type[Shard] = Shard,
) -> None:
    """One process's work."""
    model, teacher = nano(TOKENIZERS), nano(TOKENIZERS).requires_grad_(False)
    reward = load_reward(REWARD_CHECKPOINT).to(device()) if REWARD_CHECKPOINT.exists() else None
    if init:
        model.load_exported(init)
    else:
        for path in (STYLE_CHECKPOINT, WORDS_CHECKPOINT):
            if path.exists():
                model.load_state_dict(encoder_weights(path), strict=False)
    model, teacher = model.to(device()), teacher.to(device())
    if compiled:
        torch._dynamo.config.recompile_limit = 32  # with gradients and without, of every kind's shapes
        for each in (model, teacher):
            each.transformer.compile_repeated_blocks(dynamic=True)
    run = Run(model, model.optimizer(lr), lr=lr, minutes=minutes, checkpoint=checkpoint)
    teacher.load_state_dict(model.state_dict())
    rng = data_rng(seed, run.step)
    torch.manual_seed(int(rng.integers(2**31)))
    names = run.average_names()
    shards = load_shards([], reward, shard)
    smooth: float | None = None
    while run.progress < 1:
        if run.step % RELOAD == 0:  # what `training.latents` has encoded meanwhile
            shards = load_shards(shards, reward, shard)
        turn = TURNS[run.step % len(TURNS)] if run.progress > distill_from else "plain"
        # the same in all processes: they wait for each other, and some kinds take twice as long as others
        kind = draw_kind(np.random.default_rng((seed, run.step)), guided=turn == "guided")
        batch = draw_batch(shards, kind, rng, 2 * size if turn == "first" else size)
        if turn == "guided":
            teacher.load_state_dict(dict(zip(names, run.average, strict=True)), strict=False)
        with autocast():
            if turn == "first":
                loss = first_loss(model, batch)
            elif turn == "drawn":
                loss = drawn_loss(model, batch, reward)
            else:
                loss = loss_of(model, batch, teacher if turn == "guided" else None)
        run.update(loss)
        smooth = loss.item() if smooth is None else 0.99 * smooth + 0.01 * loss.item()
        run.show(f"loss {smooth:.4f}")


if __name__ == "__main__":
    parser = training_options(__doc__, minutes=75)
    parser.add_argument("--batch", type=int, default=12, help="pictures a process and step")
    parser.add_argument(
        "--distill-from",
        type=float,
        default=0.7,
        help="part of the run from which on guidance and drawing are learned; 1: never (default 0.7)",
    )
    parser.add_argument("--init", type=Path, help="diffusers folder to start from, such as assets/nano")
    parser.add_argument("--compile", action="store_true", help="the blocks: minutes first, then faster steps")
    a = parser.parse_args()
    prepare_tokenizers(a.init)
    launch(
        train,
        a.minutes,
        a.batch,
        a.lr,
        a.distill_from,
        a.init,
        CHECKPOINT,
        a.seed,
        a.compile,
        processes=a.processes,
        seed=a.seed,
    )
