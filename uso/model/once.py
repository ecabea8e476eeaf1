"""What does not change is computed once: within a picture by `precomputed`, between pictures by a cache, and
within T5 by `share_position_bias`."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.func import functional_call
from transformers import T5EncoderModel
from transformers.models.t5.modeling_t5 import T5Attention

from uso.model.modes import modulation_layers

CACHE_BYTES = 512 * 10**6  # nine prompts of FLUX at 25 steps, most of it their modulations
SAMPLES = 8  # values looked at in each weight


@contextmanager
def precomputed(
    transformer: FluxTransformer2DModel,
    *,
    table: Tensor,
    encoder_hidden_states: Tensor,
    style_tokens: Tensor | None,
    ids: Tensor,
) -> Iterator[Callable[[int], Any]]:
    """Within it a step computes only what depends on the latents. Call what it gives with the step's index.

    Once for all steps: the text's embedding with the style tokens before it, and the rotary embedding.
    Meanwhile `modulation_layers` are not called: their weights may lie elsewhere. No module is replaced:
    saving, LoRA, offload and compilation see the transformer as it is.

    Args:
        table: the `modulations` of all steps.
        encoder_hidden_states: T5's, `(1, T, D)`; where they lie is where everything is computed.
        style_tokens: `(1, S, hidden)`.
        ids: positions of the style, text, image and content tokens, `(S + T + N, 3)`.
    """
    text = lend(transformer.context_embedder, encoder_hidden_states.device)(encoder_hidden_states)
    if style_tokens is not None:
        text = torch.cat([style_tokens.to(text), text], dim=1)  # (1, S, D) + (1, T, D) -> (1, S + T, D)
    outputs = {transformer.context_embedder: text, transformer.pos_embed: transformer.pos_embed(ids)}
    # Each step's row is copied to the same place: an index would be a constant of a compiled block.
    current = torch.empty_like(table[:1])
    layers = modulation_layers(transformer)
    widths = [transformer.inner_dim, *(layer.out_features for layer in layers)]
    outputs |= zip([transformer.time_text_embed, *layers], current.split(widths, dim=1), strict=True)
    with giving(outputs):
        yield lambda step: current.copy_(table[step : step + 1])


@contextmanager
def giving(outputs: dict[Any, Any]) -> Iterator[None]:
    """Within it each of the modules gives what stands beside it, whatever it is called with."""
    before = {module: vars(module).get("forward") for module in outputs}  # of offload, if there is any
    try:
        for module, output in outputs.items():
            module.precomputed = output
            module.forward = MethodType(_give_precomputed, module)
        yield
    finally:
        for module, forward in before.items():
            del module.precomputed, module.forward
            if forward is not None:
                module.forward = forward


def _give_precomputed(module: Any, *args: Any, **kwargs: Any) -> Any:
    """A method, and not diffusers' `ModelHook`: then torch.compile makes one graph for all blocks."""
    return module.precomputed


def modulations(
    transformer: FluxTransformer2DModel,
    *,
    sigmas: list[Tensor],
    guidance: Tensor | None,
    pooled_projections: Tensor,
) -> Tensor:
    """What `time_text_embed` and the `modulation_layers` give in every step, `(steps, all their widths)`.

    Through the live modules, so that LoRAs count, and a row at a time, so that it is what a step would give.

    Args:
        sigmas: the `timestep` of each step, `(1,)`.
        guidance: `(1,)`; None for a model without.
        pooled_projections: CLIP's, `(1, P)`.
    """
    device = pooled_projections.device
    parts: Any = transformer.time_text_embed

    def embedder(module: nn.Module) -> Callable[[Tensor], Tensor]:
        embed = lend(module, device)  # of 1000 times what is given, as in the transformer's forward
        return lambda value: embed(parts.time_proj(value * 1000).to(pooled_projections.dtype))

    embeddings = [*map(embedder(parts.timestep_embedder), sigmas)]
    if guidance is not None:
        guidance_embedding = embedder(parts.guidance_embedder)(guidance)
        embeddings = [embedding + guidance_embedding for embedding in embeddings]
    text_embedding = lend(parts.text_embedder, device)(pooled_projections)
    embeddings = [embedding + text_embedding for embedding in embeddings]
    activated = [nn.functional.silu(embedding) for embedding in embeddings]
    columns = [torch.cat(embeddings)]
    for layer in modulation_layers(transformer):
        project = lend(layer, device)
        columns.append(torch.cat([project(embedding) for embedding in activated]))
    return torch.cat(columns, dim=1)


