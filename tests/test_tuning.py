"""Fused projections, compiled blocks and attention backends: the same pictures, and no way into a corner."""

import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from tests.parity import GOLDENS, load
from tests.test_pipeline import CONTENT, SECOND_STYLE, STYLE, close, draw
from uso.model import onednn, tuning
from uso.model.attention import CPUAttnProcessor
from uso.model.pipeline import USOPipeline


@pytest.fixture
def pipe(tiny_folder: Path) -> USOPipeline:
    pipe = USOPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def expected() -> Tensor:
    return draw(load("flux-dev"))


def test_fused_projections_take_no_memory_and_come_apart_again(
    pipe: USOPipeline, expected: Tensor, tiny_folder: Path, tmp_path: Path
) -> None:
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    pipe.fuse_qkv_projections()
    numbers = sum(parameter.numel() for parameter in pipe.transformer.parameters())
    assert numbers == sum(value.numel() for value in before.values())
    assert close(draw(pipe), expected)
    pipe.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "transformer/diffusion_pytorch_model.safetensors")
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[name], before[name]) for name in saved)
    assert pipe.transformer.transformer_blocks[0].attn.fused_projections, "it goes on as it was"
    pipe.unfuse_qkv_projections()
    after = pipe.transformer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in after)


def test_a_lora_counts_whatever_was_fused(pipe: USOPipeline) -> None:
    plain = draw(pipe)
    lora = {
        "pretrained_model_name_or_path_or_dict": GOLDENS / "weights",
        "weight_name": "dit_lora.safetensors",
    }
    pipe.load_lora_weights(**lora)
    adapted = draw(pipe)
    assert not close(adapted, plain)
    pipe.fuse_qkv_projections()
    assert close(draw(pipe), adapted), "beside a LoRA nothing is fused"
    pipe.unload_lora_weights()
    pipe.fuse_qkv_projections()
    assert pipe.transformer.transformer_blocks[0].attn.fused_projections
    assert close(draw(pipe), plain)
    with pytest.raises(ValueError, match="call unfuse_qkv_projections"):
        pipe.transformer.add_adapter(LoraConfig(target_modules=["to_q", "to_out.0"]))
    pipe.load_lora_weights(**lora)
    assert close(draw(pipe), adapted)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.fuse_qkv_projections()
    assert pipe.transformer.transformer_blocks[0].attn.fused_projections
    assert close(draw(pipe), adapted)


@pytest.mark.parametrize("fused", [False, True])
def test_compiled_blocks_have_one_set_of_graphs_for_all_pictures(
    pipe: USOPipeline, expected: Tensor, fused: bool
) -> None:
    if fused:  # as on CUDA
        pipe.fuse_qkv_projections()
    counter = CompileCounter()
    tuning.compile_blocks(pipe, backend=counter)
    graphs = counter.frame_count
    assert 0 < graphs <= 3 * 2  # two kinds of block and the last, each before and after its tokens are slices
    for content in (None, CONTENT):
        for styles in ([], [STYLE], [STYLE, SECOND_STYLE]):
            draw(pipe, content_image=content, style_images=styles, num_inference_steps=2)
    assert close(draw(pipe), expected)
    draw(pipe, width=96, height=32, num_inference_steps=1)
    assert counter.frame_count == graphs


def pretend(monkeypatch: pytest.MonkeyPatch, *, avx512: bool = True, amd: bool = True) -> None:
    """To have this processor, as far as the choice of products goes."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("a torch without oneDNN")
    monkeypatch.setattr(onednn, "has_avx512", lambda: avx512)
    monkeypatch.setattr(onednn, "made_by_amd", lambda: amd)


@pytest.fixture
def by_onednn(pipe: USOPipeline, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The transformer as a CPU has it, its products by oneDNN though they are small."""
    monkeypatch.setattr(onednn, "WIDTH", 1)
    pretend(monkeypatch)
    tuning.tune(pipe.transformer, torch.device("cpu"))
    return pipe.transformer


def products(pipe: USOPipeline) -> Counter[str]:
    """How often which operations make those of a picture in one step."""
    with torch.profiler.profile() as profile:
        draw(pipe, num_inference_steps=1)
    kinds = ("aten::addmm", "mkldnn::_linear_pointwise")
    return Counter({event.key: event.count for event in profile.key_averages() if event.key in kinds})


@pytest.mark.parametrize(
    ("width", "avx512", "amd"), [(256, True, True), (1, True, False), (1, False, True)], ids=str
)
def test_products_are_left_to_torch_but_for_those_before_gelu(
    pipe: USOPipeline, monkeypatch: pytest.MonkeyPatch, width: int, avx512: bool, amd: bool
) -> None:
    """Small ones, all on Intel's processors; on one without AVX-512 also those."""
    monkeypatch.setattr(onednn, "WIDTH", width)
    pretend(monkeypatch, avx512=avx512, amd=amd)
    tuning.tune(pipe.transformer, torch.device("cpu"))
    counts, config = products(pipe), pipe.transformer.config
    before_gelu = 2 * config.num_layers + config.num_single_layers
    assert counts["mkldnn::_linear_pointwise"] == (before_gelu if avx512 else 0)
    assert counts["aten::addmm"]


