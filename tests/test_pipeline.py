"""`USOPipeline` as a diffusers user expects it, on real classes at a tiny size."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from diffusers import DiffusionPipeline, FirstBlockCacheConfig
from PIL import Image
from torch import Tensor, nn

from tests.parity import GOLDENS, load, picture
from uso.errors import Cancelled, ImageError
from uso.images import to_rgb
from uso.model.pipeline import USOPipeline

CONTENT, STYLE, SECOND_STYLE = picture("land"), picture("styleA"), picture("styleB")


@pytest.fixture
def pipe(tiny_folder: Path) -> USOPipeline:
    pipe = USOPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: USOPipeline, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "content_image": CONTENT,
        "style_images": [STYLE],
        "width": 64,
        "height": 48,
        "num_inference_steps": 3,
        "content_long_size": 64,
        "generator": torch.Generator().manual_seed(5),
        "output_type": "latent",
    }
    return pipe("a cat on a chair", **{**arguments, **changes}).images


@pytest.fixture(scope="module")
def expected() -> Tensor:
    return draw(load("flux-dev"))


def close(a: Tensor, b: Tensor) -> bool:
    return (a - b).abs().max().item() < 1e-4


class Counter:
    """Counts the calls of a module's forward."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.calls = 0
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return original(*args, **kwargs)

        module.forward = forward


def is_clean(pipe: USOPipeline) -> bool:
    """Nothing precomputed is left in the transformer."""
    return not any("precomputed" in vars(module) for module in pipe.transformer.modules())


def test_from_pretrained_and_save_pretrained_round_trip(
    pipe: USOPipeline, expected: Tensor, tmp_path: Path
) -> None:
    assert close(draw(pipe), expected)
    pipe.register_to_config(native_scale=0.5, max_sequence_length=16)
    pipe.save_pretrained(tmp_path)
    again = USOPipeline.from_pretrained(tmp_path)
    assert (again.config.native_scale, again.config.max_sequence_length) == (0.5, 16)
    assert list(again.style_projector.config.levels) == [-2, -11, -20]


def test_lora_as_in_diffusers(expected: Tensor, tiny_folder: Path) -> None:
    apart = load("flux-dev", fuse_lora=False)
    assert close(draw(apart), expected)
    base = USOPipeline.from_pretrained(tiny_folder)
    base.transformer.load_state_dict(
        {
            name.replace(".base_layer", ""): value
            for name, value in apart.transformer.state_dict().items()
            if "lora_" not in name
        }
    )
    base.set_progress_bar_config(disable=True)
    without = draw(base)
    assert not close(without, expected)
    base.load_lora_weights(GOLDENS / "weights", weight_name="dit_lora.safetensors", adapter_name="uso")
    assert base.get_active_adapters() == ["uso"]
    assert close(draw(base), expected)
    base.set_adapters("uso", 0.0)
    assert close(draw(base), without)
    base.set_adapters("uso", 1.0)
    base.fuse_lora()
    assert close(draw(base), expected)
    base.unfuse_lora()
    base.unload_lora_weights()
    assert close(draw(base), without)


def raise_cancelled(*args: Any) -> dict[str, Tensor]:
    raise Cancelled("stop")


def model_offload(pipe: USOPipeline) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def group_offload(pipe: USOPipeline) -> None:
    cpu = torch.device("cpu")
    pipe.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


