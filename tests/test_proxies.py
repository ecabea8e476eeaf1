"""What can be said of speed without a clock: calls, FLOPs, operations, and that nothing stays behind."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.parity import GOLDENS
from tests.test_pipeline import SECOND_STYLE, STYLE, Counter, draw
from uso.errors import Cancelled
from uso.model.modes import modulation_layers
from uso.model.once import modulations, precomputed
from uso.model.pipeline import USOPipeline
from uso.model.plans import transformer_plan
from uso.model.variants import DEV

# aten operations a step of the official code (bytedance/USO at the commit that the goldens are from) on the
# goldens' tiny model with two style pictures and a content picture, float32 on a CPU, 2026-11-24: the
# difference of 2 steps and 1, as `python -m benchmarks.against_official --size tiny` counts them
OFFICIAL_OPS = 2548
# TFLOPs a step of FLUX.1-dev at 1024x1024, by content pictures (long side 512) and style pictures
TFLOPS = {(0, 0): 74.4, (0, 1): 78.1, (0, 2): 81.9, (1, 0): 95.0, (1, 1): 99.0, (1, 2): 103.0}


@pytest.fixture
def pipe(tiny_folder: Path) -> USOPipeline:
    return fresh(tiny_folder)


def fresh(folder: Path) -> USOPipeline:
    pipe = USOPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_each_part_once_an_image_and_the_encoders_once_for_all_seeds(pipe: USOPipeline) -> None:
    encoders = {
        "SigLIP": pipe.image_encoder,
        "projector": pipe.style_projector,
        "CLIP": pipe.text_encoder,
        "T5": pipe.text_encoder_2,
        "reference": pipe.vae.encoder,
    }
    embedders = {"context": pipe.transformer.context_embedder, "rotary": pipe.transformer.pos_embed}
    counters = {name: Counter(module) for name, module in (encoders | embedders).items()}
    table = [Counter(layer) for layer in modulation_layers(pipe.transformer)]
    steps = Counter(pipe.transformer.x_embedder)

    def calls() -> dict[str, int]:
        return {name: counter.calls for name, counter in counters.items()}

    by_picture = {"SigLIP": 2, "projector": 2}
    both = {"style_images": [STYLE, SECOND_STYLE], "num_inference_steps": 4}
    draw(pipe, **both)
    assert steps.calls == 4
    assert calls() == dict.fromkeys(counters, 1) | by_picture
    assert {layer.calls for layer in table} == {4}, "each step's row"
    for seed in (1, 2):
        draw(pipe, generator=torch.Generator().manual_seed(seed), **both)
    draw(pipe, style_images=[SECOND_STYLE, STYLE], num_inference_steps=4)
    draw(pipe, style_images=[SECOND_STYLE], num_inference_steps=4)
    assert calls() == dict.fromkeys(encoders, 1) | dict.fromkeys(embedders, 5) | by_picture
    assert {layer.calls for layer in table} == {4}
    draw(pipe, guidance_scale=2.0, num_inference_steps=4)
    assert {layer.calls for layer in table} == {8}
    draw(pipe, content_long_size=96, num_inference_steps=1)
    assert calls()["reference"] == 2


@pytest.fixture(scope="module")
def full_size() -> Any:
    return transformer_plan(DEV).model.to(torch.bfloat16).eval()


@torch.no_grad()
@pytest.mark.parametrize(("content", "styles"), TFLOPS)
def test_a_full_size_step_has_no_flop_too_many(full_size: Any, content: int, styles: int) -> None:
    meta = {"device": "meta", "dtype": torch.bfloat16}
    text, image = 512 + 192 * styles, 4096 + 1024 * content
    prompt, pooled, one = (
        torch.empty(1, 512, 4096, **meta),
        torch.empty(1, 768, **meta),
        torch.empty(1, **meta),
    )
    with (
        precomputed(
            full_size,
            table=modulations(full_size, sigmas=[one], guidance=one, pooled_projections=pooled),
            encoder_hidden_states=prompt,
            style_tokens=torch.empty(1, 192 * styles, 3072, **meta) if styles else None,
            ids=torch.empty(text + image, 3, device="meta"),
        ) as at_step,
        FlopCounterMode(display=False) as counter,
    ):
        at_step(0)
        prediction = full_size(
            hidden_states=torch.empty(1, image, 64, **meta),
            timestep=one,
            guidance=one,
            pooled_projections=pooled,
            encoder_hidden_states=prompt,
            txt_ids=torch.empty(text, 3, device="meta"),
            img_ids=torch.empty(image, 3, device="meta"),
            return_dict=False,
        )[0]
    assert prediction.shape == (1, image, 64)
    assert counter.get_total_flops() / 1e12 == pytest.approx(TFLOPS[content, styles], rel=1e-3)


class CountOps(TorchDispatchMode):
    """Counts the aten operations within it."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_step_has_few_operations(pipe: USOPipeline) -> None:
    def operations(steps: int) -> int:
        with CountOps() as counter:
            draw(pipe, style_images=[STYLE, SECOND_STYLE], num_inference_steps=steps)
        return counter.count

    for steps in (1, 3):  # what encoders make, and the modulations, are kept from here on
        operations(steps)
    assert (operations(3) - operations(1)) / 2 <= 0.3 * OFFICIAL_OPS


def test_a_step_cache_is_reset_after_a_cancel_and_an_error(pipe: USOPipeline) -> None:
    """It holds the last step's states: those of another size would be an error, of another picture worse."""
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))  # all but the first block, once
    expected = [draw(pipe), draw(pipe, width=96)]

    def fail(pipe: USOPipeline, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if i == 1:
            raise error
        return tensors

    for error in (Cancelled("stop"), RuntimeError("out of luck"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            draw(pipe, callback_on_step_end=fail)
        for width, picture in zip((64, 96), expected, strict=True):
            assert torch.equal(draw(pipe, width=width), picture)


def same(a: Tensor, b: Tensor) -> bool:
    """But for where in memory the numbers lie, which a CPU's last bit depends on."""
    return torch.allclose(a, b, rtol=0, atol=1e-5)


def test_nothing_is_left_behind(pipe: USOPipeline, tiny_folder: Path) -> None:
    """Sizes, prompts, references, LoRAs and memory modes in turn: each picture is a new pipeline's."""

    def fox(pipe: USOPipeline) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        sizes = {"width": 96, "height": 32, "num_inference_steps": 2}
        latents: Tensor = pipe("a red fox", generator=generator, output_type="latent", **sizes).images
        return latents

    def load_lora(pipe: USOPipeline) -> None:
        pipe.load_lora_weights(GOLDENS / "weights", weight_name="dit_lora.safetensors")

    chair, other = draw(fresh(tiny_folder)), fox(fresh(tiny_folder))
    with_lora = fresh(tiny_folder)
    load_lora(with_lora)
    adapted = draw(with_lora)
    assert not torch.allclose(adapted, chair, atol=1e-2)

    assert same(draw(pipe), chair)
    assert same(fox(pipe), other)
    assert same(draw(pipe), chair)
    load_lora(pipe)
    assert same(draw(pipe), adapted)
    pipe.unload_lora_weights()
    assert same(draw(pipe), chair)
    pipe.enable_model_cpu_offload(device="cpu")
    assert same(fox(pipe), other)
    assert same(draw(pipe), chair)
    pipe.remove_all_hooks()
    assert same(fox(pipe), other)
    assert same(draw(pipe), chair)
