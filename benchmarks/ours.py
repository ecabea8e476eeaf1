"""This project's pipeline as a worker: see `benchmarks.worker`."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image
from torch import Tensor

from benchmarks.models import GUIDANCE, PROMPT, SIZES, Request, Size, random_tensor
from benchmarks.worker import Clock, serve, take_stdout
from uso import load_pipeline
from uso.model import checkpoints, keymaps, plans
from uso.model.modes import Quantization
from uso.model.pipeline import USOPipeline
from uso.model.tuning import compile_blocks
from uso.model.variants import DEV, with_numbers_of
from uso.model.weights import Plan, Weights
from uso.serve.device import Device
from uso.settings import Settings


@dataclass(frozen=True)
class RandomWeights(Weights):
    """A file of the random weights that no disk holds: tensors are made one at a time, on the device."""

    device: str = "cpu"

    @property
    def size(self) -> int:
        return 4 * self.parameters

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, shape in self.shapes.items():
            yield name, random_tensor(name, shape, device=self.device, dtype=torch.float32)


def file_shapes(plan: Plan) -> dict[str, keymaps.Shape]:
    return {name: keymaps.source_shape(source, plan.shapes) for name, source in plan.keys.items()}


def shapes_of(path: Path, size: Size) -> dict[str, keymaps.Shape]:
    """What a file of the layout that users download holds."""
    folder = path if path.is_dir() else path.parent
    if path.stem in ("t5", "clip", "siglip"):
        return file_shapes(plans.encoder_plan(path.stem, path))
    variant = with_numbers_of(DEV, folder)
    if path.stem == "projector":
        siglip = plans.encoder_plan("siglip", folder / "siglip").model.config
        return file_shapes(plans.projector_plan(variant, siglip))
    transformer = plans.transformer_plan(variant)
    if path.stem == "dit_lora":
        keys = keymaps.lora_keys(variant)
        shapes = keymaps.lora_shapes(keys, transformer.shapes, rank=size.lora_rank)
        return file_shapes(Plan(transformer.model, keys, shapes))
    return file_shapes(transformer if path.stem == "flux1-dev" else plans.autoencoder_plan(variant))


def build(
    size: Size, folder: Path, *, device: str, dtype: torch.dtype, quantization: Quantization = "none"
) -> USOPipeline:
    """Through `load_pipeline`, whose files are random."""

    def open_random(path: Path, *, allow_pickle: bool = False) -> Weights:
        return RandomWeights(path, shapes_of(path, size), device=device)

    with mock.patch.object(checkpoints, "open_weights", open_random):
        return load_pipeline(
            folder, settings=Settings(device=device), torch_dtype=dtype, quantization=quantization
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    answers = take_stdout()
    size = SIZES[args.size]
    pipe: Any = build(size, args.folder, device=args.device, dtype=getattr(torch, args.dtype))
    Device(pipe, device=args.device, memory="full")
    if args.compile:
        # a step of a small model is as short as the calls of the kernels, which the C++ wrapper makes
        compile_blocks(pipe, **({"options": {"cpp_wrapper": True}} if args.device == "cpu" else {}))
    decode = pipe.decode

    def draw(request: Request, clock: Clock) -> tuple[Image.Image, Tensor]:
        kept = []

        def marked_decode(latents: Tensor, **kwargs: Any) -> Tensor:
            clock.mark("decode")
            kept.append(latents)
            return decode(latents, **kwargs)

        hook = pipe.transformer.register_forward_pre_hook(lambda *_: clock.mark("denoise"))
        pipe.decode = marked_decode
        try:
            image = pipe(
                PROMPT,
                content_image=request.content,
                style_images=request.styles,
                width=size.side[0],
                height=size.side[1],
                num_inference_steps=request.steps,
                guidance_scale=GUIDANCE,
                content_long_size=size.content_long_size,
                generator=torch.Generator(args.device).manual_seed(request.seed),
            ).images[0]
        finally:
            hook.remove()
            del pipe.decode
        return image, kept[0]

    serve(
        answers,
        draw,
        device=args.device,
        forget=pipe.conditioning.clear,
        counting=lambda: torch.compiler.set_stance("force_eager"),  # compiled graphs hide their operations
    )


if __name__ == "__main__":
    main()
