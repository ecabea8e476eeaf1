"""What all trainings share: processes, optimizer, moving average, checkpoints.

On a CPU, processes of one thread each that average their gradients are far faster than one process of many
threads; with GPUs there is one process each. The schedule follows the minutes trained, not the steps, so that
a run fits its time on any machine.
"""

import argparse
import math
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from training.cpu import has_bfloat16, speed_up

# glibc gives each big tensor's memory back to the kernel and asks again, unless told to keep it.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "OMP_NUM_THREADS": "1",
}
GRADIENT_NORM = 1.0  # at most: one batch in some thousand has a loss a hundred times the others'


def training_options(description: str | None, *, minutes: float) -> argparse.ArgumentParser:
    """The options that every training has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--minutes", type=float, default=minutes, help="in all, earlier parts counted")
    parser.add_argument("--lr", type=float, default=2e-3, help="the highest learning rate")
    parser.add_argument("--processes", type=int, help="default: the GPUs, or 2 without one")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def device() -> torch.device:
    """Where this process computes: its own GPU, or the CPU of a machine without one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast() -> torch.autocast:
    """Matrix products in bfloat16 where that is faster."""
    kind = device().type
    return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda" or has_bfloat16())


def launch(worker: Callable[..., None], *args: Any, processes: int | None, seed: int) -> None:
    """Run `worker(*args)` in a group of `processes` (default: one a GPU, or 2 without one)."""
    os.environ.update(ALLOCATOR)
    processes = processes or torch.cuda.device_count() or 2
    with tempfile.TemporaryDirectory() as folder:
        group = f"file://{folder}/group"
        torch.multiprocessing.spawn(_enter, args=(worker, args, processes, group, seed), nprocs=processes)


def _enter(
    rank: int, worker: Callable[..., None], args: tuple[Any, ...], processes: int, group: str, seed: int
) -> None:
    # torch sends it when the parent dies; a background process is born deaf to it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    if device().type == "cuda":
        torch.cuda.set_device(rank)
    else:
        speed_up()
    backend = "nccl" if device().type == "cuda" else "gloo"
    dist.init_process_group(backend, group, rank=rank, world_size=processes)
    torch.manual_seed(seed)  # the same weights everywhere; each worker draws its data from `data_seed`
    worker(*args)
    dist.destroy_process_group()