@pytest.mark.parametrize("enable", [model_offload, group_offload])
def test_offload(pipe: USOPipeline, expected: Tensor, enable: Callable[[USOPipeline], None]) -> None:
    enable(pipe)
    assert close(draw(pipe), expected)
    with pytest.raises(Cancelled):
        draw(pipe, callback_on_step_end=raise_cancelled)
    assert close(draw(pipe), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("enable", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offload_on_a_gpu(pipe: USOPipeline, expected: Tensor, enable: str) -> None:
    getattr(pipe, enable)()
    assert (draw(pipe).cpu() - expected).abs().max() < 1e-2
    with pytest.raises(Cancelled):
        draw(pipe, callback_on_step_end=raise_cancelled)
    assert all(parameter.device.type in ("cpu", "meta") for parameter in pipe.transformer.parameters())


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_attention_backends(pipe: USOPipeline, expected: Tensor, backend: str) -> None:
    pipe.transformer.set_attention_backend(backend)
    try:
        assert close(draw(pipe), expected)
    finally:
        pipe.transformer.reset_attention_backend()


def test_step_cache(pipe: USOPipeline, expected: Tensor) -> None:
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    assert close(draw(pipe), expected)
    pipe.transformer.disable_cache()
    assert close(draw(pipe), expected)


def test_bf16(tiny_folder: Path, expected: Tensor) -> None:
    pipe = USOPipeline.from_pretrained(tiny_folder, torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    latents = draw(pipe)
    assert latents.dtype == torch.bfloat16
    relative = (latents.float() - expected).norm() / expected.norm()
    assert relative < 0.2
    assert draw(pipe, output_type="pil")[0].size == (64, 48)


@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize("error", [Cancelled("stop"), KeyboardInterrupt()])
def test_an_exception_at_any_step_leaves_the_pipeline_usable(
    pipe: USOPipeline, expected: Tensor, step: int, error: BaseException
) -> None:
    def callback(pipe: USOPipeline, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if i == step:
            raise error
        return tensors

    with pytest.raises(type(error)):
        draw(pipe, callback_on_step_end=callback)
    assert is_clean(pipe)
    assert close(draw(pipe), expected)


@pytest.mark.parametrize(
    "part",
    ["text_encoder", "text_encoder_2", "image_encoder", "style_projector", "transformer", "vae.decoder"],
)
def test_an_exception_in_any_part_leaves_the_pipeline_usable(
    pipe: USOPipeline, expected: Tensor, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(_part(pipe, part), "forward", fail)
        with pytest.raises(RuntimeError, match="out of luck"):
            draw(pipe, output_type="pil")
    assert is_clean(pipe)
    assert close(draw(pipe), expected)


def _part(pipe: USOPipeline, name: str) -> torch.nn.Module:
    component, _, child = name.partition(".")
    module: torch.nn.Module = getattr(pipe, component)
    return module.get_submodule(child)


def test_stop_and_keep(pipe: USOPipeline) -> None:
    steps = []

    def callback(pipe: USOPipeline, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append(tensors["latents"])
        pipe._interrupt = i == 1
        return tensors

    latents = draw(pipe, num_inference_steps=5, callback_on_step_end=callback)
    assert len(steps) == 2
    assert torch.equal(latents, steps[-1])


def test_callback_sees_steps_and_may_change_latents(pipe: USOPipeline) -> None:
    seen = []

    def callback(pipe: USOPipeline, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((i, round(t.item())))
        return {"latents": torch.zeros_like(tensors["latents"])} if i == 2 else {}

    assert draw(pipe, callback_on_step_end=callback).abs().max() == 0
    assert [i for i, _ in seen] == [0, 1, 2]
    assert seen[0][1] == 1000


def test_output_types(pipe: USOPipeline) -> None:
    [image] = draw(pipe, output_type="pil")
    array = draw(pipe, output_type="np")
    tensor = draw(pipe, output_type="pt")
    assert image.mode == "RGB"
    assert image.size == (64, 48)
    assert array.shape == (1, 48, 64, 3)
    assert tensor.shape == (1, 3, 48, 64)
    assert (
        np.abs(array[0] * 255 - np.asarray(image, dtype=np.float32)).max() <= 0.5 + 1e-3
    )  # rounded, not cut
    assert (
        pipe("", width=32, height=32, num_inference_steps=1, return_dict=False, output_type="latent")[0].ndim
        == 3
    )


def test_same_seed_same_picture_and_another_seed_another(pipe: USOPipeline, expected: Tensor) -> None:
    assert close(draw(pipe), expected)
    other = draw(pipe, generator=torch.Generator().manual_seed(6))
    assert not close(other, expected)


def test_given_noise_and_given_references(pipe: USOPipeline, expected: Tensor) -> None:
    noise = pipe.prepare_latents(
        width=64,
        height=48,
        device=torch.device("cpu"),
        dtype=torch.float32,
        generator=torch.Generator().manual_seed(5),
        latents=None,
    )
    with torch.no_grad():
        reference = pipe.encode_content(CONTENT, content_long_size=64, device=torch.device("cpu"))
    latents = draw(pipe, generator=None, latents=noise, content_image=None, content_latents=[reference])
    assert close(latents, expected)


def test_style_order_does_not_matter_but_styles_and_contents_do(pipe: USOPipeline, expected: Tensor) -> None:
    both = draw(pipe, style_images=[STYLE, SECOND_STYLE])
    assert close(both, draw(pipe, style_images=[SECOND_STYLE, STYLE]))
    assert not close(both, expected)
    assert not close(draw(pipe, content_image=None), expected)
    assert not close(draw(pipe, content_image=[CONTENT, picture("square")]), expected)
    assert not close(draw(pipe, content_long_size=96), expected)


def test_pictures_of_any_mode(pipe: USOPipeline) -> None:
    for name in ("rgba", "gray", "pal"):
        image = picture(name)
        assert torch.equal(
            draw(pipe, content_image=image, style_images=image, num_inference_steps=1),
            draw(pipe, content_image=to_rgb(image), style_images=to_rgb(image), num_inference_steps=1),
        )


def test_native_scale_draws_small_and_enlarges(pipe: USOPipeline) -> None:
    pipe.register_to_config(native_scale=0.25)
    latents = draw(pipe, width=128, height=96, content_long_size=256)
    assert latents.shape == (1, 32 // 16 * (32 // 16), 64)  # 96 / 4 is not a multiple of 16
    [image] = draw(pipe, width=128, height=96, content_long_size=256, output_type="pil")
    assert image.size == (128, 96)
    small = Image.new("RGB", (600, 300))
    assert pipe.native_content_size(small, 512) == 128
    assert pipe.native_content_size(small, 0) == 144
    assert pipe.native_content_size(Image.new("RGB", (3000, 3000)), 0) == 256
    with pytest.raises(ImageError, match="content_long_size"):
        draw(pipe, content_image=Image.new("RGB", (200, 100)), content_long_size=64)


def test_native_side_draws_a_square_and_other_shapes_in_windows(pipe: USOPipeline) -> None:
    pipe.register_to_config(native_scale=0.25, native_side=64)
    assert draw(pipe, width=128, height=128).shape == (1, 16, 64)
    assert draw(pipe, width=256, height=128).shape == (1, 32, 64)
    for width, height in ((128, 128), (256, 128), (128, 272)):
        assert draw(pipe, width=width, height=height, output_type="pil")[0].size == (width, height)
    grid = torch.arange(12 * 8).view(1, 12, 8)  # 96x64 pixels, of which 80x64 have the proportions
    assert torch.equal(pipe.fit(grid, width=128, height=160), grid[:, 1:11])
    framed = Image.new("RGB", (100, 100), "red")
    framed.paste("blue", (10, 10, 90, 90))
    pixels = pipe.fit_content(framed, 128, (176, 64))  # whole, in the middle: 64x64 of 192x64
    fitted = pipe.image_processor.postprocess(pixels)[0]
    assert fitted.size == (192, 64)
    assert fitted.getchannel("B").point(lambda value: 255 * (value > 127)).getbbox() == (70, 6, 122, 58)
    assert {fitted.getpixel(corner) for corner in ((0, 0), (191, 0), (0, 63), (191, 63))} == {(255, 0, 0)}


def test_without_content_one_square_is_drawn_and_its_edges_are_continued(pipe: USOPipeline) -> None:
    pipe.register_to_config(native_side=64)
    words = {"content_image": None, "num_inference_steps": 1}
    assert draw(pipe, width=256, height=128, **words).shape == (1, 16, 64)
    square, wide, tall = (
        draw(pipe, width=width, height=height, output_type="pt", **words)[0]
        for width, height in ((64, 64), (192, 64), (64, 112))
    )
    assert close(wide[..., 64:128], square)
    assert close(tall[:, 24:88], square)
    assert close(wide[..., 128:], wide[..., 128:129].expand(3, 64, 64)), "one column, repeated"
    assert not close(wide[..., 128], square[..., -1]), "softened"


def test_a_window_sees_what_lies_under_it(pipe: USOPipeline) -> None:
    """One step: outside of overlaps a token is what its square alone would give, inside a mean."""
    random = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 2, 4, 64, generator=random)  # rows and columns of tokens
    content = torch.randn(1, 16, 4, 8, generator=random)
    options: dict[str, Any] = {"content_image": None, "num_inference_steps": 1, "generator": None}
    pipe.register_to_config(native_side=32)

    def square(column: int) -> Tensor:
        """The picture of the window that begins there, `(1, 2, 2, 64)`."""
        return draw(
            pipe, width=32, height=32, latents=latents[:, :, column : column + 2].flatten(1, 2),
            content_latents=[content[..., 2 * column : 2 * column + 4]], **options,
        ).view(1, 2, 2, 64)  # fmt: skip

    whole = draw(
        pipe, width=64, height=32, latents=latents.flatten(1, 2), content_latents=[content], **options
    ).view(1, 2, 4, 64)
    left, middle, right = map(square, range(3))
    assert close(whole[:, :, 0], left[:, :, 0])
    assert close(whole[:, :, 1], (left[:, :, 1] + middle[:, :, 0]) / 2)
    assert close(whole[:, :, 3], right[:, :, 1])
    assert not close(left[:, :, 1], middle[:, :, 0])
    with pytest.raises(ValueError, match="those of 64x32 pixels, which are 8 tokens, got 4"):
        draw(pipe, width=64, height=32, content_latents=[content[..., :4]], **options)
    assert is_clean(pipe)


def test_sizes_absent_or_half_given(pipe: USOPipeline) -> None:
    seen = []

    def callback(pipe: USOPipeline, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(tensors["latents"].shape[1])
        raise Cancelled

    for sizes in ({"width": None, "height": None}, {"width": 768, "height": None}):
        with pytest.raises(Cancelled):
            draw(pipe, callback_on_step_end=callback, **sizes)
    assert seen == [1024 // 16 * (672 // 16), 768 // 16 * (512 // 16)]  # land is 150x100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 65}, "`width` must be a positive multiple of 16, got 65"),
        ({"height": 0}, "`height` must be a positive multiple of 16, got 0"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be at least 1, got 0"),
        ({"content_long_size": -1}, "`content_long_size` must be 0 or more, got -1"),
        ({"content_image": "cat.png"}, "`content_image` must be a PIL picture"),
        ({"style_images": [STYLE, 3]}, "`style_images` must be a PIL picture or a list of them, got int"),
        ({"content_latents": []}, "not both"),
        ({"output_type": "jpg"}, "`output_type` must be one of pil, np, pt, latent, got 'jpg'"),
        (
            {"callback_on_step_end_tensor_inputs": ["noise"]},
            "may hold \\['latents', 'noise_pred'\\], got \\['noise'\\]",
        ),
        ({"latents": torch.zeros(1, 5, 64)}, "`latents` must have shape \\(1, 12, 64\\), got \\(1, 5, 64\\)"),
    ],
)
def test_wrong_arguments_are_named(pipe: USOPipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(pipe, **arguments)
    assert is_clean(pipe)


def test_prompt_must_be_text(pipe: USOPipeline) -> None:
    with pytest.raises(ValueError, match="`prompt` must be one string, got list"):
        pipe(["a", "b"])


def test_it_computes_where_offload_says(pipe: USOPipeline) -> None:
    assert pipe._execution_device == DiffusionPipeline._execution_device.fget(pipe) == torch.device("cpu")
    models = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    for model in models:
        add_hook_to_module(model, AlignDevicesHook(execution_device="meta"))
    assert pipe._execution_device == DiffusionPipeline._execution_device.fget(pipe) == torch.device("meta")
    for model in models:
        remove_hook_from_module(model)
    assert pipe._execution_device == torch.device("cpu")


def test_schnell_has_no_guidance() -> None:
    pipe = load("flux-schnell")
    assert torch.equal(draw(pipe, guidance_scale=1.0), draw(pipe, guidance_scale=5.0))
    dev = load("flux-dev")
    assert not close(draw(dev, guidance_scale=1.0), draw(dev, guidance_scale=5.0))
