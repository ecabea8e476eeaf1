"""How far our pipeline is from what the official code computed: the recorded tensors of `tests/goldens`.

`python -m tests.parity` prints the largest distance of each check; `--json` gives every case and every part
broken on purpose, which is what tests/test_parity.py reads.

Run with MKL_CBWR=COMPATIBLE. The recordings come from another maker's processor, and Intel's library computes
`exp` in the timestep embedding, whose angles reach 4000 rad, differently in the last bit on each: without it
the official code itself, run on an Intel Xeon, is 4e-5 from its recording at the first prediction; with it,
3e-6.
"""

import functools
import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from uso.images import prepare_content, to_rgb
from uso.model import geometry, pipeline
from uso.model.checkpoints import load_pipeline
from uso.model.pipeline import USOPipeline
from uso.model.variants import VARIANTS

GOLDENS = Path(os.environ.get("USO_GOLDENS") or Path(__file__).parent / "goldens")

# Largest absolute distance allowed.
LIMITS = {
    "position ids": 0,
    "noise": 0,
    "pixel values": 0,
    "content pixels": 0,
    "token ids": 0,
    "timesteps": 1e-6,
    "text embeddings": 1e-5,
    "pooled prompt": 1e-5,
    "content latents": 1e-4,
    "siglip hidden": 1e-5,
    "style tokens": 1e-5,
    "first prediction": 1e-5,
    "final latents": 1e-4,
    "picture": 1,
}

# What the encoders give is measured relative to its largest value, where that is above 1: float32 rounds
# relative to it, and the recorded T5 embeddings, of values up to 3, are themselves 2.6e-5 from a float64 run.
RELATIVE = {"text embeddings", "content latents", "siglip hidden", "style tokens"}


def case_names() -> list[str]:
    return json.loads((GOLDENS / "index.json").read_text())["cases"]


def read_case(name: str) -> dict[str, Any]:
    return json.loads((GOLDENS / "cases" / f"{name}.json").read_text())


def picture(name: str) -> Image.Image:
    return Image.open(GOLDENS / "images" / f"{name}.png")


def is_transparent(image: Image.Image) -> bool:
    return image.convert("RGBA").getchannel("A").getextrema()[0] < 255


def style_differs_on_purpose(case: dict[str, Any], name: str) -> bool:
    """Alpha goes over white, and palettes become RGB before the resize."""
    image = picture(name)
    return is_transparent(image) or (case["via"] == "gradio" and image.mode in ("RGBA", "LA", "P"))


def content_differs_on_purpose(case: dict[str, Any], name: str) -> bool:
    """As a style's, and 16x16 is no special case."""
    return picture(name).size == (16, 16) or style_differs_on_purpose(case, name)


@functools.cache
def load(variant: str, *, fuse_lora: bool = True) -> USOPipeline:
    source = GOLDENS / "weights" / VARIANTS[variant].file_name
    pipe = load_pipeline(source, torch_dtype=torch.float32, fuse_lora=fuse_lora)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def distance(ours: Tensor, recorded: Tensor) -> float:
    if ours.shape != recorded.shape:
        return float("inf")
    return (ours.double() - recorded.double()).abs().max().item() if ours.numel() else 0.0


