"""The road to assets/nano, each command for a step or two on a tiny pool: trains, resumes, exports, loads."""

import json
import math
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from diffusers.models.embeddings import apply_rotary_emb
from PIL import Image

from training import (
    ablate,
    cpu,
    decoder,
    export,
    judges,
    latents,
    loop,
    models,
    reward,
    style,
    tells,
    text,
    textures,
    train,
    vae,
    words,
)
from training.looks import draw_look
from training.pool import PICTURES
from uso.model.pipeline import USOPipeline

ONE_STEP = 1e-9  # minutes: over when the first step is done


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pool of two shards of two looks each, and a group of this process alone."""
    for module in (vae, latents, text, style, reward, train, decoder, export, ablate, words):
        for name, path in (
            ("POOL", "pool"),
            ("LATENTS", "latents"),
            ("TOKENIZERS", "tokenizers"),
            ("NANO", "nano"),
        ):
            monkeypatch.setattr(module, name, tmp_path / path, raising=False)
    for module in (vae, latents, export):
        for name, path in (("CHECKPOINT", "vae.pt"), ("VAE_CHECKPOINT", "vae.pt")):
            monkeypatch.setattr(module, name, tmp_path / path, raising=False)
    for module in (train, export):
        monkeypatch.setattr(module, "CHECKPOINT", tmp_path / "nano.pt")
    for module, name in ((decoder, "CHECKPOINT"), (export, "DECODER_CHECKPOINT")):
        monkeypatch.setattr(module, name, tmp_path / "decoder.pt")
    monkeypatch.setattr(style, "CHECKPOINT", tmp_path / "style.pt")
    for module in (train, ablate):
        monkeypatch.setattr(module, "STYLE_CHECKPOINT", tmp_path / "style.pt")
    for module in (train, words):
        monkeypatch.setattr(module, "WORDS_CHECKPOINT", tmp_path / "words.pt")
    for module, name in ((reward, "CHECKPOINT"), (train, "REWARD_CHECKPOINT")):
        monkeypatch.setattr(module, name, tmp_path / "reward.pt")
    monkeypatch.setattr(ablate, "FOLDER", tmp_path)
    looks = [{"id": 0, "family": "painting: oil", "words": "oil painting, navy and cream"}]
    drawn = draw_look(np.random.default_rng(0), "halftone")
    told = {"params": drawn.params, "palette": drawn.palette.tolist()}
    looks.append({"id": 1, "family": drawn.family, "words": drawn.words, **told})
    for i, split in enumerate(("train", "named")):
        shard = tmp_path / "pool" / f"{split}-0000"
        shard.mkdir(parents=True)
        pictures = np.random.default_rng(i).integers(0, 256, (2, 2 * PICTURES, 128, 128, 3), np.uint8)
        np.save(shard / "content.npy", pictures[0])
        np.save(shard / "target.npy", pictures[1])
        np.save(shard / "subject.npy", np.arange(2 * PICTURES))
        (shard / "looks.json").write_text(json.dumps(looks))
    subjects = [{"name": f"subject {i}", "held_out": False} for i in range(2 * PICTURES)]
    (tmp_path / "pool" / "subjects.json").write_text(json.dumps(subjects))
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents" / "scale.json").write_text('{"shift_factor": 0.5, "scaling_factor": 2}')
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    torch.manual_seed(0)
    yield tmp_path
    dist.destroy_process_group()


def prepare() -> None:
    """An autoencoder, the pool's latents by it, and tokenizers: what a training starts from."""
    vae.train(ONE_STEP, 4, 1e-3, vae.CHECKPOINT, 0)
    latents.encode_pool()
    latents.write_scale()
    text.build_tokenizers(train.TOKENIZERS)


def pipeline_and_nano() -> tuple[USOPipeline, train.Nano]:
    """Both with the same random weights."""
    text.build_tokenizers(train.TOKENIZERS)
    pipeline = export.build_pipeline()
    nano = train.Nano(train.TOKENIZERS)
    for parameter in pipeline.transformer.parameters():  # no zeros: every path must count
        torch.nn.init.normal_(parameter, std=0.05)
    nano.transformer.load_state_dict(pipeline.transformer.state_dict())
    for name, module in nano.conditioning.items():
        module.load_state_dict(pipeline.components[name].state_dict())
    return pipeline, nano


