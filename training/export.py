"""Write the trained nano as a diffusers folder: `python -m training.export` (to assets/nano).

float16 safetensors in files below 9.5 MB. Needs the tokenizers; a model without a checkpoint is written with
its random start, so that the program around it can be built and tested first.

After a short run from shipped weights the mean of both may be better than either (Wortsman et al., 2022,
arxiv.org/abs/2109.01903): `--init assets/nano --share 0.3`.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training.decoder import CHECKPOINT as DECODER_CHECKPOINT
from training.latents import LATENTS
from training.loop import averaged_weights
from training.models import MAX_SEQUENCE_LENGTH, NANO, NATIVE_SCALE, NATIVE_SIDE, SHIFT
from training.train import CHECKPOINT, TOKENIZERS, Nano
from uso.model.pipeline import USOPipeline
from uso.model.scheduler import USOFlowMatchEulerScheduler


def take(module: nn.Module, checkpoint: Path, share: float) -> None:
    """Mix the averaged weights of a checkpoint, if there is one, into those of a module."""
    if checkpoint.exists():
        trained = averaged_weights(checkpoint)
        for name, parameter in module.named_parameters():
            parameter.lerp_(trained[name], share)


@torch.no_grad()
def build_pipeline(init: Path | None = None, share: float = 1.0) -> USOPipeline:
    """The averaged weights as a pipeline; with `init`, 1 - `share` of its weights."""
    torch.manual_seed(0)
    nano = Nano(TOKENIZERS)
    if init:
        nano.load_exported(init)
    if (LATENTS / "scale.json").exists():
        nano.vae.register_to_config(**json.loads((LATENTS / "scale.json").read_text()))
    take(nano, CHECKPOINT, share)
    take(nano.vae.decoder, DECODER_CHECKPOINT, share)
    clip, t5 = nano.tokenizers
    encoders: dict[str, Any] = dict(nano.conditioning.items())
    return USOPipeline(
        scheduler=USOFlowMatchEulerScheduler(base_shift=SHIFT, max_shift=SHIFT),
        vae=nano.vae,
        tokenizer=clip,
        tokenizer_2=t5,
        transformer=nano.transformer,
        **encoders,
        native_scale=NATIVE_SCALE,
        native_side=NATIVE_SIDE,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
    )


def export(folder: Path, init: Path | None = None, share: float = 1.0) -> None:
    """Write the pipeline to `folder`, whose files are replaced when all are written."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    build_pipeline(init, share).to(dtype=torch.float16).save_pretrained(part, max_shard_size="9MB")
    for source in sorted(part.rglob("*")):
        if source.is_file():
            source.chmod(0o644)
            target = folder / source.relative_to(part)
            target.parent.mkdir(parents=True, exist_ok=True)
            source.replace(target)
    shutil.rmtree(part)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=NANO)
    parser.add_argument("--init", type=Path, help="diffusers folder whose weights are mixed in")
    parser.add_argument(
        "--share", type=float, default=1.0, help="of the checkpoint in the mixture (default 1)"
    )
    arguments = parser.parse_args()
    export(arguments.folder, arguments.init, arguments.share)
