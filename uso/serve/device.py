"""One pipeline on one device: where its parts lie, and a picture drawn while others watch.

Knows neither jobs nor the web. The drawing runs in a thread of its own so that `Device.run` can be a plain
generator, which a worker thread or a GPU decorator drives.
"""

import base64
import contextlib
import faulthandler
import gc
import io
import itertools
import platform
import queue
import threading
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FirstBlockCacheConfig
from PIL import Image
from torch import Tensor

from uso.errors import Cancelled, USOError
from uso.images import OWN_SIZE_MAX, with_long_side
from uso.model import devices
from uso.model.geometry import unpack_latents
from uso.model.modes import Footprint, MemoryMode, Picture
from uso.model.tuning import compile_blocks, give_back, is_compiled, tune, uncompile_blocks
from uso.serve.cost import Demand
from uso.serve.staging import Staging
from uso.serve.work import Drawn, Event, Phase, Progress, Sizes, Work

# turbo: how little the first block's effect must change, relative to the last step's, for the others to be
# left out of a step
TURBO_THRESHOLD = 0.1
PREVIEW_SECONDS = 0.5
FIT_SIDE = 128  # pixels of the picture that previews' colours are fitted to


class DeviceFault(USOError):
    """The device is of no use any more; the process has to be restarted."""


class OutOfMemory(USOError):
    """The picture does not fit. Carries no traceback into the pipeline: its frames would keep the memory."""