def test_every_step_from_pool_to_picture(cache: Path) -> None:
    prepare()
    encoded = np.load(cache / "latents" / "train-0000" / "target.npy")
    assert encoded.shape == (2 * PICTURES, 16, 16, 16)
    minutes = ONE_STEP
    for step, compiled in ((1, False), (2, True)):
        with torch.compiler.set_stance("force_eager"):
            train.train(minutes, 2, 1e-3, 0.7, None, train.CHECKPOINT, 0, compiled)
        state = torch.load(train.CHECKPOINT, weights_only=True)
        assert state["step"] == step
        minutes = state["elapsed"] / 60 + ONE_STEP
    folder = cache / "exported"
    export.export(folder)
    assert max(path.stat().st_size for path in folder.rglob("*")) < 9.5e6
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 25e6
    pipeline = USOPipeline.from_pretrained(folder, dtype=torch.float32)
    assert pipeline.vae.config.scaling_factor == pytest.approx(
        json.loads((cache / "latents" / "scale.json").read_text())["scaling_factor"]
    )
    average = loop.averaged_weights(train.CHECKPOINT)
    trained = average["transformer.proj_out.weight"]
    assert trained.abs().max() > 0  # it started at zero
    torch.testing.assert_close(pipeline.transformer.proj_out.weight, trained, atol=1e-4, rtol=1e-3)
    picture = Image.new("RGB", (64, 64), "red")
    drawn = pipeline(
        "a cat", content_image=picture, style_images=picture, height=512, width=512, num_inference_steps=4
    )
    assert drawn.images[0].size == (512, 512)
    t = torch.linspace(1, 0, 5)
    shifted = math.exp(models.SHIFT) * t / (1 + (math.exp(models.SHIFT) - 1) * t)
    torch.testing.assert_close(pipeline.scheduler.sigmas, shifted)

    # a new run goes on from the export, with its tokenizers
    train.CHECKPOINT.unlink()
    shutil.rmtree(train.TOKENIZERS)
    train.prepare_tokenizers(folder)
    for tokenizer in ("tokenizer", "tokenizer_2"):
        copied, exported = (path / tokenizer / "tokenizer_config.json" for path in (train.TOKENIZERS, folder))
        assert copied.read_bytes() == exported.read_bytes()
    train.train(ONE_STEP, 2, 1e-9, 0.7, folder, train.CHECKPOINT, 0)
    again = loop.averaged_weights(train.CHECKPOINT)["transformer.proj_out.weight"]
    torch.testing.assert_close(again, trained, atol=1e-4, rtol=1e-3)

    # and is mixed with what it started from
    state = torch.load(train.CHECKPOINT, weights_only=True)
    state["average"] = [3 * tensor for tensor in state["average"]]
    torch.save(state, train.CHECKPOINT)
    mixed = export.build_pipeline(folder, share=0.5).transformer.proj_out.weight
    torch.testing.assert_close(mixed, 2 * trained, atol=1e-4, rtol=1e-3)


def test_the_autoencoder_stays_as_it_is_while_the_transformer_learns(cache: Path) -> None:
    prepare()
    before = export.build_pipeline()
    before.save_pretrained(cache / "before")
    train.train(ONE_STEP, 2, 1e-3, -1, cache / "before", train.CHECKPOINT, 0)
    after = export.build_pipeline()
    known = dict(before.vae.named_parameters())
    for name, weight in after.vae.named_parameters():
        assert torch.equal(weight, known[name])
    assert not torch.equal(after.transformer.proj_out.weight, before.transformer.proj_out.weight)


