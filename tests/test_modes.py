"""The table of modes: bytes at full size, and the formulas behind them against runs on the meta device."""

import dataclasses
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from uso.errors import InputError
from uso.images import open_image
from uso.model.checkpoints import load_pipeline
from uso.model.lean_blocks import lean_blocks
from uso.model.modes import (
    GB,
    MEMORY_MODES,
    TABLE,
    Footprint,
    MemoryMode,
    Picture,
    Quantization,
    choose_memory,
    modulation_layers,
    tensors,
)
from uso.model.plans import autoencoder_plan, published_components, transformer_plan
from uso.model.quantize import quantize
from uso.model.variants import DEV
from uso.settings import Settings

EXAMPLES = Path(__file__).parents[1] / "assets" / "examples"
GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    return published_components(DEV)


def footprint(published: dict[str, Any], quantize: Quantization = "none") -> Footprint:
    return Footprint.of(published, itemsize=2, quantize=quantize)


def test_the_table_has_a_row_for_each_setting() -> None:
    names = [mode.name for mode in TABLE]
    assert names == [*MEMORY_MODES, *(kind for kind in get_args(Quantization) if kind != "none"), "turbo"]
    kinds = {name: get_args(Settings.model_fields[name].annotation) for name in ("memory", "quantize")}
    assert kinds == {"memory": ("auto", *MEMORY_MODES), "quantize": get_args(Quantization)}


@pytest.mark.parametrize(
    ("quantize", "full", "staged", "offload"),
    [("none", 35.5, 17.31, 1.71), ("int8", 22.3, 8.73, 1.71), ("int4", 16.89, 4.94, 1.71)],
)
def test_weights_on_the_device_at_full_size(
    published: dict[str, Any], quantize: Quantization, full: float, staged: float, offload: float
) -> None:
    """Decimal GB of FLUX.1-dev in bf16; `staged` without the modulation layers' 6.5."""
    found = footprint(published, quantize)
    assert [found.weights(mode) / GB for mode in MEMORY_MODES] == pytest.approx(
        [full, staged, offload], abs=0.05
    )


@pytest.mark.parametrize(("quantize", "limit"), [("none", 19), ("int8", 10), ("int4", 6)])
def test_what_a_card_must_have(published: dict[str, Any], quantize: Quantization, limit: float) -> None:
    """A 1024x1024 picture of a subject in a style, no weights streamed."""
    assert footprint(published, quantize).peak("staged") < limit * GB


def test_the_modulation_is_a_quarter_of_the_transformer(published: dict[str, Any]) -> None:
    layers = modulation_layers(published["transformer"])
    assert len(layers) == 19 * 2 + 38 + 1
    weights = sum(tensor.numel() for layer in layers for tensor in tensors(layer))
    assert weights == pytest.approx(3.25e9, rel=0.01)


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors other than `known` held at once."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.live: list[tuple[weakref.ref[torch.Tensor], int, int]] = []
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(outputs)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self.live.append((weakref.ref(tensor), storage._cdata, storage.nbytes()))
        self.live = [entry for entry in self.live if entry[0]() is not None]
        self.peak = max(self.peak, sum({storage: size for _, storage, size in self.live}.values()))
        return outputs


@pytest.fixture
def no_attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On meta, attention would be written out; on devices it holds no scores."""
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda query, key, value, **_: torch.empty_like(query),
    )


@pytest.mark.usefixtures("no_attention")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("memory", ["staged", "offload"])
def test_activations_of_a_step(published: dict[str, Any], dtype: torch.dtype, memory: MemoryMode) -> None:
    """FLUX's width at full length on meta, few blocks: their number does not count."""
    variant = dataclasses.replace(DEV, depth=1, depth_single_blocks=2)
    model = transformer_plan(variant).model.to(dtype).requires_grad_(False)
    picture = Picture(styles=2)
    found = Footprint.of(published, itemsize=dtype.itemsize)
    text = found.text_tokens + 2 * found.style_tokens
    image = found.tokens(picture) - text

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device="meta")

    inputs = {
        "hidden_states": zeros(1, image, 64),
        "timestep": zeros(1),
        "guidance": zeros(1),
        "pooled_projections": zeros(1, 768),
        "encoder_hidden_states": zeros(1, text, 4096),
        "txt_ids": zeros(text, 3, dtype=torch.float32),
        "img_ids": zeros(image, 3, dtype=torch.float32),
    }
    lean = lean_blocks(model, zeros(1, 4096, 64)) if memory == "staged" else nullcontext()
    with torch.no_grad(), lean, LiveBytes(tensors(model)) as live:
        model(**inputs)
    assert found.transformer_activations(picture, memory, turbo=False) == pytest.approx(live.peak, rel=0.03)