class Device:
    """Owns `pipe` on a device. One `run` at a time; who calls sees to that.

    Args:
        pipe: a `USOPipeline` on the CPU.
        device: "auto" takes CUDA, then MPS, then the CPU; else a torch device.
        memory: a memory mode of `uso.model.modes`, or "auto". Where there is one memory, it is always "full".
        turbo: leave out the blocks in steps that change little. Lossy.
        step_limit: seconds without any sign of life after which the device counts as hung.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        device: str = "auto",
        memory: str = "auto",
        turbo: bool = False,
        step_limit: float = 600.0,
    ) -> None:
        self.pipe = pipe
        self.device = devices.choose_device(device)
        self.turbo = turbo
        self.step_limit = step_limit
        self.modes = devices.memory_modes(self.device)
        self.staging: Staging | None = None
        pipe.set_progress_bar_config(disable=True)
        self.memory, self.why = devices.pick_memory(memory, self.device, lambda: self.footprint)
        tune(pipe.transformer, self.device)
        self._place(self.memory)
        self._latent_to_rgb = fit_latent_to_rgb(pipe, self.device)
        if self.staging:
            self.staging.release()

    @cached_property
    def footprint(self) -> Footprint:
        return Footprint.of_pipeline(self.pipe)

    @property
    def name(self) -> str:
        """What seconds and memory depend on beside the picture and the model."""
        cuda = self.device.type == "cuda"
        kind = torch.cuda.get_device_name(self.device) if cuda else f"{self.device.type} {platform.machine()}"
        quantized = getattr(self.pipe.transformer, "quantization_config", None)
        dtype = str(self.pipe.transformer.dtype).removeprefix("torch.")
        weights = f"{quantized.weights_dtype} in {dtype}" if quantized else dtype
        more = ", turbo" if self.turbo else ", compiled" if is_compiled(self.pipe.transformer) else ""
        return f"{kind}, {torch.get_num_threads()} threads, {weights}, {self.memory}{more}"

    @property
    def in_use(self) -> int:
        """Bytes of the process, which may keep what earlier pictures needed; 0 on a GPU, which does not."""
        return 0 if self.device.type == "cuda" else _of_process("VmRSS") or 0

    def demand(self, work: Work, sizes: Sizes) -> Demand:
        """What a picture asks of the model; `work` need not hold the pictures that `sizes` tells of."""
        content = sizes.get("content_image")
        if content:
            long_side = work.content_long_size or min(max(content), OWN_SIZE_MAX)
            content = with_long_side(content, long_side)
        picture = Picture(
            work.width, work.height, (content,) if content else (), len(sizes.keys() - {"content_image"})
        )
        transformer = self.pipe.transformer.config
        windows = self.footprint.windows(picture)
        flop = len(windows) * step_flop(
            self.footprint.tokens(picture),
            width=self.footprint.hidden,
            blocks=transformer.num_layers + transformer.num_single_layers,
        )
        megapixels = windows.width * windows.height / 1e6
        memory = self.footprint.peak(self.memory, picture, turbo=self.turbo)
        return Demand(work.num_steps, flop / 1e12, len(sizes), megapixels, memory)

    def compile(self) -> None:
        """Compile the transformer where that pays; takes a minute, so it is for who draws many pictures."""
        # blocks that are streamed, or left out, have hooks: each would be a graph of its own
        if self.device.type == "cuda" and self.memory != "offload" and not self.turbo:
            compile_blocks(self.pipe)
            if self.staging:
                self.staging.release()

    def run(
        self, work: Work, cancelled: Callable[[], bool], *, keep: Callable[[], bool] = lambda: False
    ) -> Iterator[Event]:
        """Draw `work`: `Progress` while it goes, then one `Drawn`.

        Between steps `cancelled` and `keep` are asked: the first ends the work with `Cancelled`, the second
        with the picture that is there. Closing the generator cancels too. When memory runs out, everything
        is freed and the work begun once more in the next memory mode, in which the device then stays.

        Raises:
            Cancelled, OutOfMemory: the device is as good as before.
            USOError: numbers that are no picture (NaN).
            DeviceFault: hung, or failed for good.
        """
        before = self.memory
        try:
            yield from self._draw(work, cancelled, keep, notes=[])
            return
        except OutOfMemory:
            self._free()
            smaller = self.modes[self.modes.index(before) + 1 :]
            if not smaller:
                raise
            self._place(smaller[0])
            self.why = f"memory ran out in mode {before}"
            note = f"Memory ran out in mode {before}; drawn in mode {smaller[0]}, which is slower."
        try:
            yield from self._draw(work, cancelled, keep, notes=[note])
        except OutOfMemory:
            self._free()
            self._place(before)
            raise

    def rest(self) -> None:
        """Return the memory that the next picture would have used again."""
        give_back()

    def _draw(
        self, work: Work, cancelled: Callable[[], bool], keep: Callable[[], bool], notes: list[str]
    ) -> Iterator[Event]:
        """One attempt: the pipeline in a thread, its events from here."""
        events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        closed = threading.Event()
        drawing = _Drawing(self, work, lambda: closed.is_set() or cancelled(), keep, events)
        thread = threading.Thread(target=drawing.run, name="uso-device", daemon=True)
        begin_peak(self.device)
        try:
            thread.start()
            while True:
                try:
                    event = events.get(timeout=self.step_limit)
                except queue.Empty:
                    raise self._hung() from None
                if isinstance(event, Image.Image | Exception):
                    thread.join()  # it has said its last; the next one must not begin before
                if isinstance(event, Image.Image):
                    peak = peak_memory(self.device)
                    yield Drawn(event, drawing.step, drawing.seconds(), self.memory, peak, notes)
                    return
                if isinstance(event, Exception):
                    raise event
                phase, step, latents = event
                yield Progress(phase, step, None if latents is None else self._preview(latents))
        except (GeneratorExit, KeyboardInterrupt):
            closed.set()
            # Ctrl-C may come within `start`, whose thread cannot be joined before it runs
            if drawing.begun.wait(1):
                thread.join(timeout=self.step_limit)
            if thread.is_alive():
                raise self._hung() from None
            raise

    def _hung(self) -> DeviceFault:
        faulthandler.dump_traceback()
        return DeviceFault(
            f"The device gave no sign of life for {self.step_limit:g} seconds: restart the server; its log "
            "has the threads' stacks."
        )

    def _preview(self, latents: Tensor) -> str:
        """`(16, h, w)` latents as a JPEG data URI of w x h pixels."""
        factors, bias = self._latent_to_rgb
        rgb = torch.einsum("chw,cr->hwr", latents, factors) + bias  # (16, h, w) -> (h, w, 3)
        pixels = (rgb.clamp(-1, 1) * 127.5 + 127.5).to(torch.uint8).numpy()
        jpeg = io.BytesIO()
        Image.fromarray(pixels).save(jpeg, format="JPEG", quality=80)
        return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()

    @property
    def placement(self) -> str:
        """Where it computes and why so, in one line."""
        return f"{self.device.type}, memory mode {self.memory}: {self.why}"

    def _place(self, memory: MemoryMode) -> None:
        if self.pipe.transformer.is_cache_enabled:
            self.pipe.transformer.disable_cache()
        self.pipe.remove_all_hooks()
        if memory == "offload":
            uncompile_blocks(self.pipe.transformer)
        if memory == "full":
            self.staging = None
            self.pipe.to(self.device)
        else:
            self.pipe.to("cpu")
            self.staging = Staging(self.pipe, self.device, by_blocks=memory == "offload")
        if self.turbo:  # last, so that the weights of blocks left out are not brought
            self.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=TURBO_THRESHOLD))
        self.memory = memory

    def _free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class _Drawing:
    """One call of the pipeline, in the device's thread; what happens goes into `events`."""

    def __init__(
        self,
        device: Device,
        work: Work,
        cancelled: Callable[[], bool],
        keep: Callable[[], bool],
        events: queue.SimpleQueue[Any],
    ) -> None:
        self.device, self.pipe, self.work = device, device.pipe, work
        self.cancelled, self.keep, self.events = cancelled, keep, events
        self.step = 0
        self.begun = threading.Event()
        self.began: dict[Phase, float] = {}
        self.previewed = 0.0

    def run(self) -> None:
        """Put events, then the picture or the exception."""
        self.begun.set()
        hook = self.pipe.transformer.register_forward_pre_hook(self._before_transformer)
        try:
            self._enter("encoding")
            self.events.put(self._call())
        except torch.OutOfMemoryError:
            self.events.put(
                OutOfMemory("The device's memory is too small for this picture: ask for a smaller one.")
            )
        except torch.AcceleratorError as error:  # a CUDA error sticks: every later call fails with it
            reason = str(error).splitlines()[0]
            self.events.put(DeviceFault(f"The device failed ({reason}): restart the server."))
        except Exception as error:
            self.events.put(error)
        finally:
            hook.remove()
            if self.device.staging:
                self.device.staging.release()

    def _call(self) -> Image.Image:
        work = self.work
        generator = torch.Generator(self.device.device).manual_seed(work.seed)
        pixels = self.pipe(
            work.prompt,
            content_image=work.content_image,
            style_images=list(work.style_images),
            width=work.width,
            height=work.height,
            num_inference_steps=work.num_steps,
            guidance_scale=work.guidance,
            content_long_size=work.content_long_size,
            generator=generator,
            callback_on_step_end=self._after_step,
            callback_on_step_end_tensor_inputs=["latents", "noise_pred"],
            output_type="pt",
        ).images[0]  # (3, H, W) in [0, 1]
        if not pixels.isfinite().all():
            raise USOError("The decoder made numbers that are no picture (NaN): try another seed.")
        array = (pixels.permute(1, 2, 0).float().cpu().numpy() * 255).round().astype(np.uint8)
        self.began["done"] = time.monotonic()  # type: ignore[index]
        return Image.fromarray(array)

    def seconds(self) -> dict[Phase, float]:
        """Duration of each phase, in order."""
        marks = list(self.began.items())
        return {phase: end - start for (phase, start), (_, end) in itertools.pairwise(marks)}

    def _enter(self, phase: Phase) -> None:
        self.began[phase] = time.monotonic()
        self.events.put((phase, self.step, None))

    def _before_transformer(self, module: torch.nn.Module, args: Any) -> None:
        if self.cancelled():
            raise Cancelled("Cancelled.")
        if "drawing" not in self.began:
            self._enter("drawing")

    def _after_step(
        self, pipe: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]
    ) -> dict[str, Any]:
        latents = tensors["latents"]  # (1, N, 64)
        # Waits for the device, so that "step k" is true and a cancel comes in time.
        if not latents.isfinite().all():
            raise USOError(
                f"Step {index + 1} made numbers that are no picture (NaN): try another seed or size."
            )
        self.step = index + 1
        if self.cancelled():
            raise Cancelled("Cancelled.")
        # The picture as the model sees it now: x0 = x - sigma * v
        clean = latents - pipe.scheduler.sigmas[index + 1].item() * tensors["noise_pred"]
        kept = self.step < self.work.num_steps and self.keep()
        if kept:
            pipe._interrupt = True
        preview = None
        if (now := time.monotonic()) - self.previewed >= PREVIEW_SECONDS:
            self.previewed = now
            size = self.work.width, self.work.height
            windows = pipe.windows(*size, content=self.work.content_image is not None)
            latent_image = unpack_latents(clean, width=windows.width, height=windows.height)[0]
            preview = pipe.fit(latent_image, width=size[0], height=size[1]).float().cpu()
        self.events.put(("drawing", self.step, preview))
        if kept or self.step == self.work.num_steps:
            self._enter("decoding")
        return {"latents": clean if kept else latents}


