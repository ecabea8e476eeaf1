"""The pipeline on a device: memory modes, what happens when memory runs out, and a closed run."""

import itertools
import threading
import time
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image

from tests.test_engine import FakePipeline
from uso.errors import Cancelled, InputError
from uso.images import open_image
from uso.model import devices
from uso.model.checkpoints import load_pipeline
from uso.model.devices import choose_device, pick_memory
from uso.model.modes import MEMORY_MODES, Footprint, MemoryMode, Quantization
from uso.model.plans import published_components
from uso.model.variants import DEV
from uso.serve import device as device_module
from uso.serve.device import Device, DeviceFault, OutOfMemory
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


def test_ctrl_c_while_the_thread_starts_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch in a thread that goes on while Python ends aborts the process."""
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    steps: list[None] = []
    pipe = FakePipeline(lambda index: steps.append(time.sleep(0.05)))  # type: ignore[func-returns-value]
    device = Device(pipe, device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(device.run(work(num_steps=50), lambda: False))
    assert pipe.inside == 0
    assert not [thread for thread in threading.enumerate() if thread.name == "uso-device"]
    assert len(steps) < 50


def test_a_cuda_error_is_the_end_of_the_device() -> None:
    def fail(index: int) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCompile with ...")

    with pytest.raises(DeviceFault, match=r"illegal memory access was encountered\): restart"):
        list(Device(FakePipeline(fail), device="cpu").run(work(), lambda: False))


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


@pytest.mark.parametrize(("free_gb", "mode"), [(50, "full"), (30, "staged"), (10, "offload")])
def test_auto_looks_at_what_is_free(monkeypatch: pytest.MonkeyPatch, free_gb: int, mode: str) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_gb * 10**9, 80 * 10**9))
    found = Footprint.of(published_components(DEV), itemsize=2)
    cuda = torch.device("cuda")
    chosen, why = pick_memory("auto", cuda, lambda: found)
    assert chosen == mode
    assert f"{free_gb}.0 GB are free" in why
    assert pick_memory("offload", cuda, lambda: found) == ("offload", "as set")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="elsewhere nobody counts")
def test_memory_in_use_counts_as_the_peak_does() -> None:
    device = Device(FakePipeline(), device="cpu")
    before = device.in_use
    kept = bytearray(2**28)
    assert device.in_use - before == pytest.approx(len(kept), rel=0.2)
    peak = drawn(device, work()).peak
    assert peak is not None
    assert peak > 0.9 * device.in_use


def test_where_there_is_one_memory_nothing_is_moved() -> None:
    device = Device(FakePipeline(), device="cpu", memory="staged")
    assert device.memory == "full"
    assert device.why == "cpu has no memory of its own, staged would save nothing"


@pytest.mark.parametrize("faults", [1, 2])
def test_out_of_memory_is_retried_once_in_the_next_mode(faults: int) -> None:
    left = [faults]

    def step(index: int) -> None:
        if index == 1 and left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")

    pipe = FakePipeline(step)
    device = Device(pipe, device="cpu")
    device.modes = MEMORY_MODES
    if faults == 1:
        drawn = list(device.run(work(), lambda: False))[-1]
        assert drawn.notes == ["Memory ran out in mode full; drawn in mode staged, which is slower."]
        assert drawn.memory == "staged"
    else:
        with pytest.raises(OutOfMemory, match="memory is too small"):
            list(device.run(work(), lambda: False))
        assert device.memory == "full"
    before = device.memory
    assert list(device.run(work(), lambda: False))[-1].memory == before, "the next job starts where it worked"


PICTURES: dict[str, Any] = {
    "content_image": open_image(EXAMPLES / "fox.jpg"),
    "style_images": (open_image(EXAMPLES / "delft-tile.jpg"),),
}


@pytest.fixture
def all_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU has one memory; here its copies stand for a GPU's, which is not tuned as a CPU is."""
    monkeypatch.setattr(devices, "memory_modes", lambda device: MEMORY_MODES)
    monkeypatch.setattr("uso.serve.device.tune", lambda transformer, device: None)


@pytest.fixture(scope="module")
def lossless() -> Image.Image:
    with mock.patch("uso.serve.device.tune"):
        return drawn(Device(load_pipeline("nano"), device="cpu"), work(**PICTURES, num_steps=2)).image


@pytest.mark.usefixtures("all_modes")
@pytest.mark.parametrize("mode", ["staged", "offload"])
def test_a_part_lies_on_the_device_while_it_runs(mode: MemoryMode, lossless: Image.Image) -> None:
    """The picture is the same to the bit, and no more is there at once than the table says."""
    pipe = load_pipeline("nano")
    homes = {name: part.data_ptr() for name, part in parameters(pipe).items()}
    device = Device(pipe, device="cpu", memory=mode)
    assert device.staging is not None
    found, most = Footprint.of_pipeline(pipe), 0

    def away() -> set[str]:
        return {name for name, part in parameters(pipe).items() if part.data_ptr() != homes[name]}

    def look(*_: Any) -> None:
        nonlocal most
        assert device.staging is not None
        most = max(most, device.staging.bytes)
        assert len({name.partition(".")[0] for name in away()}) == 1, "one part at a time"
        assert not any("norm1.linear" in name or "norm.linear" in name for name in away())

    hooks = [
        module.register_forward_hook(look)
        for module in pipe.transformer.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    hooks += [pipe.text_encoder_2.register_forward_hook(look), pipe.vae.decoder.register_forward_hook(look)]
    assert drawn(device, work(**PICTURES, num_steps=2)).image.tobytes() == lossless.tobytes()
    for hook in hooks:
        hook.remove()
    assert most == found.weights(mode)
    assert not away(), "all are at home again"
    assert device.staging.bytes == 0


def parameters(pipe: Any) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": parameter
        for part, module in pipe.components.items()
        if isinstance(module, torch.nn.Module)
        for name, parameter in module.named_parameters()
    }


