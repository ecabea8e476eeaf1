"""What is computed once equals what would be computed each time, and is computed anew when it has to be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from tests.parity import load
from tests.test_pipeline import Counter, draw, is_clean
from uso.model.once import (
    ConditioningCache,
    fingerprint,
    lend,
    modulation_layers,
    modulations,
    precomputed,
    share_position_bias,
)
from uso.model.pipeline import USOPipeline

CPU = torch.device("cpu")
SIGMAS = [torch.full((1,), sigma) for sigma in (1.0, 0.7, 0.2)]


@pytest.fixture
def pipe(tiny_folder: Path) -> USOPipeline:
    pipe = USOPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=["dev", "dev in bf16", "schnell", "LoRA beside it, on the modulations too"])
def transformer(request: pytest.FixtureRequest, pipe: USOPipeline) -> Any:
    if request.param == "schnell":
        return load("flux-schnell").transformer
    if request.param == "dev in bf16":
        return pipe.transformer.to(torch.bfloat16)
    if request.param.startswith("LoRA"):
        targets = ["to_q", "proj_out", "norm1.linear", "norm.linear", "norm_out.linear", "linear_1"]
        torch.manual_seed(0)
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    return pipe.transformer


@torch.no_grad()
def test_a_step_gives_what_it_gives_without(transformer: Any) -> None:
    config, dtype = transformer.config, transformer.dtype
    draw_tensor = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw_tensor).to(dtype)

    guidance = torch.full((1,), 4.0, dtype=dtype) if config.guidance_embeds else None
    text, pooled = random(1, 7, config.joint_attention_dim), random(1, config.pooled_projection_dim)
    ids = torch.randint(0, 9, (7 + 12, 3), generator=draw_tensor).float()
    sigmas = [sigma.to(dtype) for sigma in SIGMAS]
    latents = [random(1, 12, config.in_channels) for _ in sigmas]

    def predict(step: int) -> Tensor:
        return transformer(
            hidden_states=latents[step],
            timestep=sigmas[step],
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=text,
            txt_ids=ids[:7],
            img_ids=ids[7:],
            return_dict=False,
        )[0]

    expected = [predict(step) for step in range(len(sigmas))]
    keys = list(transformer.state_dict())
    layers = [Counter(layer) for layer in modulation_layers(transformer)]
    with precomputed(
        transformer,
        table=modulations(transformer, sigmas=sigmas, guidance=guidance, pooled_projections=pooled),
        encoder_hidden_states=text,
        style_tokens=None,
        ids=ids,
    ) as at_step:
        for step in (0, 2, 1):
            at_step(step)
            assert torch.equal(predict(step), expected[step]), "not by a bit"
        assert list(transformer.state_dict()) == keys
    assert [layer.calls for layer in layers] == [len(sigmas)] * len(layers), "each row once"
    assert torch.equal(predict(1), expected[1]), "afterwards as before"


def test_the_modulations_are_most_of_what_a_step_does_not_need(pipe: USOPipeline) -> None:
    layers = modulation_layers(pipe.transformer)
    config = pipe.transformer.config
    assert len(layers) == 2 * config.num_layers + config.num_single_layers + 1
    names = {id(module): name for name, module in pipe.transformer.named_modules()}
    assert all(".norm" in f".{names[id(layer)]}" for layer in layers)


def test_weights_elsewhere_are_lent() -> None:
    """To meta, as there is no second device: what comes out lies there, the weights stay where they were."""
    layer = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)).eval()
    assert lend(layer, CPU) is layer
    weight = layer[0].weight
    assert lend(layer, torch.device("meta"))(torch.empty(1, 3, device="meta")).device.type == "meta"
    assert layer[0].weight is weight
    assert weight.device == CPU


class Encoder:
    """The cache around one linear layer."""

    def __init__(self, limit: int = 10**6) -> None:
        self.module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
        self.counter = Counter(self.module)
        self.cache = ConditioningCache(limit)

    @torch.no_grad()
    def __call__(self, *values: float, key: str = "a") -> Tensor:
        inputs = torch.tensor([values], dtype=torch.float32)
        return self.cache.get(key, [self.module], inputs, lambda x: self.module(x), device=CPU)


def test_each_input_is_known_by_itself() -> None:
    encode = Encoder()
    rows = torch.tensor([[1.0, 2, 3], [4, 5, 6]])

    def encoded(inputs: Tensor) -> Tensor:
        return encode.cache.get("a", [encode.module], inputs, encode.module, device=CPU)

    with torch.no_grad():
        first, second = encoded(rows).split(1)
        assert encode.counter.calls == 2
        assert torch.equal(encoded(rows[:1]), first)
        assert torch.equal(encoded(rows.flip(0)), torch.cat([second, first]))
        assert encode.counter.calls == 2
        assert torch.equal(first, encode.module(rows[:1])), "by a bit, too"


def test_t5_looks_up_each_distance_once() -> None:
    config = T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    encoder = T5EncoderModel(config).eval()
    for ids in (torch.randint(99, (2, 200)), torch.zeros(1, 1, dtype=torch.long)):
        expected = encoder(ids).last_hidden_state
        looked_up = []
        table = encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        hook = table.register_forward_hook(lambda *args, seen=looked_up: seen.append(args[2].numel()))
        share_position_bias(encoder)
        assert torch.equal(encoder(ids).last_hidden_state, expected)
        hook.remove()
        assert looked_up == [config.num_heads * (2 * ids.shape[1] - 1)]
        del encoder.encoder.block[0].layer[0].SelfAttention.compute_bias


def test_a_value_is_kept_by_content() -> None:
    encode = Encoder()
    first = encode(1, 2, 3)
    first_value = first.clone()
    first.zero_()  # the caller's own
    assert torch.equal(encode(1, 2, 3), first_value)
    assert encode.counter.calls == 1
    encode(1, 2, 4)
    encode(1, 2, 3, key="b")
    assert encode.counter.calls == 3
    encode.cache.clear()
    assert encode.cache.size == 0
    encode(1, 2, 3)
    assert encode.counter.calls == 4


def test_the_least_recently_used_goes_first() -> None:
    encode = Encoder(limit=2 * 4 * 4)  # two values of four float32
    for value in (1, 2, 1, 3):
        encode(value, 0, 0)
    assert (encode.counter.calls, encode.cache.size) == (3, 32)
    encode(1, 0, 0)
    assert encode.counter.calls == 3
    encode(2, 0, 0)
    assert encode.counter.calls == 4
    tiny = Encoder(limit=1)
    assert tiny(1, 2, 3).shape == (1, 4), "a value that does not fit is given all the same"
    assert tiny.cache.size == 0


def test_with_gradients_nothing_is_kept() -> None:
    encode = Encoder()
    value = encode.cache.get("a", [encode.module], torch.ones(1, 3), encode.module, device=CPU)
    assert value.requires_grad
    assert encode.cache.size == 0


def load_another(module: nn.Module) -> None:
    module.load_state_dict(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)).state_dict())


def assign_another(module: nn.Module) -> None:
    module.load_state_dict(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)).state_dict(), assign=True)


def write_one_value(module: Any) -> None:
    with torch.no_grad():
        module[0].weight[2, 1] = 1.0


def write_past_autograd(module: Any) -> None:
    module[1].weight.data.mul_(0.5)  # as peft merges


def train(module: nn.Module) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with torch.enable_grad():
        module(torch.ones(1, 3)).sum().backward()
    optimizer.step()


def cast(module: nn.Module) -> None:
    module.bfloat16().float()


@pytest.mark.parametrize(
    "change", [load_another, assign_another, write_one_value, write_past_autograd, train, cast]
)
def test_other_weights_are_noticed(change: Callable[[nn.Module], None]) -> None:
    encode = Encoder()
    before = fingerprint(encode.module)
    assert fingerprint(encode.module) == before
    encode(1, 2, 3)
    change(encode.module)
    assert fingerprint(encode.module) != before
    with torch.no_grad():
        assert torch.equal(encode(1, 2, 3), encode.module(torch.tensor([[1.0, 2.0, 3.0]])))


def test_weights_that_accelerate_holds_are_known(pipe: USOPipeline) -> None:
    encoder = pipe.text_encoder
    before = fingerprint(encoder)
    accelerate.cpu_offload(encoder, CPU, offload_buffers=True)
    assert {p.device.type for p in encoder.parameters()} == {"meta"}
    assert fingerprint(encoder) == before
    encoder(torch.zeros(1, 4, dtype=torch.long))
    assert fingerprint(encoder) == before


@pytest.fixture
def encoders(pipe: USOPipeline) -> dict[str, Counter]:
    return {
        name: Counter(module)
        for name, module in {
            "SigLIP": pipe.image_encoder,
            "projector": pipe.style_projector,
            "CLIP": pipe.text_encoder,
            "T5": pipe.text_encoder_2,
            "reference": pipe.vae.encoder,
        }.items()
    }


def calls(encoders: dict[str, Counter]) -> dict[str, int]:
    return {name: counter.calls for name, counter in encoders.items()}


def test_loras_are_noticed() -> None:
    encode = Encoder()
    results = [encode(1, 2, 3)]
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), encode.module)
    layer: Any = encode.module[0]
    results.append(encode(1, 2, 3))
    layer.scale_layer(0.5)
    results.append(encode(1, 2, 3))
    layer.enable_adapters(False)
    assert torch.equal(encode(1, 2, 3), results[0])
    layer.enable_adapters(True)
    layer.merge()
    assert torch.allclose(encode(1, 2, 3), results[-1], atol=1e-6)
    encode.module[0] = layer.base_layer
    assert torch.allclose(encode(1, 2, 3), results[-1], atol=1e-6)
    assert not torch.allclose(results[0], results[1], atol=1e-3)
    assert not torch.allclose(results[1], results[2], atol=1e-3)


def test_what_was_made_is_dropped_when_memory_runs_out(
    pipe: USOPipeline, encoders: dict[str, Counter], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = draw(pipe)
    assert pipe.conditioning.size > 0

    def run_out(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(pipe.transformer.x_embedder, "forward", run_out)
        with pytest.raises(torch.OutOfMemoryError):
            draw(pipe)
    assert pipe.conditioning.size == 0
    assert is_clean(pipe)
    assert torch.equal(draw(pipe), expected)
    assert calls(encoders) == dict.fromkeys(encoders, 2)