def step_flop(tokens: int, *, width: int, blocks: int) -> int:
    """Floating-point operations of a step; modulations and embeddings are done once an image.

    Each token costs 12 D^2 multiply-adds in a double block (q, k, v, out and the MLP) as in a
    single one, and 2 D with each other token in attention.
    """
    return blocks * (24 * tokens * width**2 + 4 * tokens**2 * width)


def begin_peak(device: torch.device) -> None:
    """From here on `peak_memory` counts."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # elsewhere than on Linux nobody counts
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int | None:
    """Most bytes in use at once, on the GPU; on a CPU of the whole process; None where nobody counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _of_process("VmHWM")


def _of_process(key: str) -> int | None:
    """Bytes by `/proc/self/status`; None where there is none."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(key))


@torch.no_grad()
def fit_latent_to_rgb(pipe: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Factors `(16, 3)` and bias `(3,)` of the linear map from latents to colours in [-1, 1].

    Fitted to the pipeline's own VAE on soft random colours, so that previews need no figures of each model:
    0.04 s for nano's, under 1 s for FLUX's on two cores. Larger pictures fitted no better.
    """
    colours = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    image = Image.fromarray(colours).resize((FIT_SIDE, FIT_SIDE), Image.Resampling.BICUBIC)
    encoded = pipe.encode_content(image, content_long_size=FIT_SIDE, device=device)
    latents = encoded[0].float().cpu()  # (1, 16, h, w) -> (16, h, w)
    small = np.asarray(image.resize(latents.shape[:0:-1], Image.Resampling.BOX), dtype=np.float32)
    rgb = torch.from_numpy(small / 127.5 - 1).flatten(0, 1)  # (h, w, 3) -> (h * w, 3)
    inputs = torch.cat([latents.flatten(1).T, torch.ones(len(rgb), 1)], dim=1)  # (h * w, 17)
    factors = torch.linalg.lstsq(inputs, rgb).solution
    return factors[:-1], factors[-1]