def test_the_decoder_learns_to_show_what_is_drawn(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It alone changes, and is exported."""
    monkeypatch.setattr(decoder, "DRAWN_AT_ONCE", 4)
    prepare()
    before = export.build_pipeline()
    before.save_pretrained(cache / "before")
    decoder.train(ONE_STEP, 2, 1e-3, cache / "before", decoder.CHECKPOINT, 0)
    after, half = (export.build_pipeline(cache / "before", share=share) for share in (1, 0.5))
    for part in ("vae", "transformer", "image_encoder"):
        known = dict(before.components[part].named_parameters())
        for name, weight in after.components[part].named_parameters():
            assert name.startswith("decoder.") or torch.equal(weight, known[name])
    known, trained, mixed = (pipeline.vae.decoder.conv_out.weight for pipeline in (before, after, half))
    assert not torch.equal(trained, known)
    torch.testing.assert_close(mixed, (trained + known) / 2)


def test_the_decoder_sees_what_the_pipeline_draws(cache: Path) -> None:
    """From the same noise the same latents."""
    pipeline, nano = pipeline_and_nano()
    noise, pixels = torch.randn(1, 16, 16, 16), torch.zeros(1, 3, 128, 128)
    drawn = pipeline(
        "a cat",
        height=512,
        width=512,
        num_inference_steps=decoder.STEPS,
        guidance_scale=decoder.SLIDER,
        latents=train.pack_latents(noise),
        output_type="latent",
    ).images
    batch = train.Batch(target=noise, pixels=pixels, content=None, style=None, prompts=["a cat"])
    with mock.patch.object(torch, "randn_like", return_value=noise):
        seen = decoder.draw(nano, batch)
    torch.testing.assert_close(train.pack_latents(seen), drawn, atol=1e-4, rtol=1e-4)


def test_training_calls_the_model_as_the_pipeline_does(cache: Path) -> None:
    """The same weights and inputs give the same velocity through `Nano` and through `USOPipeline`."""
    pipeline, nano = pipeline_and_nano()
    content = Image.fromarray(np.random.default_rng(1).integers(0, 256, (512, 384, 3), np.uint8))
    style = Image.fromarray(np.random.default_rng(2).integers(0, 256, (128, 128, 3), np.uint8))
    noise = torch.randn(1, 16, 16, 16)
    drawn = pipeline(
        "subject 3, halftone",
        content_image=content,
        style_images=[style, style],
        height=512,
        width=512,
        num_inference_steps=1,
        guidance_scale=3.0,
        latents=train.pack_latents(noise),
        output_type="latent",
    ).images
    velocity = nano(
        noise,
        torch.ones(1),
        torch.full((1,), 3.0),
        content=pipeline.encode_content(
            content, content_long_size=512, shape=(512, 512), device=torch.device("cpu")
        ),
        style=torch.stack([pipeline.style_pixels(style)] * 2, dim=1),
        prompts=["subject 3, halftone"],
    )
    torch.testing.assert_close(drawn, train.pack_latents(noise) - velocity, atol=1e-4, rtol=1e-4)


def test_a_mix_of_looks_is_learned_as_the_mean_of_both(cache: Path) -> None:
    prepare()
    teacher = train.Nano(train.TOKENIZERS)
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    rng = np.random.default_rng(0)
    kinds = {train.draw_kind(rng, guided=True) for _ in range(2000)}
    assert kinds == {*train.KINDS, "content + mixed styles"}
    batch = train.draw_batch(train.load_shards([], None), "content + mixed styles", rng, 2)
    assert batch.mixed
    assert batch.style is not None
    noisy, sigma, slider = torch.randn(2, 16, 16, 16), torch.full((2,), 0.9), torch.ones(2)
    with torch.no_grad():
        first, second = (
            teacher(noisy, sigma, slider, content=batch.content, style=style, prompts=batch.prompts)
            for style in batch.style.split(1, dim=1)
        )
    assert not torch.allclose(first, second)
    learned = train.guided_velocity(teacher, noisy, sigma, slider, torch.zeros(2, 64, 64), batch)
    torch.testing.assert_close(learned, (first + second) / 2)


def test_style_path_is_trained_first_and_taken_over(cache: Path) -> None:
    style.train(ONE_STEP, 2, 1e-3, style.CHECKPOINT, 0)
    trained = train.encoder_weights(style.CHECKPOINT)
    text.build_tokenizers(train.TOKENIZERS)
    nano = train.Nano(train.TOKENIZERS)
    taken = nano.load_state_dict(trained, strict=False)
    assert not taken.unexpected_keys
    assert {name.split(".")[1] for name in trained} == {"image_encoder", "style_projector", "read"}
    missing = set(taken.missing_keys) & set(dict(nano.named_parameters()))
    assert not [name for name in missing if "style" in name or "tells" in name]


@pytest.mark.parametrize("name", ["style", "subject"])
def test_a_judge_goes_on_and_is_measured_on_what_it_has_not_seen(
    cache: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pictures = np.random.default_rng(0).integers(0, 255, (2, 20, PICTURES, 128, 128, 3), np.uint8)
    pictures[:, 18:] = np.array([[255, 0, 0], [255, 255, 0]])[:, None, None, None]
    shown = []

    def view(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
        shown.append(picture.max())
        return picture

    monkeypatch.setattr(judges, "load_pool", lambda: pictures)
    monkeypatch.setattr(judges, "BATCH", 18)
    monkeypatch.setattr(judges, "view", view)
    minutes, checkpoint = ONE_STEP, cache / "judge.pt"
    for step in (1, 2):
        judges.train(name, minutes, 2e-3, checkpoint, 0)
        state = torch.load(checkpoint, weights_only=True)
        assert state["step"] == step
        minutes = state["elapsed"] / 60 + ONE_STEP
    assert len(shown) == 2 * 2 * 18
    assert max(shown) < 255
    judge = judges.Judge(spatial=name == "subject").eval()
    judge.load_state_dict(loop.averaged_weights(checkpoint))
    assert "100.0% found first" in judges.measured(name, judge)  # each by its like


def test_a_prompt_alone_always_draws_the_same(cache: Path) -> None:
    vae.train(ONE_STEP, 4, 1e-3, vae.CHECKPOINT, 0)
    latents.encode_pool()
    latents.write_scale()
    shards = train.load_shards([], None)
    for kind, drawn in (("text", "content"), ("style + text", "target"), ("content + style", "target")):
        batch = train.draw_batch(shards, kind, np.random.default_rng(0), 2)
        shard = next(one for one in shards if one.name.startswith("named" if "text" in kind else "train"))
        known = latents.unit_normal(getattr(shard, drawn))
        for picture in batch.target:
            assert (known == picture).flatten(1).all(1).any()


def test_text_encoders_are_trained_first_and_go_on_beside_the_transformer(cache: Path) -> None:
    prepare()
    words.train(ONE_STEP, 4, 1e-3, words.WORDS_CHECKPOINT, 0)
    trained = train.encoder_weights(words.WORDS_CHECKPOINT)
    assert {name.split(".")[1] for name in trained} == {"text_encoder", "text_encoder_2"}
    train.train(ONE_STEP, 2, 1e-3, 0.7, None, train.CHECKPOINT, 0)
    after = loop.averaged_weights(train.CHECKPOINT)
    for name, weight in trained.items():
        torch.testing.assert_close(after[name], weight, atol=0.01, rtol=0.0)  # one step away

    pipeline = export.build_pipeline()
    for parameter in pipeline.transformer.parameters():  # zeros would give the encoders no gradient
        torch.nn.init.normal_(parameter, std=0.05)
    pipeline.save_pretrained(cache / "exported")
    train.CHECKPOINT.unlink()
    train.train(ONE_STEP, 2, 1e-3, 0.7, cache / "exported", train.CHECKPOINT, 0)
    on = loop.averaged_weights(train.CHECKPOINT)
    for name in ("text_encoder.embeddings.token_embedding", "text_encoder_2.shared"):
        weight = f"conditioning.{name}.weight"
        assert not torch.equal(on[weight], after[weight])


@pytest.mark.parametrize("kind", ["content + style", "text"])
def test_the_reward_asks_for_look_and_subject_as_much_as_the_slider(
    cache: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    prepare()
    reward.train(ONE_STEP, 2, 1e-3, reward.CHECKPOINT, 0)
    network = reward.load_reward(reward.CHECKPOINT)
    shard = train.load_shards([], network)[0]
    batch = shard.batch(kind, [0, PICTURES], np.random.default_rng(0))
    assert batch.right.tolist() == [0, 1]
    if kind == "text":
        named = [shard.shown[0], shard.shown[PICTURES]]
        subjects = [shard.subjects[0], shard.subjects[PICTURES]]
        told = [name in prompt for name, prompt in zip(subjects, batch.prompts, strict=True)]
        assert any(told)
        assert batch.named.tolist() == [row if t else -1 for row, t in zip(named, told, strict=True)]
        assert batch.looks is None
    else:
        assert batch.named is None
        encoded, *_ = network(latents.unit_normal(shard.target))
        means = encoded.unflatten(0, (2, PICTURES))[:, : reward.TOLD_BY].mean(1)
        means = torch.nn.functional.normalize(means, dim=1)
        torch.testing.assert_close(batch.looks, means, atol=0.02, rtol=0.02)
    nano = train.Nano(train.TOKENIZERS)
    losses = {}
    for slider in (1.0, 3.0, 5.0):
        monkeypatch.setattr(train, "random_slider", lambda count, _, at=slider: torch.full((count,), at))
        for used in (None, network):
            torch.manual_seed(0)
            losses[slider, used is not None] = train.drawn_loss(nano, batch, used).item()
    added = [losses[slider, True] - losses[slider, False] for slider in (1.0, 3.0, 5.0)]
    assert added[0] == 0
    assert added[1] == pytest.approx(added[2] / 2, rel=1e-3)
    assert added[2] > 0


@pytest.mark.parametrize(("first_off", "share"), [(1, 1), (train.PATH, 1 / train.COUNTED)])
def test_what_is_drawn_is_compared_with_the_picture(cache: Path, first_off: int, share: float) -> None:
    """A model off by one has that loss where it is counted, and is led from noise to what it predicts.

    The last prediction always is, and of it the decoder's picture, off by .1 here. Without look and name in
    what is asked for, the reward has no say.
    """
    clean, levels = torch.randn(2, 16, 16, 16), []

    def velocity(latents: torch.Tensor, now: torch.Tensor, *_: object, **conditions: object) -> torch.Tensor:
        levels.append(now)
        assert conditions["encoded"] is model.encode.return_value
        at = now[:, None, None, None]
        before = clean + int(first_off == 1)
        torch.testing.assert_close(latents, before.lerp(noise, at), atol=1e-5, rtol=1e-5)
        return train.pack_latents((latents - clean - int(len(levels) >= first_off)) / at)

    model = mock.Mock(side_effect=velocity)
    model.vae.decoder.return_value = torch.full((1, 3, 128, 128), 0.1)
    model.told_loss.return_value = 0.25
    torch.manual_seed(0)
    train.random_slider(2, clean.device)
    noise = torch.randn_like(clean)
    torch.manual_seed(0)
    pixels = torch.zeros(2, 3, 128, 128)
    batch = train.Batch(target=clean, pixels=pixels, content=None, style=None, prompts=["", ""])
    unasked = mock.Mock(side_effect=AssertionError)
    loss = train.drawn_loss(model, batch, unasked)
    shown = sum(train.PIXELS.values()) * math.log(0.1**2 + train.LEAST)
    assert loss.item() == pytest.approx(share * (train.PARTS + train.COLOURS) + shown + 0.25, rel=1e-4)
    model.told_loss.assert_called_once_with(model.encode.return_value, batch)
    (decoded,) = model.vae.decoder.call_args.args
    torch.testing.assert_close(decoded, latents.as_encoded(clean[:1] + 1), atol=1e-5, rtol=1e-5)
    model.encode.assert_called_once_with(batch.style, batch.prompts)
    assert len(levels) == train.PATH
    assert levels[0].tolist() == [1, 1]
    assert all((then < now).all() for now, then in pairwise(levels))


def test_the_first_prediction_is_compared_with_the_picture(cache: Path) -> None:
    """A model off by .1 in every other latent: coarser squares are right."""
    clean = torch.randn(2, 16, 16, 16)
    off = 0.1 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).tile(2, 16, 8, 8)

    def velocity(noise: torch.Tensor, sigma: torch.Tensor, *_: object, **conditions: object) -> torch.Tensor:
        assert sigma.tolist() == [1, 1]
        return train.pack_latents(noise - clean - off)

    batch = train.Batch(clean, torch.zeros(2, 3, 128, 128), None, None, ["", ""])
    model = mock.Mock(side_effect=velocity)
    model.told_loss.return_value = 0.25
    loss = train.first_loss(model, batch)
    fine, coarse = math.log(0.1**2 + train.LEAST_LATENTS), math.log(train.LEAST_LATENTS)
    squares = sum(weight for side, weight in train.LATENTS_FIRST.items() if side > 1)
    assert loss.item() == pytest.approx(train.LATENTS_FIRST[1] * fine + squares * coarse + 0.25, rel=1e-4)


def test_an_error_finer_than_four_pixels_counts_once(cache: Path) -> None:
    pixels = torch.zeros(2, 3, 128, 128)
    batch = train.Batch(torch.zeros(2, 16, 16, 16), pixels, content=None, style=None, prompts=["", ""])
    vae = mock.Mock()
    vae.decoder.return_value = 0.1 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).tile(2, 3, 64, 64)
    loss = train.shown_loss(vae, batch.target, batch, None, torch.zeros(2), None)
    fine, coarse = math.log(0.1**2 + train.LEAST), math.log(train.LEAST)
    squares = sum(weight for side, weight in train.PIXELS.items() if side > 1)
    assert loss.item() == pytest.approx(train.PIXELS[1] * fine + squares * coarse, rel=1e-4)


def test_of_photographs_texture_counts_more_and_errors_less(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of four is a photograph; all are off by .1, latents by 1 at every step."""
    clean = torch.zeros(4, 16, 16, 16)
    batch = train.Batch(clean, torch.zeros(4, 3, 128, 128), None, None, [""] * 4, photographs=1)
    assert batch.first(3).photographs == 1
    assert batch.weights.tolist() == pytest.approx([train.PHOTOGRAPHS, 1, 1, 1])
    monkeypatch.setattr(train, "textures_off", lambda seen, pixels: 10 * torch.ones(len(seen)))
    monkeypatch.setattr(train, "DECODED", 0.5)
    model = mock.Mock(
        side_effect=lambda x, now, *_, **__: train.pack_latents((x - 1) / now[:, None, None, None])
    )
    model.vae.decoder.side_effect = lambda z: torch.full((len(z), 3, 128, 128), 0.1)
    model.told_loss.return_value = 0
    errors = sum(train.PIXELS.values()) * math.log(0.1**2 + train.LEAST)
    shown = ((train.PHOTOGRAPHS + 1) * errors + train.TEXTURES * 10) / 2
    latents_off = (train.PARTS + train.COLOURS) * (train.PHOTOGRAPHS + 3) / 4
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        model.vae.decoder.reset_mock()
        loss = train.drawn_loss(model, batch, None).item()
        earlier = model.vae.decoder.call_count - 1
        assert loss == pytest.approx(shown + latents_off + earlier * train.TEXTURES * 10 / 4, rel=1e-3)
        seen.add(earlier)
    assert seen == {0, 1}, "of another prediction too, unless that is the last one"


def test_photographs_come_first(cache: Path) -> None:
    prepare()
    shard = train.load_shards([], None)[0]
    shard.photographs = np.arange(len(shard.target)) % 3 == 2
    rows = [0, 1, 2, 4, 5]
    batch = shard.batch("content + style", rows, np.random.default_rng(0))
    assert batch.photographs == 2
    assert batch.content is not None
    expected = latents.unit_normal(shard.content[[2, 5, 0, 1, 4]])
    torch.testing.assert_close(batch.content, expected)
    assert batch.right is not None
    assert batch.right.tolist() == [0] * 5


def test_textures_are_compared_wherever_they_lie() -> None:
    torch.manual_seed(0)
    stripes = torch.where(torch.arange(128) % 8 < 4, 1.0, -0.2).expand(1, 3, 128, 128).contiguous()
    moved, turned = stripes.roll(4, dims=3), stripes.mT
    blurred = torch.nn.functional.avg_pool2d(stripes, 5, stride=1, padding=2)
    off = {
        name: textures.textures_off(picture, stripes).item()
        for name, picture in {
            "same": stripes, "moved": moved, "blurred": blurred, "darker": stripes - 0.3, "turned": turned,
        }.items()
    }  # fmt: skip
    assert off["same"] == pytest.approx(2 * math.log(textures.LEAST), abs=1e-3)
    assert off["same"] < off["moved"] < min(off["blurred"], off["darker"], off["turned"]) - 1


def test_a_batch_is_learned_where_the_model_is(cache: Path) -> None:
    """No tensor is made on the CPU beside a model elsewhere: with "meta" any would raise."""
    text.build_tokenizers(train.TOKENIZERS)
    meta = torch.device("meta")
    nano, network = train.Nano(train.TOKENIZERS).to(meta), reward.Reward(5).to(meta).eval()
    batch = train.Batch(
        target=torch.zeros(2, 16, 16, 16),
        pixels=torch.zeros(2, 3, 128, 128),
        content=torch.zeros(2, 16, 16, 16),
        style=torch.zeros(2, 1, 3, 128, 128),
        prompts=["a cat", ""],
        looks=torch.zeros(3, reward.EMBEDDING),
        right=torch.tensor([0, 2]),
        named=torch.tensor([-1, 4]),
        told=torch.zeros(2, sum(tells.PARTS)),
        photographs=1,
    ).to(meta)
    losses = (train.loss_of(nano, batch, nano), train.first_loss(nano, batch))
    for loss in (*losses, train.drawn_loss(nano, batch, network)):
        assert loss.device == meta
        loss.backward()
    style_pictures = torch.zeros(4, 3, 128, 128, device=meta)
    _, look, drawing = style.StylePath().to(meta)(style_pictures)
    assert style.contrast_loss(look, drawing).device == meta


@pytest.mark.gpu
def test_trains_on_a_gpu(tmp_path: Path) -> None:
    """Two steps of the reward by `launch`, as every training starts: NCCL, Muon, checkpoint."""
    folder = tmp_path / "latents" / "train-0000"
    folder.mkdir(parents=True)
    (tmp_path / "latents" / "scale.json").write_text('{"shift_factor": 0, "scaling_factor": 1}')
    np.save(folder / "target.npy", np.random.default_rng(0).normal(size=(2 * PICTURES, 16, 16, 16)))
    environment = os.environ | {"USO_TRAIN_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "training.reward", "--minutes", "0.02", "--processes", "1"]
    subprocess.run(command, env=environment, check=True)
    assert (tmp_path / "reward.pt").exists()


def test_only_style_pictures_in_their_place_tell_a_look(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare()
    shard = train.Shard("train-0000", [f"subject {i}" for i in range(2 * PICTURES)], None)
    painted_and_halftone = [0, PICTURES]
    for sheets, known in ((0, [False, True]), (1, [False, False])):
        monkeypatch.setattr(train, "SHEETS", sheets)
        monkeypatch.setattr(train, "SAME", 0)
        batch = shard.batch("content + style", painted_and_halftone, np.random.default_rng(0))
        assert batch.told is not None
        assert (~batch.told.isnan()).any(1).tolist() == known
        nano = train.Nano(train.TOKENIZERS)
        loss = nano.told_loss(nano.encode(batch.style, batch.prompts), batch)
        loss.backward()
        gradients = [p.grad.abs().sum() for p in nano.conditioning["style_projector"].parameters()]
        assert (torch.stack(gradients) > 0).all().item() == any(known)


def test_a_part_of_the_style_picture_is_the_picture_itself() -> None:
    picture, other = (np.full((128, 128, 3), level, np.uint8) for level in (20, 220))
    shares = [
        (train.with_part(np.random.default_rng(seed), picture, other) == other).mean() for seed in range(20)
    ]
    assert all(train.LEAST_PART**2 - 0.01 < share <= 1 for share in shares)
    assert np.ptp(shares) > 0.2
    assert (picture == 20).all()


def test_an_ablation_differs_by_what_it_leaves_out(cache: Path) -> None:
    prepare()
    style.train(ONE_STEP, 2, 1e-3, style.CHECKPOINT, 0)
    export.export(cache / "start")
    kept = train.Nano(train.TOKENIZERS)
    kept.load_exported(cache / "start")
    aligned, unaligned = ablate.Aligned(train.TOKENIZERS), ablate.Unaligned(train.TOKENIZERS)
    for nano in (aligned, unaligned):
        nano.load_exported(cache / "start")
        for name, module in nano.named_parameters():
            same = torch.equal(module, kept.get_parameter(name))
            style_path = "conditioning.image_encoder", "conditioning.style_projector", "tells"
            assert same or name.startswith(style_path)
    weight = "conditioning.image_encoder.embeddings.patch_embedding.weight"
    trained = train.encoder_weights(style.CHECKPOINT)[weight]
    assert torch.equal(aligned.get_parameter(weight), trained)
    assert not torch.equal(unaligned.get_parameter(weight), trained)

    same = train.load_shards([], None, ablate.SamePictures)[0]
    assert same.siblings(5, np.random.default_rng(0), 1) == [5]
    one_path = train.load_shards([], None, ablate.LatentStyles)[0]
    batch = one_path.batch("content + style", [0, PICTURES], np.random.default_rng(0))
    assert batch.style.shape == (2, 1, 16, 16, 16)
    nano = ablate.OnePath(train.TOKENIZERS)
    assert nano.encode_style(batch.style) is None
    assert len(nano.references(batch.content, batch.style)) == 2
    assert train.loss_of(nano, batch, None).isfinite()


def test_guidance_slider() -> None:
    slider = torch.tensor([1.0, 4.0, 5.0])
    for sigma, expected in ((0.5, [1.0, 2.2, 2.6]), (0.94, [1.0, 1.6, 1.8]), (1.0, [1.0, 1.0, 1.0])):
        weights = train.guidance_weight(slider, torch.full_like(slider, sigma))
        torch.testing.assert_close(weights, torch.tensor(expected), atol=1e-5, rtol=0)


def test_faster_functions_are_those_they_replace() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 5, 16, generator=generator)  # (B, H, S, D) each
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    for options in ({}, {"scale": 0.3}, {"attn_mask": mask}, {"is_causal": True}):
        expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, **options)
        torch.testing.assert_close(cpu.attention(query, key, value, **options), expected)
    angles = torch.rand(5, 8, generator=generator).repeat_interleave(2, 1)
    x, frequencies = query.transpose(1, 2).requires_grad_(), (angles.cos(), angles.sin())
    rotated = cpu.rotate(x, frequencies)
    torch.testing.assert_close(
        rotated, apply_rotary_emb(x, frequencies, sequence_dim=1), atol=1e-6, rtol=1e-6
    )
    (rotated**2).sum().backward()
    torch.testing.assert_close(x.grad, 2 * x)
    with torch.no_grad():
        head_after_head = cpu.rotate(x, frequencies)
    assert torch.equal(head_after_head, rotated)
    assert head_after_head.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("shape", [(8, 32), (32, 8)])
def test_orthogonalize(shape: tuple[int, int]) -> None:
    updates = loop.orthogonalize(torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)))
    values = torch.linalg.svdvals(updates) / (0.2 * 32**0.5)
    assert values.min() > 0.5
    assert values.max() < 1.4


@pytest.mark.usefixtures("cache")
def test_muon_steps_alike_whatever_is_trained_beside() -> None:
    weights = [torch.randn(shape) for shape in ((8, 32), (8, 32), (32, 8), (4, 2, 2))]
    grads = [torch.randn_like(weight) for weight in weights]
    alone, beside = ([torch.nn.Parameter(weight.clone()) for weight in weights] for _ in range(2))
    for parameters in (alone, beside):
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
    for group in [*([parameter] for parameter in alone), beside]:
        loop.MuonAdamW(group, [], lr=0.1).step()
    for one, other, weight in zip(alone, beside, weights, strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=0)
        assert (one - weight).abs().max() > 5e-3