def lend(module: nn.Module, device: torch.device) -> Callable[..., Tensor]:
    """`module`, callable on `device`: weights that lie elsewhere are copied there for as long as it is held.

    Those on meta are brought by accelerate's own hook.
    """
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    if all(tensor.device.type in (device.type, "meta") for tensor in tensors.values()):
        return module
    lent = {name: tensor.to(device) for name, tensor in tensors.items()}
    return lambda *args: functional_call(module, lent, args)


def share_position_bias(encoder: T5EncoderModel) -> None:
    """Have T5 look up each distance between two tokens once, not for every pair: half a small T5's time."""
    for module in encoder.modules():
        if isinstance(module, T5Attention) and module.has_relative_attention_bias:
            module.compute_bias = MethodType(_position_bias, module)


def _position_bias(
    attention: T5Attention, length: int, key_length: int, *, past_seen_tokens: int = 0, **device: Any
) -> Tensor:
    """`(1, heads, length, length)`: an encoder's queries and keys are the same tokens, none of them past."""
    distances = T5Attention.compute_bias(attention, 1, 2 * length - 1, past_seen_tokens=length - 1, **device)
    return distances[:, :, 0].unfold(-1, length, 1).flip(2)  # query q sees the window from length - 1 - q on


class ConditioningCache:
    """What encoders, and the modulations, made of what they were given; the least recently used goes first.

    Values lie on the CPU. Their key is all that decides them: the input, the weights, the device.

    Args:
        limit: bytes to hold at most.
    """

    def __init__(self, limit: int = CACHE_BYTES) -> None:
        self.limit = limit
        self.size = 0
        self._values: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()

    def get(
        self,
        key: object,
        modules: Sequence[nn.Module],
        inputs: Tensor,
        compute: Callable[[Tensor], Tensor],
        *,
        device: torch.device,
    ) -> Tensor:
        """`compute(row)` of each of the `inputs` on `device`, or a copy of what it gave before.

        Each by itself, so that what it gives does not depend on its neighbours by a bit.

        Args:
            key: what is computed.
            modules: whose weights decide it.
            inputs: on the CPU, `(B, ...)`; `compute` is given `(1, ...)`, what it gives is put in a row.
        """
        rows = inputs.split(1)
        if torch.is_grad_enabled():  # a stored value has no graph
            return torch.cat([compute(row.to(device)) for row in rows])
        state = (key, *map(fingerprint, modules), inputs.shape[1:], inputs.dtype, device)
        return torch.cat([self._get(state, row, compute, device) for row in rows])

    def _get(
        self, state: tuple[Any, ...], row: Tensor, compute: Callable[[Tensor], Tensor], device: torch.device
    ) -> Tensor:
        full_key = (*state, hashlib.sha256(row.numpy().tobytes()).hexdigest())
        value = self._values.get(full_key)
        if value is None:
            computed = compute(row.to(device))
            value = self._values[full_key] = computed.to("cpu", copy=True)
            self.size += value.nbytes
        self._values.move_to_end(full_key)
        while self.size > self.limit:
            self.size -= self._values.popitem(last=False)[1].nbytes
        return value.to(device, copy=True)

    def clear(self) -> None:
        self._values.clear()
        self.size = 0


def walk(module: nn.Module) -> Iterator[nn.Module]:
    """The module and all in it, a shared one more than once: `modules()` at a quarter of the time."""
    rest: list[nn.Module | None] = [module]
    while rest:
        if (part := rest.pop()) is not None:
            yield part
            rest.extend(part._modules.values())


@torch.no_grad()
def fingerprint(module: nn.Module) -> int:
    """Another number when the module has other weights, wherever they lie; of use within one process.

    Made of each weight's shape, how often it was written to and a few of its values, and of LoRAs' scales.
    """
    samples: dict[Any, list[Tensor]] = {}
    state: list[Any] = []
    for part in walk(module):
        if isinstance(part, BaseTunerLayer):
            adapters = (part.scaling, part.active_adapters, part.disable_adapters, part.merged_adapters)
            state.append(repr(adapters))
        tensors: dict[str, Tensor | None] = {**part._parameters, **part._buffers}
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            if tensor.is_meta:  # accelerate has it
                tensor = vars(part)["_hf_hook"].weights_map[name]
            state.append((tensor.shape, 0 if tensor.is_inference() else tensor._version))
            size = tensor.numel()
            count = min(size, SAMPLES)
            sample = tensor.as_strided((count,), (size // max(count, 1),))
            samples.setdefault((tensor.dtype, tensor.device), []).append(sample)
    for (dtype, _), values in samples.items():
        state += dtype, torch.cat(values).view(torch.uint8).cpu().numpy().tobytes()
    return hash(tuple(state))
