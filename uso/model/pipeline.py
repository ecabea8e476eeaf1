"""`USOPipeline`: subject and style pictures and a prompt to a picture, on FLUX.

The computation of the official code (bytedance/USO, `uso/flux/pipeline.py`) over the classes of diffusers and
transformers. What is kept and what differs on purpose is listed in ARCHITECTURE.md.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FluxTransformer2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import FluxLoraLoaderMixin
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, SiglipVisionModel, T5EncoderModel, T5TokenizerFast

from uso.images import OWN_SIZE_MAX, prepare_content, to_rgb
from uso.model.geometry import (
    PIXELS_PER_TOKEN,
    pack_latents,
    position_ids,
    reference_position_ids,
    schedule_mu,
    unpack_latents,
)
from uso.model.lean_blocks import lean_blocks
from uso.model.modes import modulation_layers
from uso.model.once import ConditioningCache, modulations, precomputed, share_position_bias, walk
from uso.model.scheduler import USOFlowMatchEulerScheduler
from uso.model.style_projector import StyleProjector
from uso.model.tuning import fuse_qkv, split_qkv
from uso.model.windows import Windows, continue_edges, round_to_tokens
from uso.schema import resolve_size

Callback = Callable[["USOPipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor]]
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class USOPipelineOutput(BaseOutput):
    """`images`: a list of one PIL picture, or an array or tensor with a batch dimension."""

    images: list[Image.Image] | np.ndarray | Tensor


class USOPipeline(DiffusionPipeline, FluxLoraLoaderMixin):
    """Unified style- and subject-driven generation on FLUX.1 (https://huggingface.co/papers/2508.18966).

    Args:
        scheduler: the official schedule.
        vae: FLUX's autoencoder; its posterior mean is taken, so a seed gives one picture.
        text_encoder, tokenizer: CLIP-L, for the pooled prompt.
        text_encoder_2, tokenizer_2: T5 v1.1, for the prompt's tokens.
        transformer: FLUX.1-dev, -Krea-dev or -schnell with USO's LoRA merged or loaded.
        image_encoder: SigLIP's vision tower, for style pictures.
        style_projector: SigLIP's hidden states to style tokens.
        native_scale: fraction of the asked size at which the model draws, before enlarging (FLUX: 1).
        native_side: side in pixels of the only square that a model draws; other shapes are drawn in several.
        max_sequence_length: T5 tokens of a prompt; shorter ones are padded, longer ones cut.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->image_encoder->style_projector->transformer->vae"
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "noise_pred"]

    def __init__(
        self,
        scheduler: USOFlowMatchEulerScheduler,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        text_encoder_2: T5EncoderModel,
        tokenizer_2: T5TokenizerFast,
        transformer: FluxTransformer2DModel,
        image_encoder: SiglipVisionModel,
        style_projector: StyleProjector,
        native_scale: float = 1.0,
        native_side: int | None = None,
        max_sequence_length: int = 512,
    ) -> None:
        super().__init__()
        self.register_modules(
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            transformer=transformer,
            image_encoder=image_encoder,
            style_projector=style_projector,
        )
        self.register_to_config(
            native_scale=native_scale, native_side=native_side, max_sequence_length=max_sequence_length
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=PIXELS_PER_TOKEN)
        self.conditioning = ConditioningCache()
        share_position_bias(text_encoder_2)
        self._interrupt = False

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` from the callback to stop here and decode what is there."""
        return self._interrupt

    @property
    def _execution_device(self) -> torch.device:
        """diffusers' own, which takes 1 % of a small model's picture to find that nothing is offloaded."""
        models = [model for model in self.components.values() if isinstance(model, nn.Module)]
        for part in (part for model in models for part in walk(model)):
            registry: Any = vars(part).get("_diffusers_hook")
            if "_hf_hook" in vars(part) or (registry and registry.hooks):
                offloaded: torch.device = super()._execution_device
                return offloaded
        devices = [next(model.parameters()).device for model in models]
        return next((device for device in devices if device.type not in ("cpu", "meta")), devices[0])

    @torch.no_grad()
    def __call__(
        self,
        prompt: str = "",
        *,
        content_image: Image.Image | list[Image.Image] | None = None,
        style_images: Image.Image | list[Image.Image] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 4.0,
        content_long_size: int = 512,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        content_latents: list[Tensor] | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Draw one picture.

        Args:
            prompt: what the picture shows; empty keeps the content picture's layout.
            content_image: picture(s) of the subject, any size, turned to RGB over white.
            style_images: picture(s) of the look, any size; their order does not matter.
            height, width: pixels, multiples of 16. Absent: from the content picture, else 1024
                (`uso.schema.resolve_size`).
            num_inference_steps: at least 1.
            guidance_scale: FLUX's distilled guidance; without effect on schnell.
            content_long_size: long side in pixels at which content pictures are encoded; 0 is their own,
                at most 1024.
            generator: source of the noise, on its own device (official pictures: on the compute device).
            latents: starting noise instead, packed, `(1, height/16 * width/16, 64)` of what `windows` tells.
            content_latents: content pictures already encoded, each `(1, 16, h/8, w/8)`, scaled and shifted;
                drawn in several windows, of the size that `windows` tells.
            callback_on_step_end: `callback(pipe, step, timestep, tensors) -> tensors` after each step; what
                it raises ends the call and leaves the pipeline usable.
            callback_on_step_end_tensor_inputs: of `_callback_tensor_inputs`; "noise_pred" is the velocity.
            output_type: "pil", "np" `(1, H, W, 3)` and "pt" `(1, 3, H, W)` in [0, 1], or "latent" (packed).
            return_dict: False gives `(images,)` in place of a `USOPipelineOutput`.

        Raises:
            ValueError: an argument is out of its range; nothing was computed.
            ImageError: a content picture is too thin to be encoded.
        """
        # 1. Check inputs
        content_images = _as_list(content_image)
        style_images = _as_list(style_images)
        tensor_inputs = callback_on_step_end_tensor_inputs or ["latents"]
        self.check_inputs(
            prompt=prompt,
            content_images=content_images,
            style_images=style_images,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            content_long_size=content_long_size,
            content_latents=content_latents,
            tensor_inputs=tensor_inputs,
            output_type=output_type,
        )
        if width is None or height is None:
            content_size = content_images[0].size if content_images else None
            width, height, _ = resolve_size(
                width=width, height=height, keep_size=False, content_size=content_size
            )
        self._interrupt = False
        device = self._execution_device
        dtype = self.transformer.dtype
        windows = self.windows(width, height, content=bool(content_images or content_latents))

        try:
            # 2. Encode the prompt
            prompt_embeds, pooled_prompt_embeds = self.encode_prompt(prompt, device=device, dtype=dtype)

            # 3. Encode the style pictures
            style_tokens = self.encode_style(style_images, device=device, dtype=dtype)
            if len(windows) > 1:  # each has the same words and the same looks
                prompt_embeds = prompt_embeds.expand(len(windows), -1, -1)
                if style_tokens is not None:
                    style_tokens = style_tokens.expand(len(windows), -1, -1)

            # 4. Encode the content pictures
            if content_latents is None:
                content_latents = [
                    self.encode_content(
                        image, content_long_size=content_long_size, shape=(width, height), device=device
                    )
                    for image in content_images
                ]
            content_tokens = [
                windows.split(pack_latents(reference.to(device, dtype))) for reference in content_latents
            ]

            # 5. Prepare the noise and the position ids
            latents = self.prepare_latents(
                width=windows.width, height=windows.height, device=device, dtype=dtype, generator=generator,
                latents=latents,
            )  # fmt: skip
            img_ids = self.prepare_img_ids(windows, content_latents).to(device)
            text_length = prompt_embeds.shape[1] + (0 if style_tokens is None else style_tokens.shape[1])
            txt_ids = torch.zeros(text_length, 3, device=device)

            # 6. Prepare the timesteps
            window_width, window_height = windows.window
            mu = schedule_mu(
                width=window_width,
                height=window_height,
                base_shift=self.scheduler.config.base_shift,
                max_shift=self.scheduler.config.max_shift,
            )
            self.scheduler.set_timesteps(num_inference_steps, device=device, mu=mu)
            guidance = None
            if self.transformer.config.guidance_embeds:
                guidance = torch.full((1,), guidance_scale, device=device, dtype=dtype)

            # the official code casts sigma, not 1000 sigma, to the model's dtype
            sigmas = [
                torch.full((1,), sigma, device=device, dtype=dtype)
                for sigma in self.scheduler.sigmas[:-1].tolist()
            ]

            # 7. Denoise
            with (
                precomputed(
                    self.transformer,
                    table=self.modulations(sigmas, guidance, pooled_prompt_embeds),
                    encoder_hidden_states=prompt_embeds,
                    style_tokens=style_tokens,
                    ids=torch.cat([txt_ids, img_ids]),
                ) as at_step,
                lean_blocks(self.transformer, windows.split(latents)),
                self.progress_bar(total=num_inference_steps) as progress_bar,
            ):
                for i, t in enumerate(self.scheduler.timesteps):
                    if self.interrupt:
                        break
                    at_step(i)
                    with self.transformer.cache_context("cond"):
                        prediction = self.transformer(
                            hidden_states=torch.cat([windows.split(latents), *content_tokens], dim=1),
                            timestep=sigmas[i],
                            guidance=guidance,
                            pooled_projections=pooled_prompt_embeds,
                            encoder_hidden_states=prompt_embeds,
                            txt_ids=txt_ids,
                            img_ids=img_ids,
                            return_dict=False,
                        )[0][:, : windows.tokens]  # (windows, tokens + content, 64) -> (windows, tokens, 64)
                    prediction = windows.merge(prediction)  # -> (1, N, 64)
                    latents = self.scheduler.step(prediction, t, latents, return_dict=False)[0]
                    if callback_on_step_end is not None:
                        tensors = {"latents": latents, "noise_pred": prediction}
                        changed = callback_on_step_end(
                            self, i, t, {name: tensors[name] for name in tensor_inputs}
                        )
                        latents = changed.get("latents", latents)
                    progress_bar.update()

            # 8. Decode, and enlarge what was drawn at native scale
            images: Any = latents
            if output_type != "latent":
                pixels = self.decode(latents, width=windows.width, height=windows.height)
                pixels = self.fit(pixels, width=width, height=height)
                if pixels.shape[2:] != (height, width):
                    pixels = torch.nn.functional.interpolate(
                        pixels.float(), size=(height, width), mode="bicubic", antialias=True
                    )
                images = self.image_processor.postprocess(pixels, output_type=output_type)
        except torch.OutOfMemoryError:
            self.conditioning.clear()
            raise
        finally:
            self.maybe_free_model_hooks()

        return USOPipelineOutput(images=images) if return_dict else (images,)

    def fuse_qkv_projections(self) -> None:
        """As in diffusers, but the separate projections are not kept: nothing takes memory twice.

        Saving and loading a LoRA separate them again.
        """
        fuse_qkv(self.transformer)

    def unfuse_qkv_projections(self) -> None:
        split_qkv(self.transformer)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        fused = split_qkv(self.transformer)
        super().save_pretrained(*args, **kwargs)
        if fused:
            fuse_qkv(self.transformer)

    def load_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        split_qkv(self.transformer)  # a LoRA belongs to one of them
        super().load_lora_weights(*args, **kwargs)

    def check_inputs(
        self,
        *,
        prompt: str,
        content_images: list[Image.Image],
        style_images: list[Image.Image],
        height: int | None,
        width: int | None,
        num_inference_steps: int,
        content_long_size: int,
        content_latents: list[Tensor] | None,
        tensor_inputs: list[str],
        output_type: str,
    ) -> None:
        """Raise a ValueError that names the argument, its value and its limit."""
        if not isinstance(prompt, str):
            raise ValueError(f"`prompt` must be one string, got {type(prompt).__name__}")
        for name, side in (("height", height), ("width", width)):
            if side is not None and (side < PIXELS_PER_TOKEN or side % PIXELS_PER_TOKEN):
                raise ValueError(f"`{name}` must be a positive multiple of {PIXELS_PER_TOKEN}, got {side}")
        if num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` must be at least 1, got {num_inference_steps}")
        if content_long_size < 0:
            raise ValueError(f"`content_long_size` must be 0 or more, got {content_long_size}")
        if content_images and content_latents is not None:
            raise ValueError("give `content_image` or `content_latents`, not both")
        for name, images in (("content_image", content_images), ("style_images", style_images)):
            for image in images:
                if not isinstance(image, Image.Image):
                    raise ValueError(
                        f"`{name}` must be a PIL picture or a list of them, got {type(image).__name__}"
                    )
        unknown = sorted(set(tensor_inputs) - set(self._callback_tensor_inputs))
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` may hold {self._callback_tensor_inputs}, got {unknown}"
            )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")

    def windows(self, width: int, height: int, *, content: bool) -> Windows:
        """What is drawn for an asked `width` x `height`, and in which windows the model sees it."""
        scale, side = self.config.native_scale, self.config.native_side
        return Windows.over(width, height, scale=scale, side=side, content=content)

    def fit(self, pixels: Tensor, *, width: int, height: int) -> Tensor:
        """What was drawn, `(..., h, w)`, in the proportions of `width` x `height`: the middle of what is
        longer; the edges of what is shorter are continued."""
        if self.config.native_side is None:
            return pixels
        drawn_height, drawn_width = pixels.shape[-2:]
        scale = min(drawn_width, drawn_height) / min(width, height)
        columns, rows = round(scale * width), round(scale * height)
        left, top = max((drawn_width - columns) // 2, 0), max((drawn_height - rows) // 2, 0)
        return continue_edges(
            pixels[..., top : top + rows, left : left + columns], width=columns, height=rows
        )

    def encode_prompt(
        self, prompt: str, *, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """T5's states `(1, max_sequence_length, D)`, padding unmasked, and CLIP's pooled `(1, P)`."""
        t5_ids = self.token_ids(self.tokenizer_2, prompt, self.config.max_sequence_length)
        clip_ids = self.token_ids(self.tokenizer, prompt, self.tokenizer.model_max_length)
        pooled = self.conditioning.get(
            "pooled prompt", [self.text_encoder], clip_ids,
            lambda ids: self.text_encoder(ids).pooler_output, device=device,
        )  # fmt: skip
        prompt_embeds = self.conditioning.get(
            "prompt", [self.text_encoder_2], t5_ids,
            lambda ids: self.text_encoder_2(ids).last_hidden_state, device=device,
        )  # fmt: skip
        return prompt_embeds.to(device, dtype), pooled.to(device, dtype)

    @staticmethod
    def token_ids(tokenizer: Any, prompt: str, length: int) -> Tensor:
        """`(1, length)` token ids, padded or cut."""
        return tokenizer(
            [prompt], padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids

    def encode_style(
        self, images: list[Image.Image], *, device: torch.device, dtype: torch.dtype
    ) -> Tensor | None:
        """Style tokens `(1, pictures * 3 * tokens_per_level, hidden)`; None without pictures."""
        if not images:
            return None
        pixels = torch.cat([self.style_pixels(image) for image in images])  # (B, 3, S, S)

        def project(pixels: Tensor) -> Tensor:
            pixels = pixels.to(self.image_encoder.dtype)
            hidden_states = self.image_encoder(pixels, output_hidden_states=True).hidden_states
            return self.style_projector(hidden_states)  # (B, 3K, hidden)

        tokens = self.conditioning.get(
            ("style", *self.style_projector.config.levels), [self.image_encoder, self.style_projector],
            pixels, project, device=device,
        )  # fmt: skip
        return tokens.flatten(0, 1)[None].to(device, dtype)  # (B, 3K, hidden) -> (1, B * 3K, hidden)

    def modulations(self, sigmas: list[Tensor], guidance: Tensor | None, pooled: Tensor) -> Tensor:
        """`uso.model.once.modulations`, kept for another seed."""
        conditions = torch.cat([*sigmas, *([] if guidance is None else [guidance]), pooled[0]])
        return self.conditioning.get(
            "modulations", [self.transformer.time_text_embed, *modulation_layers(self.transformer)],
            conditions.to("cpu", torch.float32)[None],
            lambda _: modulations(
                self.transformer, sigmas=sigmas, guidance=guidance, pooled_projections=pooled
            ), device=pooled.device,
        )  # fmt: skip

    def style_pixels(self, image: Image.Image) -> Tensor:
        """SigLIP's input `(1, 3, S, S)` in [-1, 1]: bicubic, as `SiglipImageProcessor`."""
        side = self.image_encoder.config.image_size
        return _pixels(to_rgb(image).resize((side, side), Image.Resampling.BICUBIC))

    def encode_content(
        self,
        image: Image.Image,
        *,
        content_long_size: int,
        shape: tuple[int, int] = (1, 1),
        device: torch.device,
    ) -> Tensor:
        """Scaled and shifted latents `(1, 16, h/8, w/8)`: the posterior's mean, one for a picture.

        `shape` (width, height) of the picture to draw only counts for a model with a `native_side`: the
        picture is fitted into it, and `content_long_size` grows with it where it is larger than in a square.
        """
        image = to_rgb(image)
        long_size = self.native_content_size(image, content_long_size)
        if self.config.native_side is None:
            pixels = self.image_processor.preprocess(prepare_content(image, long_size))
        else:
            pixels = self.fit_content(image, long_size, shape)
        mean = self.conditioning.get(
            "content", [self.vae], pixels,
            lambda pixels: self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mode(), device=device,
        )  # fmt: skip
        return self.vae.config.scaling_factor * (mean - self.vae.config.shift_factor)

    def fit_content(self, image: Image.Image, long_size: int, shape: tuple[int, int]) -> Tensor:
        """The whole picture in the middle of what is drawn for `shape`, its edges continued, in the part that
        `fit` takes: `(1, 3, h, w)` in [-1, 1]. `image`, RGB, may be shrunk in place."""
        windows = self.windows(*shape, content=True)
        # in a long shape a long picture is drawn larger than a square could hold it
        larger = min(shape[0] / image.width, shape[1] / image.height) * max(image.size) / min(shape)
        image.thumbnail((round(long_size * larger),) * 2, Image.Resampling.LANCZOS)
        scale = min(windows.width / shape[0], windows.height / shape[1])
        scale *= min(shape[0] / image.width, shape[1] / image.height)
        width, height = (max(round(side * scale), 1) for side in image.size)
        pixels = _pixels(image.resize((width, height), Image.Resampling.LANCZOS))
        return continue_edges(pixels, width=windows.width, height=windows.height)

    def native_content_size(self, image: Image.Image, content_long_size: int) -> int:
        """Long side at which a content picture is encoded: as asked for FLUX, else a multiple of 16."""
        if self.config.native_scale == 1:
            return content_long_size
        long_size = content_long_size or min(max(image.size), OWN_SIZE_MAX)
        return round_to_tokens(long_size * self.config.native_scale)

    def prepare_latents(
        self,
        *,
        width: int,
        height: int,
        device: torch.device,
        dtype: torch.dtype,
        generator: torch.Generator | None,
        latents: Tensor | None,
    ) -> Tensor:
        """Packed starting noise `(1, N, 64)`: drawn in bf16 whatever the dtype, as the official code."""
        channels = self.transformer.config.in_channels
        shape = (1, height // PIXELS_PER_TOKEN * (width // PIXELS_PER_TOKEN), channels)
        if latents is None:
            noise = torch.randn(
                (1, channels // 4, height // 8, width // 8),
                dtype=torch.bfloat16,
                device=generator.device if generator is not None else device,
                generator=generator,
            )
            latents = pack_latents(noise)
        if latents.shape != shape:
            raise ValueError(f"`latents` must have shape {shape}, got {tuple(latents.shape)}")
        return latents.to(device, dtype)

    def prepare_img_ids(self, windows: Windows, content_latents: list[Tensor]) -> Tensor:
        """`(tokens, 3)` ids of a window of the target and then of each content picture, or its part there."""
        width, height = windows.window
        target = (height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN)
        references = [(latents.shape[2] // 2, latents.shape[3] // 2) for latents in content_latents]
        if len(windows) > 1:
            references = [target] * len(content_latents)
        return torch.cat([position_ids(*target), *reference_position_ids(target, references)])

    def decode(self, latents: Tensor, *, width: int, height: int) -> Tensor:
        """Packed latents `(1, N, 64)` to pixels `(1, 3, height, width)`, about [-1, 1]."""
        latents = unpack_latents(latents, width=width, height=height)
        latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return self.vae.decode(latents, return_dict=False)[0]


def _pixels(image: Image.Image) -> Tensor:
    """An RGB picture as `(1, 3, height, width)` in [-1, 1]."""
    pixels = np.asarray(image, dtype=np.float32) / np.float32(127.5) - np.float32(1)  # (h, w, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()


def _as_list(images: Image.Image | list[Image.Image] | None) -> list[Image.Image]:
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]