def data_rng(seed: int, step: int) -> np.random.Generator:
    """A generator for this process's data from `step` on: another one for each process and each resume."""
    random.seed(seed + step)
    return np.random.default_rng((seed, step, dist.get_rank()))


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Average the gradients over all processes, those of unused parameters being zero."""
    flat = torch.cat(
        [torch.zeros_like(p).reshape(-1) if p.grad is None else p.grad.reshape(-1) for p in parameters]
    )
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = grad.view_as(p)


def orthogonalize(updates: Tensor) -> Tensor:
    """The nearest orthogonal matrix to each update `(B, rows, columns)`, roughly: five Newton-Schulz steps.

    Keller Jordan, Muon (2024); the factor gives it the root mean square of an AdamW update (Moonshot, 2025).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = updates.shape[-2] > updates.shape[-1]
    x = updates.mT if tall else updates
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = x.bfloat16() if x.is_cuda or has_bfloat16() else x
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.mT if tall else x
    return x.to(updates.dtype) * (0.2 * math.sqrt(max(updates.shape[-2:])))


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the weight matrices (and kernels) in `matrices`, AdamW for `others`.

    Each process orthogonalizes its share of the matrices and the updates are summed: the work is as large as
    a small batch's.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], others: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(
            [{"params": list(matrices), "muon": True}, {"params": list(others), "muon": False}], {"lr": lr}
        )

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update from gradients that `average_gradients` has made equal in all processes."""
        for group in self.param_groups:
            (self._muon if group["muon"] else self._adamw)(group["params"], group["lr"])

    def _muon(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
        updates = flat.split([p.numel() for p in parameters])
        alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for i, (p, update) in enumerate(zip(parameters, updates, strict=True)):
            assert p.grad is not None
            buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
            buffer.lerp_(p.grad, 1 - momentum)
            if i % dist.get_world_size() == dist.get_rank():
                nesterov = p.grad.lerp(buffer, momentum).reshape(len(p), -1)
                alike.setdefault(nesterov.shape, []).append((update, nesterov))
        for pairs in alike.values():
            orthogonal = orthogonalize(torch.stack([nesterov for _, nesterov in pairs]))
            for (update, _), matrix in zip(pairs, orthogonal, strict=True):
                update.copy_(matrix.reshape(-1))
        dist.all_reduce(flat)
        for p, update in zip(parameters, updates, strict=True):
            p.add_(update.view_as(p), alpha=-lr)

    def _adamw(
        self, parameters: list[nn.Parameter], lr: float, beta1: float = 0.9, beta2: float = 0.98
    ) -> None:
        for p in parameters:
            assert p.grad is not None
            state = self.state[p]
            if not state:
                state.update(step=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
            state["step"] += 1
            state["mean"].lerp_(p.grad, 1 - beta1)
            state["square"].lerp_(p.grad.square(), 1 - beta2)
            mean = state["mean"] / (1 - beta1 ** state["step"])
            p.addcdiv_(mean, (state["square"] / (1 - beta2 ** state["step"])).sqrt_().add_(1e-8), value=-lr)


def layers_by_muon(model: nn.Module, lr: float) -> MuonAdamW:
    """Muon for the matrices of an encoder's layers, AdamW for all else."""
    matrices = [p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
    others = [p for name, p in model.named_parameters() if not (".layers." in name and p.ndim == 2)]
    return MuonAdamW(matrices, others, lr)


def kernels_by_muon(model: nn.Module, lr: float) -> MuonAdamW:
    """Muon for the kernels of the convolutions between layers, AdamW for all else."""
    kernels: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for p in model.parameters():
        (kernels if p.ndim == 4 and min(p.shape[:2]) > 4 else others).append(p)
    return MuonAdamW(kernels, others, lr)


class Run:
    """Time, learning rate, moving average and checkpoints of one training.

    Args:
        model: what is trained; every process holds an equal copy.
        optimizer: over `model`'s parameters.
        lr: the highest learning rate: reached after `warmup` steps, falling to zero over the second half.
        minutes: how long to train in all, earlier parts of a resumed run counted.
        checkpoint: file to save to, and to resume from when it exists.
        decay: of the moving average.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: MuonAdamW,
        *,
        lr: float,
        minutes: float,
        checkpoint: Path,
        decay: float = 0.998,
        warmup: int = 50,
        save_every: float = 180.0,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.lr, self.seconds, self.checkpoint = lr, minutes * 60, checkpoint
        self.decay, self.warmup, self.save_every = decay, warmup, save_every
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.average = [p.detach().clone() for p in self.parameters]
        self.bar = tqdm(total=100, disable=dist.get_rank() > 0, mininterval=10)
        self.step, self.elapsed, self.clock, self.saved = 0, 0.0, time.monotonic(), time.monotonic()
        if checkpoint.exists():
            state = torch.load(checkpoint, weights_only=True, map_location=device())
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            self.average, self.step, self.elapsed = state["average"], state["step"], state["elapsed"]

    @property
    def progress(self) -> float:
        """0 at the start, 1 when the minutes are over; the same in all processes."""
        return min(1.0, self.elapsed / self.seconds)

    def update(self, loss: Tensor) -> None:
        """Back-propagate, step the optimizer and the average, count the time, save now and then."""
        loss.backward()
        average_gradients(self.parameters)
        nn.utils.clip_grad_norm_(self.parameters, GRADIENT_NORM)
        rate = self.lr * min(1.0, (self.step + 1) / self.warmup, 2 * (1 - self.progress) + 0.01)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        # A short memory at first, so that early exports are not the random start.
        with torch.no_grad():
            decay = min(self.decay, self.step / (self.step + 20))
            torch._foreach_lerp_(self.average, self.parameters, 1 - decay)
        now = time.monotonic()
        spent = torch.tensor(now - self.clock, dtype=torch.float64, device=device())
        dist.broadcast(spent, 0)
        self.elapsed += spent.item()
        self.clock = now
        if dist.get_rank() == 0 and (now - self.saved > self.save_every or self.progress == 1):
            self.save()
            self.saved = now

    def show(self, text: str) -> None:
        """How far it is, on the first process's progress bar, with `text` beside the step."""
        self.bar.n = round(100 * self.progress)
        self.bar.set_postfix_str(f"step {self.step} {text}", refresh=False)
        self.bar.update(0)

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": self.average,
                "average_names": self.average_names(),
                "step": self.step,
                "elapsed": self.elapsed,
            },
            partial,
        )
        partial.replace(self.checkpoint)

    def average_names(self) -> list[str]:
        """The parameter names of `average`, in its order."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        return [names[id(p)] for p in self.parameters]


def averaged_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint's model; what was trained is the moving average."""
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    weights: dict[str, Tensor] = state["model"]
    averages = zip(state["average_names"], state["average"], strict=True)
    # by address, for a tied weight has two names
    by_address = {weights[name].data_ptr(): average for name, average in averages}
    return {name: by_address.get(tensor.data_ptr(), tensor) for name, tensor in weights.items()}
