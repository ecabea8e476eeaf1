"""Jobs never get lost, doubled or stuck; the device never does two things at once."""

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from uso.errors import CheckpointError, InputError
from uso.metadata import read_parameters
from uso.model.checkpoints import load_pipeline
from uso.schema import parse_request
from uso.serve.device import MODES, Device, DeviceFault
from uso.serve.engine import FINAL, KEPT_JOBS, Busy, Engine, Job


class FakePipeline:
    """Called like a `USOPipeline`; `step` is called in each step and may be made slow or faulty."""

    def __init__(self, step: Callable[[int], None] = lambda index: None) -> None:
        self.step = step
        self.placed: list[str] = []
        self.inside = self.most_inside = 0
        self.components: dict[str, Any] = {}
        self._interrupt = False
        self.transformer = FakeTransformer()
        self.image_value = 0.5

    def __call__(self, prompt: str, *, width: int, height: int, num_inference_steps: int, **rest: Any) -> Any:
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        try:
            self._interrupt = False
            self.scheduler = SimpleNamespace(sigmas=torch.linspace(1, 0, num_inference_steps + 1))
            latents = torch.zeros(1, width // 16 * height // 16, 64)
            for index in range(num_inference_steps):
                if self._interrupt:
                    break
                latents = latents + self.transformer(latents)[0]
                self.step(index)
                latents = rest["callback_on_step_end"](self, index, None, {"latents": latents})["latents"]
            assert rest["output_type"] == "pt"
            return SimpleNamespace(images=torch.full((1, 3, height, width), self.image_value))
        finally:
            self.inside -= 1

    def native_size(self, pixels: int) -> int:
        return pixels

    def cut(self, pixels: torch.Tensor, **shape: int) -> torch.Tensor:
        return pixels

    def encode_content(self, image: Image.Image, **rest: Any) -> torch.Tensor:
        return torch.rand(1, 16, image.height // 8, image.width // 8)

    def to(self, device: Any) -> None:
        self.placed.append("full")

    def enable_model_cpu_offload(self, device: Any) -> None:
        self.placed.append("staged")

    def enable_sequential_cpu_offload(self, device: Any) -> None:
        self.placed.append("offload")

    def nothing(self, **rest: Any) -> None:
        pass

    set_progress_bar_config = remove_all_hooks = maybe_free_model_hooks = nothing


class FakeTransformer(torch.nn.Module):
    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.zeros_like(latents),)


@pytest.fixture
def start() -> Iterator[Callable[..., Engine]]:
    """Engines that are stopped after the test."""
    engines: list[Engine] = []

    def make(load: Callable[..., Any], **options: Any) -> Engine:
        engine = Engine(load, model="fake", **options)
        engines.append(engine)
        engine.start()
        return engine

    yield make
    for engine in engines:
        engine.stop(within=5)


def submit(engine: Engine, **fields: Any) -> Job:
    request = parse_request({"prompt": "a fox", "width": 512, "height": 512, "num_steps": 4, **fields})
    return engine.submit(request, {}, {})


def wait(engine: Engine, job: Job, state: str | None = None, seconds: float = 30) -> Job:
    """The job once it is in `state`, or has ended."""
    deadline = time.monotonic() + seconds
    while True:
        now = engine.get(job.id)
        assert now is not None
        if now.state == state or now.done:
            return now
        assert time.monotonic() < deadline, f"still {now.state}"
        time.sleep(0.005)


def test_a_job_becomes_a_png_with_its_parameters(start: Any) -> None:
    engine = start(lambda progress: FakePipeline())
    subject = Image.new("RGB", (300, 200))
    request = parse_request({"prompt": "a fox", "num_steps": 3})
    job = wait(engine, engine.submit(request, {"content_image": subject}, {"content_image": "ab12"}))
    assert job.state == "completed"
    assert job.result is not None
    with Image.open(job.result.path) as picture:
        assert picture.size == (1024, 672)
    parameters = read_parameters(job.result.path)
    assert parameters == job.result.parameters
    assert parameters["seed"] == job.work.seed >= 0
    assert (parameters["width"], parameters["num_steps"], parameters["model"]) == (1024, 3, "fake")
    assert parameters["image_sha256"] == {"content_image": "ab12"}
    assert list(job.result.seconds) == ["encoding", "drawing", "decoding"]
    assert job.work.content_image is None, "a finished job keeps no pictures in memory"


def test_a_size_that_cannot_be_is_refused_at_once(start: Any) -> None:
    engine = start(lambda progress: FakePipeline())
    with pytest.raises(InputError, match="too thin"):
        engine.submit(parse_request({"prompt": ""}), {"content_image": Image.new("RGB", (800, 100))}, {})


def test_cancel_in_every_state_under_load(start: Any) -> None:
    """A thousand jobs, cancelled or kept at random moments from four threads."""
    pipe = FakePipeline(lambda index: time.sleep(0.0005))
    engine = start(lambda progress: pipe, queue_limit=100)
    promised: set[str] = set()
    jobs: list[Job] = []

    def visitor(number: int) -> None:
        dice = random.Random(number)
        for _ in range(250):
            while True:
                try:
                    job = submit(engine)
                    break
                except Busy:
                    time.sleep(0.002)
            jobs.append(job)
            time.sleep(dice.random() * 0.002)
            act = dice.choice([engine.cancel, engine.cancel, engine.keep, bool])
            target = dice.choice(jobs[-40:])
            if act(target.id) and act == engine.cancel:
                promised.add(target.id)

    visitors = [threading.Thread(target=visitor, args=(n,)) for n in range(4)]
    for thread in visitors:
        thread.start()
    for thread in visitors:
        thread.join()
    deadline = time.monotonic() + 60
    while engine.waiting and time.monotonic() < deadline:
        time.sleep(0.01)
    remembered = [ended for job in jobs if (ended := engine.get(job.id))]
    assert len(remembered) >= KEPT_JOBS
    assert all(job.state in FINAL for job in remembered)
    assert all((job.state == "cancelled") == (job.id in promised) for job in remembered)
    assert all((job.state == "completed") == (job.result is not None) for job in remembered)
    assert len(promised) > 100
    assert pipe.most_inside == 1
    assert wait(engine, submit(engine)).state == "completed"


def test_a_running_job_is_cancelled_between_steps(start: Any) -> None:
    steps = []
    engine = start(lambda progress: FakePipeline(lambda index: steps.append(time.sleep(0.05))))
    job = submit(engine, num_steps=50)
    wait(engine, job, "running")
    assert engine.cancel(job.id)
    assert wait(engine, job, seconds=2).state == "cancelled"
    assert len(steps) < 50
    assert not engine.cancel(job.id), "ended already"


def test_keep_makes_a_picture_of_what_is_there(start: Any) -> None:
    engine = start(lambda progress: FakePipeline(lambda index: time.sleep(0.05)))
    job = submit(engine, num_steps=50)
    while wait(engine, job, "running").step < 2:
        time.sleep(0.01)
    assert engine.keep(job.id)
    job = wait(engine, job)
    assert job.state == "completed"
    assert job.result is not None
    assert 2 <= read_parameters(job.result.path)["stopped_at_step"] < 50
    assert "of 50 steps" in job.notes[-1]


def test_progress_goes_to_any_number_of_watchers(start: Any) -> None:
    engine = start(lambda progress: FakePipeline(lambda index: time.sleep(0.15)))
    first, second = submit(engine, num_steps=6), submit(engine)
    assert engine.position(second.id) == 1

    async def watch() -> list[Job]:
        return [job async for job in engine.watch(first.id)]

    async def watch_thrice() -> list[list[Job]]:
        return await asyncio.gather(watch(), watch(), watch())

    for seen in asyncio.run(watch_thrice()):
        assert [job.version for job in seen] == sorted({job.version for job in seen})
        assert len({job.step for job in seen}) > 3
        assert any(job.preview and job.preview.startswith("data:image/jpeg") for job in seen)
        left = [job.seconds_left for job in seen if job.phase == "drawing" and job.step]
        assert left[0] is not None
        assert left[0] > (left[-1] or 0)
        assert seen[-1].state == "completed"
    assert engine.estimate(512, 512, 4) == pytest.approx(0.6, abs=0.3)


def test_the_queue_is_bounded(start: Any) -> None:
    go_on = threading.Event()
    engine = start(lambda progress: FakePipeline(lambda index: go_on.wait(5)), queue_limit=2)
    wait(engine, submit(engine), "running")
    waiting = [submit(engine), submit(engine)]
    with pytest.raises(Busy, match="limit is 2"):
        submit(engine)
    go_on.set()
    assert [wait(engine, job).state for job in waiting] == ["completed", "completed"]


def test_a_failed_load_says_why_and_can_be_tried_again(start: Any) -> None:
    answers: list[Any] = [CheckpointError("ae.safetensors is missing. Set AE."), FakePipeline()]
    go_on = threading.Event()

    def load(progress: Callable[[str, float], None]) -> Any:
        progress("Loading vae", 0.5)
        go_on.wait(5)
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    engine = start(load)
    job = submit(engine)
    while engine.status.text != "Loading vae":
        time.sleep(0.01)
    assert engine.status.fraction == 0.5
    go_on.set()
    assert wait(engine, job).error is not None
    assert engine.status.state == "failed"
    assert "Set AE." in engine.status.text
    with pytest.raises(Busy, match="Set AE"):
        submit(engine)
    engine.start()
    assert wait(engine, submit(engine)).state == "completed"


def test_numbers_that_are_no_picture_fail_the_job_alone(start: Any) -> None:
    pipe = FakePipeline()
    engine = start(lambda progress: pipe)
    pipe.transformer.register_forward_hook(lambda module, args, output: (output[0] + torch.nan,))
    job = wait(engine, submit(engine))
    assert job.state == "failed"
    assert "Step 1 made numbers that are no picture" in (job.error or "")
    pipe.transformer = FakeTransformer()
    pipe.image_value = torch.nan
    assert "decoder" in (wait(engine, submit(engine)).error or "")
    pipe.image_value = 0.5
    assert wait(engine, submit(engine)).state == "completed"


def test_a_hung_step_is_noticed(start: Any, capfd: pytest.CaptureFixture[str]) -> None:
    go_on = threading.Event()
    engine = start(lambda progress: FakePipeline(lambda index: go_on.wait(8)), step_limit=0.3)
    job, next_job = submit(engine), submit(engine)
    assert "no sign of life" in (wait(engine, job).error or "")
    go_on.set()
    assert wait(engine, next_job).state == "failed"
    assert engine.status.state == "broken"
    assert "most recent call first" in capfd.readouterr().err
    engine.start()
    assert engine.status.state == "broken", "only a new process helps"


def test_a_closed_run_waits_for_the_device() -> None:
    """Two pictures at once would be the alternative."""
    stuck, go_on = threading.Event(), threading.Event()
    pipe = FakePipeline(lambda index: stuck.set() or go_on.wait(5))  # type: ignore[func-returns-value]
    device = Device(pipe, device="cpu", step_limit=0.3)
    work = Engine(lambda progress: pipe, model="fake").submit(parse_request({"prompt": ""}), {}, {}).work
    run = device.run(work, lambda: False)
    next(run)
    assert stuck.wait(5)
    with pytest.raises(DeviceFault):
        run.close()
    go_on.set()
    pipe = FakePipeline(lambda index: time.sleep(0.05))
    run = Device(pipe, device="cpu").run(work, lambda: False)
    while next(run).step == 0:
        pass
    assert pipe.inside == 1
    run.close()
    assert pipe.inside == 0


@pytest.mark.parametrize(
    ("free_gb", "mode", "why"),
    [(50, "full", "all 36.0 GB"), (30, "staged", "24.0 GB, fits"), (10, "offload", "24.0 GB, does not fit")],
)
def test_auto_takes_the_fastest_mode_that_fits(
    monkeypatch: pytest.MonkeyPatch, free_gb: int, mode: str, why: str
) -> None:
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
    work = Engine(lambda progress: pipe, model="fake").submit(parse_request({"prompt": ""}), {}, {}).work
    if faults == 1:
        drawn = list(device.run(work, lambda: False))[-1]
        assert drawn.notes == ["Memory ran out in mode full; drawn in mode staged, which is slower."]
        assert drawn.memory == "staged"
        assert pipe.placed == ["full", "staged"]
    else:
        with pytest.raises(Exception, match="memory is too small"):
            list(device.run(work, lambda: False))
        assert pipe.placed == ["full", "staged", "full"]
    before = device.memory
    assert list(device.run(work, lambda: False))[-1].memory == before, "the next job starts where it worked"


def test_stopping_ends_the_running_job_and_takes_no_more(start: Any) -> None:
    engine = start(lambda progress: FakePipeline(lambda index: time.sleep(0.05)))
    running, waiting = submit(engine), submit(engine)
    wait(engine, running, "running")
    assert engine.stop(within=5)
    states = [wait(engine, running).state, wait(engine, waiting).state]
    assert states == ["completed", "cancelled"]
    with pytest.raises(Busy, match="stopping"):
        submit(engine)


def test_stopping_cancels_what_takes_too_long(start: Any) -> None:
    engine = start(lambda progress: FakePipeline(lambda index: time.sleep(0.1)))
    job = submit(engine, num_steps=50)
    wait(engine, job, "running")
    assert engine.stop(within=0.3)
    assert wait(engine, job).state == "cancelled"


def test_the_real_pipeline_survives_cancel_and_keep(start: Any) -> None:
    engine = start(lambda progress: load_pipeline("nano", progress=progress))
    dice = random.Random(0)
    for _ in range(6):
        job = submit(engine, num_steps=25)
        wait(engine, job, "running", seconds=60)
        time.sleep(dice.random() * 0.3)
        promised = engine.cancel(job.id)
        assert wait(engine, job).state == ("cancelled" if promised else "completed")
    job = submit(engine, num_steps=50)
    while wait(engine, job, "running").step < 3:
        time.sleep(0.01)
    engine.keep(job.id)
    first = wait(engine, job)
    assert first.result is not None
    pictures = []
    for _ in range(2):
        job = wait(engine, submit(engine, seed=5))
        assert job.result is not None
        pictures.append(Image.open(job.result.path).tobytes())
    assert pictures[0] == pictures[1]