@pytest.mark.usefixtures("no_attention")
@pytest.mark.parametrize(("side", "content"), [(1024, 512), (512, 1024)])
def test_activations_of_the_autoencoder(published: dict[str, Any], side: int, content: int) -> None:
    model = autoencoder_plan(DEV).model.to(torch.bfloat16).requires_grad_(False)
    with torch.no_grad(), LiveBytes(tensors(model)) as live:
        model.encode(torch.zeros(1, 3, content, content, dtype=torch.bfloat16, device="meta"))
        model.decode(torch.zeros(1, 16, side // 8, side // 8, dtype=torch.bfloat16, device="meta"))
    picture = Picture(side, side, content=((content, content),))
    assert footprint(published).vae_activations(picture) == pytest.approx(live.peak, rel=0.03)


@pytest.mark.parametrize(
    ("free", "mode", "says"),
    [
        (80, "full", "needs 37.6 GB in it, 80.0 GB are free"),
        (24, "staged", "needs 18.3 GB in it, 24.0 GB are free; full needs 37.6 GB"),
        (12, "offload", "needs 2.3 GB in it, 12.0 GB are free; staged needs 18.3 GB"),
        (2, "offload", "It may not fit: free some"),
    ],
)
def test_auto_takes_the_fastest_that_fits(published: dict[str, Any], free: int, mode: str, says: str) -> None:
    chosen, why = choose_memory(footprint(published), free * GB)
    assert chosen == mode
    assert says in why
    assert ("may not fit" in why) == (free < 2.3)


def test_larger_pictures_take_more(published: dict[str, Any]) -> None:
    found = footprint(published)
    sizes = [Picture(512, 512), Picture(), Picture(styles=2), Picture(1536, 1536, ((1024, 1024),), 2)]
    peaks = [found.peak("staged", picture) for picture in sizes]
    assert peaks == sorted(set(peaks))
    assert found.peak("staged", turbo=True) > found.peak("staged")


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_weights_take_the_bytes_of_the_table(kind: Quantization, dtype: torch.dtype) -> None:
    expected = Footprint.of(load_pipeline("nano", torch_dtype=dtype).components, quantize=kind)
    pipe = load_pipeline("nano", torch_dtype=dtype, quantization=kind)
    assert Footprint.of_pipeline(pipe).parts == expected.parts
    before = Footprint.of_pipeline(load_pipeline("nano", torch_dtype=dtype))
    assert expected.parts["transformer"].staged < 0.6 * before.parts["transformer"].staged
    modulation = modulation_layers(pipe.transformer)
    assert {layer.weight.dtype for layer in modulation} == {dtype}
    assert not any("sdnq" in type(layer).__name__.lower() for layer in modulation)


@pytest.mark.parametrize(("kind", "limit"), [("int8", 0.02), ("int4", 0.2)])
def test_a_quantized_model_predicts_nearly_the_same(kind: Quantization, limit: float) -> None:
    """The relative error of the prediction, a subject in a style, is not zero, and bounded."""
    subject, style = (open_image(EXAMPLES / f"{name}.jpg") for name in ("fox", "halftone"))
    predictions = []
    for quantization in ("none", kind):
        pipe = load_pipeline("nano", quantization=quantization)  # type: ignore[arg-type]
        pipe.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(1)
        drawn = pipe(
            "",
            content_image=subject,
            style_images=style,
            width=512,
            height=512,
            num_inference_steps=1,
            generator=noise,
            output_type="latent",
        )
        predictions.append(drawn.images)
    lossless, lossy = predictions
    assert 0 < ((lossy - lossless).norm() / lossless.norm()).item() < limit


def test_quantization_needs_the_lora_merged() -> None:
    with pytest.raises(ValueError, match="needs the LoRA merged"):
        load_pipeline(GOLDENS / "weights", fuse_lora=False, quantization="int8")


def test_quantization_is_refused_where_it_was_not_tried() -> None:
    with pytest.raises(InputError, match="has not been tried on mps"):
        quantize(None, "int8", device=torch.device("mps"))