def measure(case: dict[str, Any], pipe: USOPipeline) -> dict[str, float]:
    """Distance of each check of one case."""
    recorded = load_file(GOLDENS / "cases" / f"{case['name']}.safetensors")
    text = load_file(GOLDENS / "text.safetensors")
    cpu = {"device": torch.device("cpu"), "dtype": torch.float32}
    found: dict[str, float] = {}

    def check(name: str, ours: Tensor, tensor: Tensor) -> None:
        scale = max(tensor.abs().max().item(), 1.0) if name in RELATIVE else 1.0
        found[name] = max(found.get(name, 0.0), distance(ours, tensor) / scale)

    prompt = f"prompt{case['prompt_id']}"
    with torch.no_grad():
        embeds, pooled = pipe.encode_prompt(case["prompt"], **cpu)
    check("text embeddings", embeds, text[f"{prompt}.t5_embeds"])
    check("pooled prompt", pooled, text[f"{prompt}.clip_pooled"])

    references = []
    for i, name in enumerate(case["content"]):
        rgb = recorded[f"content{i}_rgb"]
        prepared = prepare_content(to_rgb(picture(name)), case["content_long_size"])
        if not content_differs_on_purpose(case, name):
            check("content pixels", torch.from_numpy(np.array(prepared)), rgb)
        with torch.no_grad():
            latents = pipe.encode_content(
                Image.fromarray(rgb.numpy()), content_long_size=max(rgb.shape[:2]), device=cpu["device"]
            )
        mean = recorded[f"ref{i}_moments"].chunk(2, dim=1)[0]
        config = pipe.vae.config
        check("content latents", latents, config.scaling_factor * (mean - config.shift_factor))
        references.append(recorded[f"ref{i}_latents"])

    styles = []
    for i, name in enumerate(case["styles"]):
        pixels = recorded[f"style{i}_pixel_values"]
        image = picture(name)
        if style_differs_on_purpose(case, name):
            # the recorded pixels, as a picture that needs no resize
            eight_bit = ((pixels[0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8)
            image = Image.fromarray(eight_bit.numpy())
        styles.append(image)
        check("pixel values", pipe.style_pixels(image), pixels)
        with torch.no_grad():
            hidden = pipe.image_encoder(pixels, output_hidden_states=True).hidden_states
        levels = torch.cat([hidden[level] for level in pipe.style_projector.config.levels])
        check("siglip hidden", levels, recorded[f"style{i}_siglip_hidden"])

    # The whole call, with the recorded posterior samples; then its first step, with the recorded text too.
    steps: list[dict[str, Tensor]] = []
    sizes = {"width": case["out_width"], "height": case["out_height"]}
    arguments = dict(
        style_images=styles,
        num_inference_steps=case["steps"],
        guidance_scale=case["guidance"],
        content_latents=references,
        **sizes,
    )

    def record(module: torch.nn.Module, args: Any, kwargs: dict[str, Tensor], output: tuple[Tensor]) -> None:
        steps.append({**kwargs, "prediction": output[0]})

    handle = pipe.transformer.register_forward_hook(record, with_kwargs=True)
    try:
        generator = torch.Generator().manual_seed(case["seed"])
        latents = pipe(case["prompt"], generator=generator, output_type="latent", **arguments).images
        check("timesteps", pipe.scheduler.sigmas, torch.tensor(case["timesteps"]))
        check("final latents", latents, recorded["latents_final"])
        first = steps[0]
        steps.clear()
        recorded_text = (text[f"{prompt}.t5_embeds"], text[f"{prompt}.clip_pooled"])
        with mock.patch.object(pipe, "encode_prompt", return_value=recorded_text):
            pipe(case["prompt"], latents=recorded["noise_packed"], output_type="latent", **arguments)
    finally:
        handle.remove()
    count = recorded["noise_packed"].shape[1]
    check("first prediction", steps[0]["prediction"][:, :count], recorded["pred_first"])
    check("noise", first["hidden_states"][:, :count], recorded["noise_packed"])
    ids = torch.cat([recorded["img_ids"], *(recorded[f"ref{i}_ids"] for i in range(len(references)))])
    check("position ids", first["img_ids"], ids)
    check("position ids", first["txt_ids"], recorded["txt_ids"])
    with torch.no_grad():
        if styles:
            check("style tokens", pipe.encode_style(styles, **cpu), recorded["style_tokens"])
        pixels = pipe.image_processor.postprocess(pipe.decode(latents, **sizes), output_type="np")[0]
    eight_bit = torch.from_numpy((pixels * 255).round())
    with Image.open(GOLDENS / "cases" / f"{case['name']}.png") as image:
        check("picture", eight_bit, torch.from_numpy(np.array(image)))
    return found


def measure_tokens() -> dict[str, float]:
    """Token ids of prompts that are long, or have upper case or line breaks."""
    texts = json.loads((GOLDENS / "text.json").read_text())
    prompts = {f"prompt{i}": text for i, text in enumerate(texts["prompts"])} | texts["extra"]
    recorded = load_file(GOLDENS / "text.safetensors")
    pipe = load(read_case(case_names()[0])["variant"])
    found = 0.0
    for name, prompt in prompts.items():
        for kind, tokenizer in (("t5", pipe.tokenizer_2), ("clip", pipe.tokenizer)):
            ids = recorded[f"{name}.{kind}_input_ids"]
            found = max(found, distance(pipe.token_ids(tokenizer, prompt, ids.shape[1]), ids))
    return {"token ids": found}


@contextmanager
def position_offset(mode: str) -> Iterator[None]:
    """The pipeline knows USO's offset alone; two goldens use others."""
    shifted = functools.partial(geometry.reference_position_ids, offset=mode)
    with mock.patch.object(pipeline, "reference_position_ids", shifted):
        yield


def measure_case(name: str) -> dict[str, float]:
    case = read_case(name)
    with position_offset(case["pe"]):
        return measure(case, load(case["variant"]))


def full_case() -> str:
    """A case with guidance, content and styles at USO's offset, in which every part counts."""
    for name in case_names():
        case = read_case(name)
        if case["content"] and case["styles"] and case["pe"] == "d" and case["variant"] != "flux-schnell":
            return name
    raise LookupError(f"no case of {GOLDENS} has content and style pictures")


@contextmanager
def zeroed(*tensors: Tensor) -> Iterator[None]:
    saved = [tensor.detach().clone() for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data.zero_()
        yield
    finally:
        for tensor, value in zip(tensors, saved, strict=True):
            tensor.data.copy_(value)


def measure_broken() -> dict[str, dict[str, float]]:
    """The distances of one case with a part switched off; LoRAs are kept apart for it."""
    case = read_case(full_case())
    pipe = load(case["variant"], fuse_lora=False)
    parameters = dict(pipe.transformer.named_parameters())

    def lora(layer: str) -> list[Tensor]:
        return [p for name, p in parameters.items() if f"{layer}.lora_B" in name]

    projector = dict(pipe.style_projector.named_parameters())
    breaks: dict[str, list[Any]] = {"nothing": []}
    for level in ("high", "mid", "low"):
        breaks[f"projector {level}"] = [zeroed(projector[f"{level}_projection.weight"])]
    for kind in ("attn.to_out.0", "attn.to_add_out", "attn.add_v_proj", "proj_out"):
        assert lora(kind), f"no LoRA on {kind}"
        breaks[f"LoRA {kind}"] = [zeroed(*lora(kind))]
    breaks["offset"] = [position_offset("o")]
    breaks["schedule's L"] = [mock.patch.object(geometry, "SCHEDULE_LATENTS_PER_TOKEN", 4)]
    found = {}
    for name, managers in breaks.items():
        with ExitStack() as stack:
            for manager in managers:
                stack.enter_context(manager)
            found[name] = measure(case, pipe)
    return found


def failed(found: dict[str, float]) -> dict[str, float]:
    """The checks that are beyond their limit (or not a number)."""
    return {name: value for name, value in found.items() if not value <= LIMITS[name]}


def main() -> None:
    cases = {name: measure_case(name) for name in case_names()}
    if "--json" in sys.argv:
        print(json.dumps({"cases": cases, "tokens": measure_tokens(), "broken": measure_broken()}))
        return
    for check, limit in LIMITS.items():
        values = {
            name: found[check]
            for name, found in (cases | {"text": measure_tokens()}).items()
            if check in found
        }
        worst = max(values, key=values.__getitem__)
        print(f"{check:18} {values[worst]:8.1e}  limit {limit:7.0e}  {worst}")


if __name__ == "__main__":
    main()
