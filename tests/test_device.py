"""The pipeline on a device: memory modes, what happens when memory runs out, and a closed run."""

import itertools
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch

from tests.test_engine import FakePipeline
from uso.errors import InputError
from uso.images import open_image
from uso.model.checkpoints import load_pipeline
from uso.model.devices import choose_device
from uso.serve import device as device_module
from uso.serve.device import MODES, Device, DeviceFault, OutOfMemory
from uso.serve.work import Drawn, Progress, Work

EXAMPLES = Path(__file__).parents[1] / "assets" / "examples"


def work(**changes: Any) -> Work:
    values: dict[str, Any] = {"prompt": "a fox", "width": 512, "height": 512, "num_steps": 4, "guidance": 4.0}
    return Work(**values | {"seed": 5, "content_long_size": 512} | changes)


def test_a_closed_run_waits_for_the_device() -> None:
    """Two pictures at once would be the alternative."""
    stuck, go_on = threading.Event(), threading.Event()
    pipe = FakePipeline(lambda index: stuck.set() or go_on.wait(5))  # type: ignore[func-returns-value]
    device = Device(pipe, device="cpu", step_limit=0.3)
    run = device.run(work(), lambda: False)
    next(run)
    assert stuck.wait(5)
    with pytest.raises(DeviceFault):
        run.close()
    go_on.set()
    pipe = FakePipeline(lambda index: time.sleep(0.05))
    run = Device(pipe, device="cpu").run(work(), lambda: False)
    while next(run).step == 0:
        pass
    assert pipe.inside == 1
    run.close()
    assert pipe.inside == 0


def test_previews_come_at_most_twice_a_second_and_the_drawing_waits_for_none() -> None:
    drawn = threading.Event()
    pipe = FakePipeline(lambda index: drawn.set() if index == 11 else time.sleep(0.1))
    began = time.monotonic()
    run = Device(pipe, device="cpu").run(work(num_steps=12), lambda: False)
    next(run)
    assert drawn.wait(20), "nobody takes the previews meanwhile"
    seconds = time.monotonic() - began
    previews = [event for event in run if isinstance(event, Progress) and event.preview]
    assert 2 <= len(previews) <= 1 + seconds / device_module.PREVIEW_SECONDS


@pytest.mark.parametrize(
    ("free_gb", "mode", "why"),
    [(50, "full", "all 36.0 GB"), (30, "staged", "24.0 GB, fits"), (10, "offload", "24.0 GB, does not fit")],
)
def test_auto_takes_the_fastest_mode_that_fits(
    monkeypatch: pytest.MonkeyPatch, free_gb: int, mode: str, why: str
) -> None:
    monkeypatch.setattr(device_module, "choose_device", torch.device)
    monkeypatch.setattr(device_module, "tune", lambda transformer, device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_gb * 10**9, 80 * 10**9))
    pipe = FakePipeline()
    for name, gigabytes in (("transformer", 24), ("text_encoder_2", 10), ("vae", 2)):
        pipe.components[name] = torch.nn.Linear(1, 1, bias=False)
        weights = torch.empty(gigabytes * 10**9, dtype=torch.uint8, device="meta")
        pipe.components[name].weight = torch.nn.Parameter(weights, requires_grad=False)
    device = Device(pipe, device="cuda")
    assert (device.memory, pipe.placed) == (mode, [mode])
    assert why in device.why
    assert f"{free_gb}.0 GB are free" in device.why
    assert Device(pipe, device="cuda", memory="offload").memory == "offload"


@pytest.mark.parametrize("faults", [1, 2])
def test_out_of_memory_is_retried_once_in_the_next_mode(faults: int) -> None:
    left = [faults]

    def step(index: int) -> None:
        if index == 1 and left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")

    pipe = FakePipeline(step)
    device = Device(pipe, device="cpu")
    device.modes = MODES
    if faults == 1:
        drawn = list(device.run(work(), lambda: False))[-1]
        assert drawn.notes == ["Memory ran out in mode full; drawn in mode staged, which is slower."]
        assert drawn.memory == "staged"
        assert pipe.placed == ["full", "staged"]
    else:
        with pytest.raises(OutOfMemory, match="memory is too small"):
            list(device.run(work(), lambda: False))
        assert pipe.placed == ["full", "staged", "full"]
    before = device.memory
    assert list(device.run(work(), lambda: False))[-1].memory == before, "the next job starts where it worked"


@pytest.fixture
def nano(monkeypatch: pytest.MonkeyPatch) -> Any:
    pipe = load_pipeline("nano")

    def enable_sequential_cpu_offload(device: torch.device) -> None:
        """As diffusers' own, which asks accelerate for "cpu:0"; it only knows the CPU as "cpu"."""
        pipe.remove_all_hooks()
        pipe._offload_device = device
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                accelerate.cpu_offload(part, device, offload_buffers=len(part._parameters) > 0)

    monkeypatch.setattr(pipe, "enable_sequential_cpu_offload", enable_sequential_cpu_offload)
    return pipe


@pytest.mark.parametrize(("faults", "ends_in"), [(1, "staged"), (2, "offload")])
def test_the_real_pipeline_falls_through_the_modes(nano: Any, faults: int, ends_in: str) -> None:
    """On the CPU, where the modes move weights all the same: memory runs out in a step of the first pictures,
    a mode later each; the last picture is the one that was to be."""
    device = Device(nano, device="cpu")
    pictures = {
        "content_image": open_image(EXAMPLES / "fox.jpg"),
        "style_images": (open_image(EXAMPLES / "delft-tile.jpg"),),
    }
    expected = drawn(device, work(**pictures))
    assert (expected.memory, expected.notes) == ("full", [])
    device.modes = MODES  # a CPU has one by itself
    for mode, smaller in itertools.pairwise(MODES[: faults + 1]):
        lost: list[weakref.ref[torch.Tensor]] = []

        def run_out(module: Any, args: Any, lost: list[Any] = lost) -> None:
            activations = torch.zeros(1000)
            lost.append(weakref.ref(activations))
            if len(lost) == 3:  # in the third step
                raise torch.OutOfMemoryError("CUDA out of memory")
            if len(lost) == 4:
                assert lost[2]() is None, "what did not fit is still held"

        hook = nano.transformer.register_forward_pre_hook(run_out)
        picture = drawn(device, work(**pictures))
        hook.remove()
        assert len(lost) == 3 + 4
        assert picture.memory == device.memory == smaller
        assert picture.notes == [f"Memory ran out in mode {mode}; drawn in mode {smaller}, which is slower."]
        assert device.why == f"memory ran out in mode {mode}"
    following = drawn(device, work(**pictures))
    assert (following.memory, following.notes) == (ends_in, [])
    assert following.image.tobytes() == expected.image.tobytes()
    held = {p.device.type for p in nano.transformer.parameters()}
    assert held == {"meta" if ends_in == "offload" else "cpu"}, "nothing stays on the device"


def drawn(device: Device, work: Work) -> Drawn:
    event = list(device.run(work, lambda: False))[-1]
    assert isinstance(event, Drawn)
    return event


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_is_chosen_once_and_tried_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "mps")
    with pytest.raises(InputError, match=r"cuda:7 cannot be used here \(.+\): set --device or USO_DEVICE"):
        choose_device("cuda:7")
