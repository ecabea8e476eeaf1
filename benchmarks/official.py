"""The official code, imported in place from a checkout, as a worker: see `benchmarks.worker`."""

import argparse
import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from accelerate import init_empty_weights
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    CLIPTextModel,
    CLIPTokenizer,
    SiglipVisionModel,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers import SiglipImageProcessorPil as SiglipImageProcessor

from benchmarks.models import GUIDANCE, PROMPT, SIZES, Request, Size, random_tensor
from benchmarks.worker import Clock, serve, take_stdout

ROOT = Path(__file__).parents[1]


def to_tensor(image: Image.Image) -> Tensor:
    """torchvision's function of this name, for RGB pictures: `(3, H, W)` in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255


def provide_torchvision() -> None:
    """Where torchvision has no build, the one function of it that drawing uses."""
    if importlib.util.find_spec("torchvision") is None:
        names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
        modules = {name: types.ModuleType(name) for name in names}
        modules[names[-1]].to_tensor = to_tensor  # type: ignore[attr-defined]
        modules[names[1]].functional = modules[names[-1]]  # type: ignore[attr-defined]
        modules[names[0]].transforms = modules[names[1]]  # type: ignore[attr-defined]
        sys.modules.update(modules)


class Float32Torch(types.ModuleType):
    """`torch`, whose bfloat16 is float32: the official pipeline names bfloat16, a CPU compares in float32."""

    bfloat16 = torch.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def build(size: Size, folder: Path, *, device: str, dtype: torch.dtype) -> Any:
    """The official pipeline with random weights, its LoRA beside the weights, its SigLIP in float32."""
    names = ("pipeline", "util", "model", "modules.autoencoder", "modules.conditioner", "modules.layers")
    modules: list[Any] = [importlib.import_module(f"uso.flux.{name}") for name in names]
    pipeline, util, flux, autoencoder, conditioner, layers = modules
    hidden = size.flux["hidden_size"]
    with torch.device("meta"):
        model = flux.Flux(flux.FluxParams(**size.flux))
        # numbers that the official code has written into its classes
        model.feature_embedder = layers.SigLIPMultiFeatProjModel(
            size.siglip_tokens, size.style_tokens, size.siglip["hidden_size"], hidden, context_layer_norm=True
        )
        util.set_lora(model, size.lora_rank, device="meta")
        for block in model.single_blocks:
            block.processor.proj_lora = layers.LoRALinearLayer(
                hidden + int(hidden * size.flux["mlp_ratio"]), hidden, size.lora_rank
            )
        ae = autoencoder.AutoEncoder(autoencoder.AutoEncoderParams(resolution=256, **size.ae))
    # the posterior's mean, as ours: the official code samples it from the global generator
    ae.reg = autoencoder.DiagonalGaussian(sample=False)

    def fill(module: Any, dtype: torch.dtype) -> Any:
        shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        tied = {"encoder.embed_tokens.weight": "shared.weight"}
        state = {
            name: random_tensor(tied.get(name, name), shape, device=device, dtype=dtype)
            for name, shape in shapes.items()
        }
        module.load_state_dict(state, strict=True, assign=True)
        return module.eval().requires_grad_(False).to(device)

    def encoder(model_class: Any, name: str, dtype: torch.dtype) -> Any:
        with init_empty_weights(include_buffers=False):
            module = model_class(AutoConfig.from_pretrained(folder / name))
        module = fill(module, dtype)
        if name == "t5":
            module.tie_weights()
        return module

    def embedder(model_class: Any, tokenizer: Any, name: str, length: int) -> Any:
        # its constructor, and the pipeline's below, want weights in files
        made = conditioner.HFEmbedder.__new__(conditioner.HFEmbedder)
        nn.Module.__init__(made)
        made.is_clip = name == "clip"
        made.max_length = length
        made.output_key = "pooler_output" if made.is_clip else "last_hidden_state"
        made.tokenizer = tokenizer.from_pretrained(folder / name, max_length=length)
        made.hf_module = encoder(model_class, name, dtype)
        return made

    made = pipeline.USOPipeline.__new__(pipeline.USOPipeline)
    made.device, made.offload, made.use_fp8, made.model_type = torch.device(device), False, False, "flux-dev"
    made.model = fill(model, dtype)
    made.ae = fill(ae, torch.float32)
    made.t5 = embedder(T5EncoderModel, T5Tokenizer, "t5", 512)
    made.clip = embedder(CLIPTextModel, CLIPTokenizer, "clip", 77)
    made.model.vision_encoder = encoder(SiglipVisionModel, "siglip", torch.float32)
    if dtype == torch.float32:
        draw_noise = pipeline.get_noise
        pipeline.torch = Float32Torch("torch")
        pipeline.get_noise = lambda *args, dtype, **kwargs: draw_noise(
            *args, dtype=torch.bfloat16, **kwargs
        ).to(dtype)
    return made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkout", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype", required=True)
    args = parser.parse_args()
    answers = take_stdout()
    size, device = SIZES[args.size], args.device
    # both packages are called uso; theirs has no __init__.py and would come last
    sys.path[:] = [str(args.checkout), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
    provide_torchvision()
    pipe = build(size, args.folder, device=device, dtype=getattr(torch, args.dtype))
    pipeline = importlib.import_module("uso.flux.pipeline")

    processor = SiglipImageProcessor(
        size={"height": size.siglip["image_size"], "width": size.siglip["image_size"]}
    )
    denoise = pipeline.denoise

    def draw(request: Request, clock: Clock) -> tuple[Image.Image, Tensor]:
        """As the official inference.py."""
        kept = []

        def marked_denoise(*args: Any, **kwargs: Any) -> Tensor:
            clock.mark("denoise")
            latents: Tensor = denoise(*args, **kwargs)
            kept.append(latents)
            clock.mark("decode")
            return latents

        styles = [processor(image, return_tensors="pt").to(pipe.device) for image in request.styles]
        references = [pipeline.preprocess_ref(request.content, size.content_long_size)]
        with mock.patch.object(pipeline, "denoise", marked_denoise):
            image = pipe(
                prompt=PROMPT,
                width=size.side[0],
                height=size.side[1],
                guidance=GUIDANCE,
                num_steps=request.steps,
                seed=request.seed,
                ref_imgs=references,
                siglip_inputs=styles,
            )
        return image, kept[0]

    # within inference_mode operations are not taken apart as within no_grad, which ours uses
    plain = pipeline.USOPipeline.forward.__wrapped__
    serve(
        answers,
        draw,
        device=device,
        forget=lambda: None,
        counting=lambda: mock.patch.object(pipeline.USOPipeline, "forward", torch.no_grad()(plain)),
    )


if __name__ == "__main__":
    main()
