"""What a model takes of a device's memory, and the ways to take less: one table, and the bytes behind it.

Arithmetic over the parts' shapes: no device is asked and no tensor is made, so a model on meta will do. It
is done in `uso.model.quantize` (int8, int4), `uso.serve.staging` (staged, offload) and `uso.serve.device`,
which picks the memory mode.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from uso.model.windows import Windows

MemoryMode = Literal["full", "staged", "offload"]
Quantization = Literal["none", "int8", "int4"]
MEMORY_MODES: tuple[MemoryMode, ...] = get_args(MemoryMode)  # from fast and large to slow and small
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)

GB = 1e9
TOKEN_PIXELS = 16 * 16  # of a picture, see `uso.model.geometry`
# bytes beside weights and activations: kernels' workspaces and what an allocator leaves between blocks
HEADROOM = 5 * 10**8
FLOAT32_COMPONENTS = ("image_encoder",)  # in float32 always, as in the official code
LARGE_COMPONENTS = ("transformer", "text_encoder_2")  # those that are quantized, and offloaded by blocks
MODULATION = ("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear")


@dataclass(frozen=True)
class Mode:
    """A row of the table.

    Args:
        flag: how to ask for it on the command line.
        needs: the device it wants.
        recipe: what it does.
        loss: PSNR of its pictures to those of `full`: three by nano, 512x512, 25 steps, and the relative
            error of their last latents; `docs/performance.md`. "none" means the same bits.
    """

    name: str
    flag: str
    needs: str
    recipe: str
    loss: str


TABLE: tuple[Mode, ...] = (
    Mode("full", "--memory full", "any", "everything stays on the device", "none"),
    Mode(
        "staged", "--memory staged", "CUDA", "one part on it at a time, the modulation layers never", "none"
    ),
    Mode("offload", "--memory offload", "CUDA", "one block on it at a time: slow", "none"),
    Mode("int8", "--quantize int8", "CUDA or CPU", "transformer and T5 in 8 bit", "48 dB; latents 1.5 %"),
    Mode(
        "int4",
        "--quantize int4",
        "CUDA or CPU",
        "transformer and T5 in 4 bit",
        "28 dB; latents 16 %",
    ),
    Mode(
        "turbo",
        "--turbo",
        "any",
        "steps that change little reuse the last one's blocks",
        "42 dB; latents 3.6 %",
    ),
)


@dataclass(frozen=True)
class Picture:
    """What is asked for, as far as memory depends on it; all sides in pixels.

    Args:
        content: width and height at which each content picture is encoded.
        styles: number of style pictures.
    """

    width: int = 1024
    height: int = 1024
    content: tuple[tuple[int, int], ...] = ((512, 512),)
    styles: int = 1


@dataclass(frozen=True)
class Part:
    """Bytes of one component's weights.

    Args:
        weights: all of them.
        staged: without the modulation layers.
        streamed: without what lies in blocks, plus the largest block.
    """

    weights: int
    staged: int
    streamed: int


@dataclass(frozen=True)
class Footprint:
    """Bytes a pipeline takes, by memory mode and picture.

    Args:
        parts: by component.
        hidden: the transformer's width.
        itemsize: bytes of a number in its activations.
        text_tokens, style_tokens: tokens of a prompt, and of each style picture.
        vae_widths: channels of the autoencoder's two finest levels.
        vae_itemsize: bytes of a number in it.
        native_scale, native_side: as in `USOPipeline`.
    """

    parts: Mapping[str, Part]
    hidden: int
    itemsize: int
    text_tokens: int
    style_tokens: int
    vae_widths: tuple[int, int]
    vae_itemsize: int
    native_scale: float = 1.0
    native_side: int | None = None

    @classmethod
    def of(
        cls,
        components: Mapping[str, Any],
        *,
        itemsize: int | None = None,
        quantize: Quantization = "none",
        text_tokens: int = 512,
        native_scale: float = 1.0,
        native_side: int | None = None,
    ) -> "Footprint":
        """Of a pipeline's `components`, which may be on any device.

        Args:
            itemsize: bytes of a number in the weights, where they are not as they will be loaded.
            quantize: as what the weights count; those that are quantized already stay so.
        """
        transformer, vae = components["transformer"].config, components["vae"].config
        projector = components["style_projector"].config

        def size(name: str) -> int:
            return itemsize or next(components[name].parameters()).element_size()

        return cls(
            parts={
                name: _part(
                    module,
                    large=name in LARGE_COMPONENTS,
                    itemsize=4 if itemsize and name in FLOAT32_COMPONENTS else itemsize,
                    quantize=quantize,
                )
                for name, module in components.items()
                if hasattr(module, "parameters")
            },
            hidden=transformer.num_attention_heads * transformer.attention_head_dim,
            itemsize=size("style_projector"),
            text_tokens=text_tokens,
            style_tokens=len(projector.levels) * projector.tokens_per_level,
            vae_widths=tuple(vae.block_out_channels[:2]),
            vae_itemsize=size("vae"),
            native_scale=native_scale,
            native_side=native_side,
        )

    @classmethod
    def of_pipeline(cls, pipe: Any) -> "Footprint":
        """Of a `USOPipeline` as it is."""
        return cls.of(
            pipe.components,
            text_tokens=pipe.config.max_sequence_length,
            native_scale=pipe.config.native_scale,
            native_side=pipe.config.native_side,
        )

    def weights(self, memory: MemoryMode) -> int:
        """Most bytes of weights that lie on the device at once."""
        return self._most(memory, dict.fromkeys(self.parts, 0))

    def peak(self, memory: MemoryMode, picture: Picture = Picture(), *, turbo: bool = False) -> int:
        """Most bytes on the device while `picture` is drawn. An estimate: see `HEADROOM`."""
        beside = dict.fromkeys(self.parts, 0)
        beside["transformer"] = self.transformer_activations(picture, memory, turbo=turbo)
        beside["vae"] = self.vae_activations(picture)
        return self._most(memory, beside) + HEADROOM

    def tokens(self, picture: Picture) -> int:
        """Length of the transformer's sequence in a window: style, text, picture and content tokens."""
        windows = self.windows(picture)
        parts = [windows.window] * len(picture.content) if self.native_side else self._content(picture)
        content = sum(width * height // TOKEN_PIXELS for width, height in parts)
        return self.text_tokens + picture.styles * self.style_tokens + windows.tokens + content

    def windows(self, picture: Picture) -> Windows:
        return Windows.over(
            picture.width, picture.height, scale=self.native_scale, side=self.native_side,
            content=bool(picture.content),
        )  # fmt: skip

    def _most(self, memory: MemoryMode, beside: Mapping[str, int]) -> int:
        if memory == "full":
            return sum(part.weights for part in self.parts.values()) + max(beside.values())
        kind = "staged" if memory == "staged" else "streamed"
        return max(getattr(part, kind) + beside[name] for name, part in self.parts.items())

    def transformer_activations(self, picture: Picture, memory: MemoryMode, *, turbo: bool) -> int:
        # A block's rotary embedding holds the tokens before and in it, norm, q, k and v, and four float32
        # copies of q; joining attention and MLP (4) holds both twice. Blocks that `lean_blocks` leaves alone
        # have the MLP meanwhile, too, or what they joined. turbo keeps three more states of the sequence.
        numbers = max(6 * self.itemsize + 4 * 4, 13 * self.itemsize)
        if turbo or memory == "offload":
            numbers = max(9 * self.itemsize + 4 * 4, 15 * self.itemsize) + 3 * turbo * self.itemsize
        return len(self.windows(picture)) * self.tokens(picture) * self.hidden * numbers

    def vae_activations(self, picture: Picture) -> int:
        # At full size: decoding three tensors of the second-finest width, encoding five of the finest
        finest, second = self.vae_widths
        windows = self.windows(picture)
        decoding = 3 * second * windows.width * windows.height
        encoding = max((5 * finest * width * height for width, height in self._content(picture)), default=0)
        return max(decoding, encoding) * self.vae_itemsize

    def _content(self, picture: Picture) -> list[tuple[int, int]]:
        """Sizes at which content pictures are encoded."""
        if self.native_side:
            windows = self.windows(picture)
            return [(windows.width, windows.height)] * len(picture.content)
        scale = self.native_scale
        return [(round(width * scale), round(height * scale)) for width, height in picture.content]


def choose_memory(footprint: Footprint, free: float) -> tuple[MemoryMode, str]:
    """The fastest memory mode in which the usual picture fits `free` bytes, and why, in one line."""
    need = {mode: footprint.peak(mode) for mode in MEMORY_MODES}
    mode = next((mode for mode in MEMORY_MODES if need[mode] <= free), MEMORY_MODES[-1])
    picture = f"{Picture().width}x{Picture().height}"
    why = f"a {picture} picture needs {need[mode] / GB:.1f} GB in it, {free / GB:.1f} GB are free"
    if mode != "full":
        faster = MEMORY_MODES[MEMORY_MODES.index(mode) - 1]
        why += f"; {faster} needs {need[faster] / GB:.1f} GB"
    if need[mode] > free:
        why += ". It may not fit: free some, ask for smaller pictures, or start with --device cpu"
    return mode, why


def modulation_layers(transformer: Any) -> list[Any]:
    """The linear layers of adaLN: 3.25 of FLUX's 11.9 billion weights, run once a picture."""
    return [module for name, module in transformer.named_modules() if name.endswith(MODULATION)]


def blocks(module: Any) -> Iterator[Any]:
    """The layers that run one after another: what the outermost ModuleLists hold."""
    for child in module.children():
        if type(child).__name__ == "ModuleList":
            yield from child
        else:
            yield from blocks(child)


def tensors(module: Any) -> list[Any]:
    """Parameters and buffers, each once."""
    return [*module.parameters(), *module.buffers()]


def quantized_layers(component: Any, quantize: Quantization) -> dict[str, tuple[Any, Quantization]]:
    """The layers that take quantization, by name, each with its kind.

    The linear ones of the blocks, but for the modulation, which runs once a picture, and the smallest. T5
    casts to the type of `wo.weight`, of which transformers knows int8 alone to be none of numbers.
    """
    inside = {layer for block in blocks(component) for layer in block.modules()}
    taken = inside - {*modulation_layers(component)}
    return {
        name: (layer, "int8" if name.endswith(".wo") and quantize != "none" else quantize)
        for name, layer in component.named_modules()
        if layer in taken
        and isinstance(getattr(layer, "in_features", None), int)
        and layer.in_features >= 32
        and layer.weight.numel() >= 16384
    }


def _part(component: Any, *, large: bool, itemsize: int | None, quantize: Quantization) -> Part:
    def number(tensor: Any) -> int:
        return itemsize if itemsize and tensor.is_floating_point() else tensor.element_size()

    sizes = {tensor: tensor.numel() * number(tensor) for tensor in tensors(component)}
    if large and quantize != "none":
        for layer, kind in quantized_layers(component, quantize).values():
            sizes[layer.weight] = _quantized(layer, number(layer.weight), kind)
    weights = sum(sizes.values())
    if not large:
        return Part(weights, weights, weights)
    away = {tensor for layer in modulation_layers(component) for tensor in tensors(layer)}
    staged = weights - sum(sizes[tensor] for tensor in away)
    stack = [sum(sizes[t] for t in tensors(block) if t not in away) for block in blocks(component)]
    return Part(weights, staged, staged - sum(stack) + max(stack))


def _quantized(layer: Any, itemsize: int, quantize: Quantization) -> int:
    """Bytes of a matrix: its numbers, and of each group of columns a scale, for int4 an offset too."""
    bits, group, extra = (8, 1024, itemsize) if quantize == "int8" else (4, 64, 2 * itemsize)
    columns = layer.in_features
    groups = next((n for n in range(columns // group, 1, -1) if columns % n == 0), 1)
    return layer.out_features * (columns * bits // 8 + groups * extra)