@pytest.mark.parametrize(
    ("vendor", "avx512", "amd"), [("AuthenticAMD", True, True), ("GenuineIntel", False, False)]
)
def test_the_processor_is_told_by_its_vendor_and_by_what_torch_uses_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vendor: str, avx512: bool, amd: bool
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"vendor_id\t: {vendor}\n")
    monkeypatch.setattr(onednn, "CPUINFO", cpuinfo)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512" if avx512 else "AVX2")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert (onednn.has_avx512(), onednn.made_by_amd()) == (avx512, amd)


@pytest.mark.parametrize("fused", [False, True])
def test_attention_for_a_cpu_gives_the_same_picture(pipe: USOPipeline, expected: Tensor, fused: bool) -> None:
    def operations() -> tuple[int, int]:
        with torch.profiler.profile() as profile:
            assert close(draw(pipe), expected)
        calls = {event.key: event.count for event in profile.key_averages()}
        return sum(calls.values()), calls.get("aten::view_as_complex", 0)

    if fused:
        pipe.fuse_qkv_projections()
    diffusers, in_last_block = operations()
    pipe.transformer.set_attn_processor(CPUAttnProcessor())
    ours, rotations = operations()
    assert ours < diffusers
    assert rotations > in_last_block > 0


def test_products_by_onednn_give_the_same_picture(
    by_onednn: Any, pipe: USOPipeline, expected: Tensor
) -> None:
    assert "mkldnn::_linear_pointwise" in products(pipe)
    assert close(draw(pipe), expected)


def test_a_lora_counts_beside_onednn(by_onednn: Any, pipe: USOPipeline, tiny_folder: Path) -> None:
    lora = {
        "pretrained_model_name_or_path_or_dict": GOLDENS / "weights",
        "weight_name": "dit_lora.safetensors",
    }
    other = USOPipeline.from_pretrained(tiny_folder)
    other.set_progress_bar_config(disable=True)
    for each in (pipe, other):
        each.load_lora_weights(**lora)
    assert "mkldnn::_linear_pointwise" in products(pipe)
    assert close(draw(pipe), draw(other))


def test_a_lora_counts_before_gelu(by_onednn: Any, pipe: USOPipeline, expected: Tensor) -> None:
    layers = ["proj_mlp", "net.0.proj"]
    torch.manual_seed(0)
    pipe.transformer.add_adapter(LoraConfig(target_modules=layers, init_lora_weights=False))
    adapted = draw(pipe)
    assert not close(adapted, expected)
    with mock.patch.object(onednn, "_computes", return_value=False):
        assert close(draw(pipe), adapted)


def test_gradients_go_through_torchs_products(by_onednn: Any) -> None:
    layer = by_onednn.single_transformer_blocks[0].proj_mlp.requires_grad_(True)
    layer(torch.ones(1, layer.in_features)).sum().backward()
    assert layer.weight.grad is not None


def test_compiled_blocks_have_torchs_products(by_onednn: Any, pipe: USOPipeline, expected: Tensor) -> None:
    counter = CompileCounter()
    targets = set()

    def backend(graph: Any, inputs: Any) -> Any:
        targets.update(str(node.target) for node in graph.graph.nodes)
        return counter(graph, inputs)

    tuning.compile_blocks(pipe, backend=backend)
    graphs = counter.frame_count
    assert 0 < graphs <= 3 * 2
    assert not any("mkldnn" in target for target in targets), "inductor wants weights that it has packed"
    assert close(draw(pipe), expected)
    draw(pipe, content_image=None, num_inference_steps=1)
    assert counter.frame_count == graphs


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_buffers_are_kept_until_they_are_given_back() -> None:
    program = """
import resource, threading, torch
from uso.model.tuning import give_back, keep_buffers

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() - before

def use():  # 100 MB, in a thread, as a server draws
    thread = threading.Thread(target=lambda: torch.zeros(100 * 2**20, dtype=torch.uint8).fill_(1))
    thread.start()
    thread.join()
    return resident()

keep_buffers()
before = 0
before = resident()
print(*(use() for _ in range(24)), give_back() or resident())
"""
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    once, *more, after = (int(part) / 2**20 for part in run.stdout.split())
    assert once > 95, "kept"
    assert max(more) < 8 * once, "used again, of 24 times, though what lies between may want some more"
    assert after < 50


def test_without_a_compiler_nothing_changes(
    pipe: USOPipeline, expected: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no C compiler")

    tuning.compile_blocks(pipe, backend=no_compiler)
    assert "The blocks are not compiled: " in caplog.text
    assert close(draw(pipe), expected)


def test_the_fastest_attention_that_works_is_taken(
    pipe: USOPipeline, expected: Tensor, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    assert tuning.attention_backends(cpu) == ("native",)
    for capability, first in (((9, 0), "_flash_3_hub"), ((10, 0), "_native_cudnn"), ((8, 6), "native")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert tuning.attention_backends(torch.device("cuda"))[0] == first
    try:
        caplog.set_level("INFO", logger="uso.model.tuning")
        # the first needs a package, the second another build: neither is here
        assert tuning.choose_attention(pipe.transformer, ("_flash_3_hub", "flash", "native"), cpu) == "native"
        said = [record.getMessage() for record in caplog.records if record.name == "uso.model.tuning"]
        assert [line.split(" is not used: ")[0] for line in said] == [
            "The attention backend _flash_3_hub",
            "The attention backend flash",
        ]
        assert "kernels" in said[0]
        assert close(draw(pipe), expected)
        assert tuning.choose_attention(pipe.transformer, ("_native_math", "native"), cpu) == "_native_math"
        assert close(draw(pipe), expected)
    finally:
        pipe.transformer.reset_attention_backend()