@pytest.mark.usefixtures("all_modes")
@pytest.mark.parametrize(("faults", "ends_in"), [(1, "staged"), (2, "offload")])
def test_the_real_pipeline_falls_through_the_modes(faults: int, ends_in: str, lossless: Image.Image) -> None:
    """Memory runs out in a step of the first pictures, a mode later each; the last one is as it was to be."""
    pipe = load_pipeline("nano")
    device = Device(pipe, device="cpu", memory="full")
    asked = work(**PICTURES, num_steps=2)
    for mode, smaller in itertools.pairwise(MEMORY_MODES[: faults + 1]):
        lost: list[weakref.ref[torch.Tensor]] = []

        def run_out(module: Any, args: Any, lost: list[Any] = lost) -> None:
            activations = torch.zeros(1000)
            lost.append(weakref.ref(activations))
            if len(lost) == 2:  # in the second step
                raise torch.OutOfMemoryError("CUDA out of memory")
            if len(lost) == 3:
                assert lost[1]() is None, "what did not fit is still held"

        hook = pipe.transformer.register_forward_pre_hook(run_out)
        picture = drawn(device, asked)
        hook.remove()
        assert len(lost) == 2 + 2
        assert picture.memory == device.memory == smaller
        assert picture.notes == [f"Memory ran out in mode {mode}; drawn in mode {smaller}, which is slower."]
        assert device.why == f"memory ran out in mode {mode}"
    following = drawn(device, asked)
    assert (following.memory, following.notes) == (ends_in, [])
    assert following.image.tobytes() == lossless.tobytes()
    assert device.staging is not None
    assert device.staging.bytes == 0, "nothing stays on the device"


@pytest.mark.usefixtures("all_modes")
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_modes_in_turn_leave_no_trace(quantization: Quantization) -> None:
    """Each picture, and one of another size and prompt between, is that of a device which had no other."""
    asked, other = work(**PICTURES, num_steps=2), work(prompt="a cat", width=1024, num_steps=1)

    def fresh() -> Device:
        return Device(load_pipeline("nano", quantization=quantization), device="cpu", memory="full")

    expected, between = (drawn(fresh(), each).image.tobytes() for each in (asked, other))
    device = fresh()
    for mode in ("staged", "full", "offload", "full", "staged"):
        device._place(mode)
        assert drawn(device, asked).image.tobytes() == expected
        assert drawn(device, other).image.tobytes() == between


@pytest.mark.usefixtures("all_modes")
def test_memory_that_ends_while_a_part_is_brought_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load_pipeline("nano")
    device = Device(pipe, device="cpu", memory="offload")
    assert device.staging is not None
    homes = {name: part.data_ptr() for name, part in parameters(pipe).items()}
    copies = [0]
    to = torch.Tensor.to

    def scarce(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if options.get("copy") and isinstance(tensor, torch.nn.Parameter):
            copies[0] += 1
            if copies[0] == 7:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return to(tensor, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", scarce)
    with pytest.raises(OutOfMemory):
        drawn(device, work(**PICTURES))
    assert device.staging.bytes == 0
    assert {name: part.data_ptr() for name, part in parameters(pipe).items()} == homes
    drawn(device, work(**PICTURES, num_steps=1))


@pytest.mark.usefixtures("all_modes")
@pytest.mark.parametrize("mode", MEMORY_MODES)
def test_turbo_leaves_blocks_out_and_no_trace(
    mode: MemoryMode, lossless: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same picture each time, after a cancel and after another size too; without turbo as ever."""
    monkeypatch.setattr(device_module, "TURBO_THRESHOLD", 0.3)  # few steps differ more than many
    pipe = load_pipeline("nano")
    device = Device(pipe, device="cpu", memory=mode, turbo=True)
    last_block = pipe.transformer.single_transformer_blocks[-1]
    runs: list[int] = []
    hook = last_block.attn.register_forward_hook(lambda *_: runs.append(1))
    asked = work(**PICTURES, num_steps=12)
    first = drawn(device, asked).image
    assert 1 < len(runs) < 12, "some steps reuse the blocks' effect"
    cancelling = device.run(asked, lambda: len(runs) > 1)
    runs.clear()
    with pytest.raises(Cancelled):
        list(cancelling)
    drawn(device, work(num_steps=3))
    assert drawn(device, asked).image.tobytes() == first.tobytes()
    hook.remove()
    pipe.transformer.disable_cache()
    pipe.remove_all_hooks()
    plain = drawn(Device(pipe, device="cpu", memory="full"), work(**PICTURES, num_steps=2))
    assert plain.image.tobytes() == lossless.tobytes()


@pytest.mark.usefixtures("all_modes")
def test_modes_and_quantization_work_together() -> None:
    """The same picture in each memory mode: quantized weights, the modulation at home, blocks left out."""
    pictures = set()
    for mode in MEMORY_MODES:
        pipe = load_pipeline("nano", quantization="int4")
        device = Device(pipe, device="cpu", memory=mode, turbo=True)
        pictures.add(drawn(device, work(**PICTURES, num_steps=3)).image.tobytes())
    assert len(pictures) == 1


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
