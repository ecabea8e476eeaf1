"""Weights: full-size names and shapes, strictness for each file and kind of fault, and every kind of source.

The goldens' tiny official files stand for the published ones; faults are made in copies of them.
"""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, T5EncoderModel

from uso.errors import CheckpointError
from uso.model import keymaps, plans, sources
from uso.model.checkpoints import load_pipeline
from uso.model.variants import DEV, KREA, REVISIONS, SCHNELL, FluxVariant, with_numbers_of
from uso.model.weights import LISTED_KEYS, Weights, match, open_weights
from uso.settings import Settings

GOLDENS = Path(__file__).parent / "goldens" / "weights"
FULL_SIZE = Path(__file__).parent / "full-size-keys"


def settings_with(**values: Any) -> Settings:
    return Settings(_env_file=None, **values)  # type: ignore[call-arg]


SETTINGS = settings_with()
TINY = with_numbers_of(DEV, GOLDENS)
PARTS = {
    "transformer": "flux1-dev.safetensors",
    "lora": "dit_lora.safetensors",
    "projector": "projector.safetensors",
    "ae": "ae.safetensors",
    "t5": "t5/model.safetensors",
    "clip": "clip/model.safetensors",
    "siglip": "siglip/model.safetensors",
}
PATHS = {name: GOLDENS / file.partition("/")[0] for name, file in PARTS.items()}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for field in Settings.model_fields:
        monkeypatch.delenv(field.upper(), raising=False)
    monkeypatch.setattr(sources, "get_token", lambda: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the official files that a test may break."""
    return Path(shutil.copytree(GOLDENS, tmp_path / "weights", copy_function=shutil.copyfile))


def load(source: str | Path, **kwargs: Any) -> Any:
    defaults: dict[str, Any] = {"settings": SETTINGS, "torch_dtype": torch.float32}
    return load_pipeline(source, **defaults | kwargs)


def change(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def modules(pipe: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


# --- Full size, without a file ---


def full_size(name: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(shape) for key, shape in json.loads((FULL_SIZE / f"{name}.json").read_text()).items()}


def full_size_plan(name: str) -> plans.Plan:
    siglip = SimpleNamespace(hidden_size=1152, image_size=384, patch_size=14, num_hidden_layers=27)
    if name == "dit_lora":
        return plans.lora_plan(DEV, Weights(FULL_SIZE, full_size(name)))
    return {
        "flux1-dev": lambda: plans.transformer_plan(DEV),
        "flux1-schnell": lambda: plans.transformer_plan(SCHNELL),
        "ae": lambda: plans.autoencoder_plan(DEV),
        "projector": lambda: plans.projector_plan(DEV, siglip),
    }[name]()


@pytest.mark.parametrize(
    ("name", "count"),
    [("flux1-dev", 780), ("flux1-schnell", 776), ("dit_lora", 304), ("projector", 18), ("ae", 244)],
)
def test_full_size_names_and_shapes_are_exactly_the_published_ones(name: str, count: int) -> None:
    plan = full_size_plan(name)
    expected = {key: keymaps.source_shape(source, plan.shapes) for key, source in plan.keys.items()}
    assert expected == full_size(name)
    assert len(match(plan, Weights(FULL_SIZE, full_size(name)))) == count
    # and every parameter gets its value from exactly one place
    assert sorted(t for source in plan.keys.values() for t in source.targets) == sorted(plan.shapes)


def test_variants_differ_only_as_stated() -> None:
    names = {"name", "hub_id", "file_name", "settings_fields"}
    schnell = {*names, "licence", "gated", "text_hub_id", "guidance_embed"}
    assert {k for k in vars(DEV) if getattr(DEV, k) != getattr(KREA, k)} == names
    assert {k for k in vars(DEV) if getattr(DEV, k) != getattr(SCHNELL, k)} == schnell


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ({"flux": {"depht": 2}}, "depht"),
        ({"flux": {"theta": 5}}, "theta is 5"),
        ({"flux": {"qkv_bias": False}}, "qkv_bias"),
        ({"flux": {}, "ae": {"z": 1}}, "z"),
    ],
)
def test_numbers_that_cannot_be_are_refused(numbers: dict[str, Any], says: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(numbers))
    with pytest.raises(CheckpointError, match=says):
        with_numbers_of(DEV, tmp_path)


def test_another_programs_config_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["Flux"]}')
    assert with_numbers_of(DEV, tmp_path) is DEV


# --- Values ---


@pytest.fixture(scope="module")
def unfused() -> Any:
    return load(GOLDENS, fuse_lora=False)


@pytest.fixture(scope="module")
def fused() -> Any:
    return load(GOLDENS)


def test_fused_tensors_are_split_in_order_and_the_last_modulation_is_swapped(unfused: Any) -> None:
    file = {name: tensor.float() for name, tensor in load_file(GOLDENS / PARTS["transformer"]).items()}
    ours = {name.replace(".base_layer", ""): t for name, t in unfused.transformer.state_dict().items()}
    block = "transformer_blocks.1.attn"
    qkv = torch.cat([ours[f"{block}.to_{x}.weight"] for x in "qkv"])
    assert torch.equal(qkv, file["double_blocks.1.img_attn.qkv.weight"])
    added = torch.cat([ours[f"{block}.add_{x}_proj.bias"] for x in "qkv"])
    assert torch.equal(added, file["double_blocks.1.txt_attn.qkv.bias"])
    single = "single_transformer_blocks.2"
    names = [*(f"{single}.attn.to_{x}.weight" for x in "qkv"), f"{single}.proj_mlp.weight"]
    assert torch.equal(torch.cat([ours[name] for name in names]), file["single_blocks.2.linear1.weight"])
    shift, scale = file["final_layer.adaLN_modulation.1.weight"].chunk(2)
    assert torch.equal(ours["norm_out.linear.weight"], torch.cat([scale, shift]))


@pytest.mark.parametrize(
    ("layer", "base", "lora", "rows"),
    [
        ("transformer_blocks.0.attn.to_k", "double_blocks.0.img_attn.qkv", "qkv_lora1", 1),
        ("transformer_blocks.1.attn.add_v_proj", "double_blocks.1.txt_attn.qkv", "qkv_lora2", 2),
        ("transformer_blocks.1.attn.to_out.0", "double_blocks.1.img_attn.proj", "proj_lora1", 0),
        ("transformer_blocks.0.attn.to_add_out", "double_blocks.0.txt_attn.proj", "proj_lora2", 0),
        ("single_transformer_blocks.2.attn.to_q", "single_blocks.2.linear1", "qkv_lora", 0),
        ("single_transformer_blocks.0.proj_out", "single_blocks.0.linear2", "proj_lora", 0),
    ],
)
def test_merged_lora_is_w_plus_ba(fused: Any, layer: str, base: str, lora: str, rows: int) -> None:
    block = ".".join(base.split(".")[:2])
    w = load_file(GOLDENS / PARTS["transformer"])[f"{base}.weight"].float()
    matrices = load_file(GOLDENS / PARTS["lora"])
    a, b = (matrices[f"{block}.processor.{lora}.{x}.weight"].float() for x in ("down", "up"))
    got = fused.transformer.state_dict()[f"{layer}.weight"]
    expected = (w[: len(b)] + b @ a)[rows * len(got) :][: len(got)]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert (expected - w[rows * len(got) :][: len(got)]).abs().max() > 1e-3


def test_lora_kept_apart_can_be_switched_off_and_merged_later(fused: Any) -> None:
    pipe = load(GOLDENS, fuse_lora=False)
    assert pipe.get_active_adapters() == ["uso"]
    assert not getattr(fused.transformer, "peft_config", None)
    pipe.fuse_lora(components=["transformer"])
    pipe.unload_lora_weights()
    assert same(pipe.transformer, fused.transformer)


def test_comfyui_files_are_the_same_model(folder: Path, fused: Any) -> None:
    lora = load_file(folder / PARTS["lora"])
    projector = load_file(folder / PARTS["projector"])
    for name in ("lora", "projector"):
        (folder / PARTS[name]).unlink()
    names = {
        "qkv_lora1": "img_attn.qkv",
        "qkv_lora2": "txt_attn.qkv",
        "proj_lora1": "img_attn.proj",
        "proj_lora2": "txt_attn.proj",
        "qkv_lora": "linear1_qkv",
        "proj_lora": "linear2",
    }
    renamed = {}
    for name, tensor in lora.items():
        block, i, _, layer, end, _ = name.split(".")
        renamed[f"diffusion_model.{block}.{i}.{names[layer]}.lora_{end}.weight"] = tensor
    save_file(renamed, folder / "uso-flux1-dit-lora-v1.safetensors")
    save_file(
        {name.removeprefix("feature_embedder."): tensor for name, tensor in projector.items()},
        folder / "uso-flux1-projector-v1.safetensors",
    )
    pipe = load(folder)
    assert same(pipe.transformer, fused.transformer)
    assert same(pipe.style_projector, fused.style_projector)


# --- Strictness ---


def plan_and_weights(name: str) -> tuple[plans.Plan, Weights]:
    weights = open_weights(PATHS[name])
    return plans.official_plan(name, TINY, PATHS, weights), weights


@pytest.mark.parametrize("name", PARTS)
def test_every_single_key_is_needed_in_its_shape(name: str) -> None:
    plan, weights = plan_and_weights(name)
    ours = match(plan, weights)
    assert len(ours) >= len(plan.keys) > 0
    for key in ours:
        rest = {k: shape for k, shape in weights.shapes.items() if k != key}
        with pytest.raises(CheckpointError, match=f"(missing: |is without ){key}"):
            match(plan, Weights(weights.path, rest))
        with pytest.raises(CheckpointError, match=f"wrong shape: {key} has"):
            match(plan, Weights(weights.path, rest | {key: (*weights.shapes[key], 2)}))


@pytest.mark.parametrize(
    "key",
    [
        "junk.weight",
        "double_blocks.0.junk",
        "encoder.decoder_junk",
        "text_modelx.bias",
        "blocks.0.0",
        "alpha",
    ],
)
@pytest.mark.parametrize("name", PARTS)
def test_any_other_key_is_refused(name: str, key: str) -> None:
    plan, weights = plan_and_weights(name)
    with pytest.raises(CheckpointError, match=f"unexpected: {key}"):
        match(plan, Weights(weights.path, {**weights.shapes, key: (1,)}))


@pytest.mark.parametrize("name", PARTS)
def test_a_files_faults_are_all_listed_and_the_file_named(name: str, folder: Path) -> None:
    file = folder / PARTS[name]
    plan, weights = plan_and_weights(name)
    gone, wrong = list(match(plan, weights))[:2]

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["junk"] = torch.zeros(1)
        tensors[wrong] = torch.zeros(1, 2, 3)
        del tensors[gone]

    change(file, edit)
    with pytest.raises(CheckpointError) as error:
        load(folder)
    message = str(error.value)
    assert str(folder / PARTS[name].partition("/")[0]) in message
    assert "3 keys are wrong" in message
    assert "unexpected: junk" in message
    assert f"wrong shape: {wrong}" in message
    assert ("unpaired: " if name == "lora" else "missing: ") in message


def test_a_long_list_is_cut() -> None:
    plan, weights = plan_and_weights("ae")
    with pytest.raises(CheckpointError) as error:
        match(plan, Weights(weights.path, {}))
    assert f"... and {len(plan.keys) - LISTED_KEYS} more" in str(error.value)
    assert len(str(error.value).splitlines()) == LISTED_KEYS + 2


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (
            lambda t: t.pop("double_blocks.1.processor.proj_lora1.down.weight"),
            "unpaired: double_blocks.1.processor.proj_lora1.up.weight is without double_blocks.1",
        ),
        (
            lambda t: [t.pop(k) for k in list(t) if k.startswith("single_blocks.2.")],
            "missing: single_blocks.2.processor.qkv_lora.down.weight",
        ),
        (
            lambda t: t.update({"single_blocks.3.processor.qkv_lora.up.weight": torch.zeros(144, 4)}),
            "unexpected: single_blocks.3.processor.qkv_lora.up.weight",
        ),
        (
            lambda t: t.update({"double_blocks.0.processor.qkv_lora1.down.weight": torch.zeros(5, 48)}),
            r"has \(5, 48\), expected \(4, 48\)",
        ),
        (
            lambda t: t.update({"feature_embedder.high_projection.bias": torch.zeros(48)}),
            "unexpected: feature_",
        ),
        (lambda t: [t.pop(k) for k in list(t) if "down" in k], "holds no USO LoRA"),
    ],
    ids=["unpaired", "block missing", "index out of range", "rank", "projector in it", "no LoRA"],
)
def test_lora_faults(edit: Callable[[dict[str, Tensor]], object], says: str, folder: Path) -> None:
    change(folder / PARTS["lora"], edit)
    with pytest.raises(CheckpointError, match=says):
        load(folder)


def test_dev_without_guidance_and_schnell_with_it_are_refused(folder: Path) -> None:
    (folder / "flux1-dev.safetensors").rename(folder / "dev")
    (folder / "flux1-schnell.safetensors").rename(folder / "flux1-dev.safetensors")
    (folder / "dev").rename(folder / "flux1-schnell.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: guidance_in\.in_layer\.bias"):
        load(folder)
    with pytest.raises(CheckpointError, match=r"unexpected: guidance_in\.in_layer\.bias"):
        load(folder / "flux1-schnell.safetensors")


@pytest.mark.parametrize(
    ("file", "change_of_config", "says"),
    [
        ("t5/config.json", {"d_model": 20}, "width 20"),
        (
            "siglip/config.json",
            {"vision_config": {"num_hidden_layers": 4}},
            "has 4 layers; the projector needs 19",
        ),
    ],
)
def test_encoders_of_another_size_are_refused(
    file: str, change_of_config: dict[str, Any], says: str, folder: Path
) -> None:
    config = json.loads((folder / file).read_text())
    for key, value in change_of_config.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    (folder / file).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=says):
        load(folder)


@pytest.mark.parametrize("file", ["t5/spiece.model", "clip/vocab.json", "clip/merges.txt"])
def test_tokenizer_files_are_needed(file: str, folder: Path) -> None:
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=Path(file).name):
        load(folder)


def test_tokenizers_do_without_their_configuration(folder: Path, fused: Any) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / "t5" / name).unlink()
        (folder / "clip" / name).unlink()
    pipe = load(folder)
    arguments = {"padding": "max_length", "truncation": True}
    assert pipe.tokenizer("a cat", **arguments).input_ids == fused.tokenizer("a cat", **arguments).input_ids
    arguments["max_length"] = 32
    assert (
        pipe.tokenizer_2("a cat", **arguments).input_ids == fused.tokenizer_2("a cat", **arguments).input_ids
    )


# --- Files that are not what they should be ---


class RunsCode:
    """Unpickling it makes a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.witness),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_official_pickles_of_t5_and_clip_load(zipped: bool, folder: Path, fused: Any) -> None:
    for name in ("t5", "clip"):
        tensors = load_file(folder / PARTS[name])
        if name == "t5":
            tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
            tensors |= {"lm_head.weight": torch.zeros(2), "decoder.final_layer_norm.weight": torch.zeros(2)}
        else:
            tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        torch.save(tensors, folder / name / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        (folder / PARTS[name]).unlink()
    pipe = load(folder)
    assert same(pipe.text_encoder, fused.text_encoder)
    assert same(pipe.text_encoder_2, fused.text_encoder_2)


@pytest.mark.parametrize("name", ["t5", "clip"])
def test_malicious_pickles_are_refused_and_nothing_runs(name: str, folder: Path, tmp_path: Path) -> None:
    witness = tmp_path / "it ran"
    torch.save({"shared.weight": RunsCode(witness)}, folder / name / "pytorch_model.bin")
    (folder / PARTS[name]).unlink()
    with pytest.raises(CheckpointError, match=r"(?s)pytorch_model.bin was refused.*nothing in it was run"):
        load(folder)
    assert not witness.exists()


def test_pickles_are_refused_everywhere_else(folder: Path, tmp_path: Path) -> None:
    witness = tmp_path / "it ran"
    evil = tmp_path / "evil.bin"
    evil.write_bytes(pickle.dumps(RunsCode(witness)))
    disguised = shutil.copy(evil, tmp_path / "evil.safetensors")
    for setting in ("flux_dev", "ae", "lora", "projection_model"):
        for file in (evil, disguised):
            paths = {"flux_dev": PATHS["transformer"], "ae": PATHS["ae"], "lora": PATHS["lora"]}
            paths |= {"projection_model": PATHS["projector"], "siglip_path": PATHS["siglip"]}
            paths |= {"t5": PATHS["t5"], "clip": PATHS["clip"], setting: Path(file)}
            with pytest.raises(CheckpointError, match=r"(?s)pickle.*safetensors"):
                load("flux-dev", settings=settings_with(**paths))
    shutil.copy(evil, folder / "siglip" / "pytorch_model.bin")
    (folder / PARTS["siglip"]).unlink()
    with pytest.raises(CheckpointError, match="pickle"):
        load(folder)
    assert not witness.exists()


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"img_in.weight": torch.zeros(2, 2).to(torch.float8_e4m3fn)}, "F8_E4M3"),
        ({"img_in.weight": torch.zeros(2, 2, dtype=torch.int8)}, "I8"),
        ({"img_in.weight": torch.zeros(2, 2), "img_in.scale_weight": torch.zeros(1)}, "scale tensors"),
    ],
)
def test_quantized_files_are_refused_with_the_remedy(
    tensors: dict[str, Tensor], says: str, tmp_path: Path
) -> None:
    path = tmp_path / "flux1-dev-fp8.safetensors"
    save_file(tensors, path)
    for source, settings in ((path, SETTINGS), ("flux-dev", settings_with(flux_dev_fp8=path))):
        with pytest.raises(CheckpointError, match=f"(?s){says}.*published bf16 file"):
            open_weights(sources.locate(source, settings).paths["transformer"])
    assert sources.locate(tmp_path, SETTINGS).paths["transformer"] == path


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"GGUF" + bytes(100), "GGUF.*bf16"),
        (b"", "not a complete"),
        (b"<html>", "not a complete"),
        ((GOLDENS / "flux1-dev.safetensors").read_bytes()[:-1], "not a complete.*Download it again"),
    ],
    ids=["gguf", "empty", "html", "cut off"],
)
def test_damaged_and_foreign_files_are_refused(content: bytes, says: str, folder: Path) -> None:
    (folder / "flux1-dev.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"(?s){says}"):
        load(folder)


def test_a_header_of_any_length_is_no_pickle(tmp_path: Path) -> None:
    for length in range(0, 256, 8):  # the file's first byte goes through all of its values, 0x80 too
        path = tmp_path / f"{length}.safetensors"
        save_file({"x": torch.zeros(1)}, path, metadata={"note": "x" * length})
        assert open_weights(path).shapes == {"x": (1,)}


def test_shards_are_read_and_must_be_complete(folder: Path, fused: Any) -> None:
    tensors = load_file(folder / PARTS["t5"])
    (folder / PARTS["t5"]).unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / "t5" / shard)
    index = {"weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (folder / "t5" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same(load(folder).text_encoder_2, fused.text_encoder_2)
    (folder / "t5" / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors"):
        load(folder)


def test_an_encoder_saved_alone_loads_too(folder: Path, fused: Any) -> None:
    """And transformers itself agrees with our reading of the whole model's files."""
    for name, model_class in (("clip", CLIPTextModel), ("t5", T5EncoderModel)):
        alone = model_class.from_pretrained(GOLDENS / name, local_files_only=True)
        (folder / PARTS[name]).unlink()
        alone.save_pretrained(folder / name)
        assert same(alone, fused.text_encoder if name == "clip" else fused.text_encoder_2)
    pipe = load(folder)
    assert same(pipe.text_encoder, fused.text_encoder)
    assert same(pipe.text_encoder_2, fused.text_encoder_2)


# --- Sources ---


def test_incomplete_folder_lists_everything_that_is_missing(tmp_path: Path) -> None:
    shutil.copy(PATHS["transformer"], tmp_path)
    with pytest.raises(CheckpointError) as error:
        load(tmp_path)
    for name in PARTS.keys() - {"transformer"}:
        assert f"- {name}: put " in str(error.value)
    assert "SIGLIP_PATH" in str(error.value)
    assert "- transformer" not in str(error.value)


def test_unknown_source_names_the_known_ones() -> None:
    with pytest.raises(CheckpointError, match=r"(?s)'flux-pro'.*nano, flux-dev, flux-krea-dev, flux-schnell"):
        load("flux-pro")


def test_the_official_downloaders_folders_are_found(tmp_path: Path, fused: Any) -> None:
    for target, name in {
        "FLUX.1-dev/flux1-dev.safetensors": "transformer",
        "FLUX.1-dev/ae.safetensors": "ae",
        "t5-xxl": "t5",
        "clip-vit-l14": "clip",
        "siglip": "siglip",
        "USO/uso_flux_v1.0/dit_lora.safetensors": "lora",
        "USO/uso_flux_v1.0/projector.safetensors": "projector",
        "FLUX.1-dev/config.json": "config",
    }.items():
        (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / target).symlink_to((PATHS | {"config": GOLDENS / "config.json"})[name])
    assert same(load(tmp_path).transformer, fused.transformer)


@pytest.mark.parametrize(
    ("source", "field", "file"),
    [
        ("flux-dev", "flux_dev", "flux1-dev"),
        ("flux-dev", "flux_dev_fp8", "flux1-dev"),
        ("flux-krea-dev", "flux_krea_dev", "flux1-dev"),
        ("flux-schnell", "flux_schnell", "flux1-schnell"),
    ],
)
def test_official_env_names(source: str, field: str, file: str) -> None:
    """FLUX_DEV_FP8 too: the official example.env names the bf16 file by it."""
    official = {"ae": "ae", "t5": "t5", "clip": "clip", "lora": "lora"}
    official |= {"projection_model": "projector", "siglip_path": "siglip"}
    paths = {setting: PATHS[part] for setting, part in official.items()}
    settings = settings_with(**paths, **{field: GOLDENS / f"{file}.safetensors"})
    pipe = load(source, settings=settings)
    assert pipe.transformer.config.guidance_embeds == (source != "flux-schnell")


def test_a_named_file_that_is_not_there_is_an_error() -> None:
    settings = settings_with(flux_dev=Path("nowhere.safetensors"))
    with pytest.raises(CheckpointError, match=r"nowhere\.safetensors does not exist"):
        open_weights(sources.locate("flux-dev", settings).paths["transformer"])


def test_saved_pipeline_loads_as_a_diffusers_folder(tmp_path: Path, fused: Any) -> None:
    fused.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert modules(again).keys() == modules(fused).keys()
    assert all(same(part, modules(fused)[name]) for name, part in modules(again).items())
    assert dict(again.config) == dict(fused.config) | {
        "_name_or_path": again.config.get("_name_or_path")
    } or (
        again.config.native_scale == fused.config.native_scale
        and again.config.max_sequence_length == fused.config.max_sequence_length
    )
    assert type(again.scheduler) is type(fused.scheduler)
    assert again.tokenizer("a cat").input_ids == fused.tokenizer("a cat").input_ids


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, fused: Any) -> Path:
    path = tmp_path_factory.mktemp("saved")
    fused.save_pretrained(path)
    return path


@pytest.mark.parametrize("component", plans.COMPONENTS)
def test_diffusers_folder_is_strict(component: str, saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    file = next((folder / component).glob("*.safetensors"))
    gone = list(load_file(file))[-1]

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["junk.weight"] = torch.zeros(1)
        del tensors[gone]

    change(file, edit)
    with pytest.raises(CheckpointError) as error:
        load(folder)
    message = str(error.value)
    assert re.search(rf"missing: (text_model\.|vision_model\.)?{gone}", message)
    assert "unexpected: junk.weight" in message
    assert str(folder / component) in message
    torch.save(load_file(file), file.parent / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(CheckpointError, match="pickle"):
        load(folder)


def test_diffusers_folder_needs_its_tokenizer_and_must_be_ours(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    shutil.rmtree(folder / "tokenizer_2")
    with pytest.raises(CheckpointError, match=r"tokenizer_2 lacks"):
        load(folder)
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(CheckpointError, match="holds a FluxPipeline"):
        load(folder)


def test_dtypes(unfused: Any) -> None:
    dtypes = {name: part.dtype for name, part in modules(load(GOLDENS, torch_dtype=None)).items()}
    assert dtypes.pop("image_encoder") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}
    assert {part.dtype for part in modules(unfused).values()} == {torch.float32}
    wanted = settings_with(dtype="float32")
    assert load(GOLDENS, torch_dtype=None, settings=wanted).transformer.dtype == torch.float32
    with pytest.raises(ValueError, match=r"float16"):
        load(GOLDENS, torch_dtype=torch.float16)


def test_parameters_are_ready_for_use(fused: Any) -> None:
    for name, part in modules(fused).items():
        tensors = [*part.parameters(), *part.buffers()]
        assert not any(t.is_meta for t in tensors), name
        assert not part.training, name
    t5 = fused.text_encoder_2
    assert t5.shared.weight is t5.encoder.embed_tokens.weight


def test_progress_rises_to_the_end() -> None:
    seen: list[tuple[str, float]] = []
    load(GOLDENS, progress=lambda text, fraction: seen.append((text, fraction)))
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions)
    assert 0.95 < fractions[-1] <= 1
    assert "Loading transformer" in dict(seen)


@pytest.mark.skipif(not sources.NANO_DIR.is_dir(), reason="assets/nano is not exported yet")
def test_nano_loads_without_a_word_from_the_user() -> None:
    pipe: Any = load_pipeline(settings=SETTINGS)
    assert pipe.transformer.dtype == torch.float32
    assert pipe.config.native_scale < 1


# --- The hub ---


class Hub:
    """Stands for huggingface_hub's downloads; answers from a folder laid out as the repositories are."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[tuple[Any, ...]] = []
        links = {
            f"{DEV.hub_id}/flux1-dev.safetensors": PATHS["transformer"],
            f"{DEV.hub_id}/config.json": GOLDENS / "config.json",
            f"{DEV.hub_id}/ae.safetensors": PATHS["ae"],
            "bytedance-research/USO/uso_flux_v1.0/dit_lora.safetensors": PATHS["lora"],
            "bytedance-research/USO/uso_flux_v1.0/projector.safetensors": PATHS["projector"],
            "google/siglip-so400m-patch14-384": PATHS["siglip"],
        }
        for encoder, tokenizer, part in (
            ("text_encoder", "tokenizer", "clip"),
            ("text_encoder_2", "tokenizer_2", "t5"),
        ):
            for file in PATHS[part].iterdir():
                weights = file.name in ("config.json", "model.safetensors")
                links[f"{DEV.hub_id}/{encoder if weights else tokenizer}/{file.name}"] = file
        for name, target in links.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).symlink_to(target)

    def file(self, repo: str, filename: str, *, revision: str, token: str | None) -> str:
        self.calls.append((repo, filename, revision, token))
        return str(self.root / repo / filename)

    def snapshot(self, repo: str, *, revision: str, allow_patterns: list[str], token: str | None) -> str:
        self.calls.append((repo, tuple(allow_patterns), revision, token))
        return str(self.root / repo)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    hub = Hub(tmp_path)
    monkeypatch.setattr(sources, "hf_hub_download", hub.file)
    monkeypatch.setattr(sources, "snapshot_download", hub.snapshot)
    return hub


def test_downloads_what_is_not_here_at_pinned_revisions(
    hub: Hub, fused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sources.VARIANTS, "flux-dev", TINY)  # the hub's file comes without numbers
    seen: list[str] = []
    settings = settings_with(hf_token="hf_secret")
    pipe = load("flux-dev", settings=settings, progress=lambda text, fraction: seen.append(text))
    assert same(pipe.transformer, fused.transformer)
    assert same(pipe.text_encoder_2, fused.text_encoder_2)
    dev, uso, siglip = DEV.hub_id, "bytedance-research/USO", "google/siglip-so400m-patch14-384"
    t5 = ("text_encoder_2/*.safetensors", "text_encoder_2/*.json", "tokenizer_2/*")
    clip = ("text_encoder/*.safetensors", "text_encoder/*.json", "tokenizer/*")
    assert hub.calls == [
        (repo, what, REVISIONS[repo], "hf_secret")
        for repo, what in [
            (dev, "flux1-dev.safetensors"),
            (uso, "uso_flux_v1.0/dit_lora.safetensors"),
            (uso, "uso_flux_v1.0/projector.safetensors"),
            (dev, "ae.safetensors"),
            (dev, t5),
            (dev, clip),
            (siglip, ("*.safetensors", "*.json")),
        ]
    ]
    assert f"Downloading transformer from {dev}" in seen


def test_files_that_are_here_are_not_downloaded(hub: Hub) -> None:
    paths = {"flux_dev": PATHS["transformer"], "ae": PATHS["ae"], "t5": PATHS["t5"], "clip": PATHS["clip"]}
    load("flux-dev", settings=settings_with(**paths))
    assert {repo for repo, *_ in hub.calls} == {"bytedance-research/USO", "google/siglip-so400m-patch14-384"}
    assert {token for *_, token in hub.calls} == {None}


@pytest.mark.parametrize("variant", [DEV, KREA, SCHNELL], ids=lambda v: v.name)
def test_every_repository_has_a_revision(variant: FluxVariant) -> None:
    for part in sources.parts(variant):
        revision = REVISIONS[part.repo]
        assert revision == "main" or (len(revision) == 40 and int(revision, 16))


def test_earlier_downloads_are_found_without_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def in_cache(repo: str, filename: str, *, revision: str) -> object:
        asked.append((repo, filename, revision))
        return f"cache/{filename}" if repo == SCHNELL.hub_id else object()  # known not to exist there

    monkeypatch.setattr(sources, "try_to_load_from_cache", in_cache)
    found = {part.name: sources.cached(part) for part in sources.parts(SCHNELL)}
    assert found == {
        "transformer": Path("cache/flux1-schnell.safetensors"),
        "ae": Path("cache/ae.safetensors"),
        "t5": Path("cache/text_encoder_2"),
        "clip": Path("cache/text_encoder"),
        "siglip": None,
        "lora": None,
        "projector": None,
    }
    assert ("google/siglip-so400m-patch14-384", "config.json", REVISIONS[sources.SIGLIP_REPO]) in asked


def test_schnell_asks_for_nothing_gated() -> None:
    assert {part.repo for part in sources.parts(SCHNELL)} == {
        "black-forest-labs/FLUX.1-schnell",
        "bytedance-research/USO",
        "google/siglip-so400m-patch14-384",
    }


def http_error(kind: type[hub_errors.HfHubHTTPError], status: int) -> Exception:
    response_class: Any = vars(hub_errors)["Response"]
    client = __import__(response_class.__module__.partition(".")[0])
    request = client.Request("GET", "https://huggingface.co/x")
    return kind("said the hub", response=response_class(status, request=request))


@pytest.mark.parametrize(
    ("error", "token", "says"),
    [
        (
            lambda: http_error(hub_errors.GatedRepoError, 401),
            None,
            "not set.*huggingface.co/black-forest-labs/FLUX.1-dev and accept.*settings/tokens.*HF_TOKEN",
        ),
        (
            lambda: http_error(hub_errors.GatedRepoError, 403),
            "hf_x",
            "HF_TOKEN is set, but its account has no access",
        ),
        (lambda: http_error(hub_errors.RepositoryNotFoundError, 401), "hf_x", "wrong or expired"),
        (
            lambda: hub_errors.LocalEntryNotFoundError("x"),
            None,
            "cannot be reached.*HF_HUB_OFFLINE.*set FLUX_DEV",
        ),
        (lambda: hub_errors.OfflineModeIsEnabled("x"), None, "cannot be reached"),
        (lambda: http_error(hub_errors.HfHubHTTPError, 503), None, "said the hub.*Start again: it resumes"),
        (lambda: OSError(28, "No space left on device"), None, "No space left.*resumes"),
    ],
    ids=["gated", "not accepted", "bad token", "no network", "offline", "hub down", "disk full"],
)
def test_hub_errors_say_what_to_do(
    error: Callable[[], Exception], token: str | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> str:
        raise error()

    monkeypatch.setattr(sources, "hf_hub_download", fail)
    with pytest.raises(CheckpointError, match=f"(?s){says}") as raised:
        load("flux-dev", settings=settings_with(hf_token=token))
    assert "hf_x" not in str(raised.value)


def test_our_stand_in_has_the_hubs_signatures() -> None:
    import inspect

    for real, names in (
        (huggingface_hub.hf_hub_download, {"revision", "token"}),
        (huggingface_hub.snapshot_download, {"revision", "token", "allow_patterns"}),
    ):
        assert names <= inspect.signature(real).parameters.keys()
