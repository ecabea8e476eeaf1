"""Jobs never get lost, doubled or stuck; the device never does two things at once."""

import asyncio
import io
import json
import random
import secrets
import shutil
import sqlite3
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
from uso.model.style_projector import StyleProjector
from uso.model.windows import Windows
from uso.schema import parse_request
from uso.serve import engine as engine_module
from uso.serve.engine import FINAL, Busy, Engine, Job, Origin
from uso.serve.files import Files, Picture
from uso.serve.store import Store


class FakePipeline:
    """Called like a `USOPipeline`; `step` is called in each step and may be made slow or faulty."""

    def __init__(self, step: Callable[[int], None] = lambda index: None) -> None:
        self.step = step
        self.inside = self.most_inside = 0
        self._interrupt = False
        self.transformer = FakeTransformer()
        self.vae = torch.nn.Linear(8, 8)
        self.vae.config = SimpleNamespace(block_out_channels=(8, 8))
        self.components: dict[str, Any] = {
            "transformer": self.transformer,
            "vae": self.vae,
            "style_projector": StyleProjector(16, 8, 4, 2, (-1, -2, -3)),
        }
        self.config = SimpleNamespace(max_sequence_length=8, native_scale=1.0, native_side=None)
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
                prediction = self.transformer(latents)[0]
                latents = latents + prediction
                self.step(index)
                tensors = {"latents": latents, "noise_pred": prediction}
                latents = rest["callback_on_step_end"](self, index, None, tensors)["latents"]
            assert rest["output_type"] == "pt"
            return SimpleNamespace(images=torch.full((1, 3, height, width), self.image_value))
        finally:
            self.inside -= 1

    def windows(self, width: int, height: int, *, content: bool) -> Windows:
        return Windows.over(width, height, scale=1.0, side=None)

    def fit(self, pixels: torch.Tensor, **shape: int) -> torch.Tensor:
        return pixels

    def encode_content(self, image: Image.Image, **rest: Any) -> torch.Tensor:
        return torch.rand(1, 16, image.height // 8, image.width // 8)

    def nothing(self, *args: Any, **rest: Any) -> None:
        pass

    set_progress_bar_config = remove_all_hooks = to = nothing


class FakeTransformer(torch.nn.Module):
    dtype = torch.float32
    is_cache_enabled = False
    config = SimpleNamespace(num_attention_heads=2, attention_head_dim=8, num_layers=1, num_single_layers=1)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(8, 8)])

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
    return engine.submit(request, {})


def stored(engine: Engine, width: int, height: int) -> Picture:
    png = io.BytesIO()
    Image.new("RGB", (width, height)).save(png, "PNG")
    return engine.files.keep_picture(png.getvalue(), field="content_image", owner="")


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
    subject = stored(engine, 300, 200)
    request = parse_request({"prompt": "a fox", "num_steps": 3})
    job = wait(engine, engine.submit(request, {"content_image": subject}))
    assert job.state == "completed"
    assert job.result is not None
    with Image.open(job.result.path) as picture:
        assert picture.size == (1024, 672)
    parameters = read_parameters(job.result.path)
    assert parameters == job.result.parameters
    assert parameters["seed"] == job.work.seed >= 0
    assert (parameters["width"], parameters["num_steps"], parameters["model"]) == (1024, 3, "fake")
    assert parameters["image_sha256"] == {"content_image": subject.file.sha256}
    assert list(job.result.seconds) == ["encoding", "drawing", "decoding"]
    assert job.work.content_image is None, "pictures are in memory only while they are looked at"
    assert job.logs == ("Encoding", "Drawing", "Step 1 of 3", "Step 2 of 3", "Step 3 of 3", "Decoding")


def test_a_size_that_cannot_be_is_refused_at_once(start: Any) -> None:
    engine = start(lambda progress: FakePipeline())
    with pytest.raises(InputError, match="too thin"):
        engine.submit(parse_request({"prompt": ""}), {"content_image": stored(engine, 800, 100)})


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
    assert len(remembered) == len(jobs) == 1000
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
    cost = engine.cost(first.request.model_copy(update={"num_steps": 4}), {})
    assert cost is not None
    assert seen[-1].result is not None
    assert cost.seconds == pytest.approx(4 / 6 * seen[-1].result.seconds["drawing"], abs=0.3)


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


@pytest.mark.parametrize("max_attempts", [1, 2])
def test_a_hung_step_is_noticed(start: Any, capfd: pytest.CaptureFixture[str], max_attempts: int) -> None:
    """What waits is left to the next process, and the job too, unless it was tried too often."""
    go_on = threading.Event()
    pipe = FakePipeline(lambda index: go_on.wait(60))
    engine = start(lambda progress: pipe, step_limit=0.3, max_attempts=max_attempts)
    job, next_job = submit(engine), submit(engine)
    while engine.status.state != "broken":
        time.sleep(0.01)
    assert "most recent call first" in capfd.readouterr().err
    ended = wait(engine, job, "queued")
    assert ended.state == ("failed" if max_attempts == 1 else "queued")
    assert ("no sign of life" in (ended.error or "")) == (max_attempts == 1)
    assert wait(engine, next_job, "queued").state == "queued"
    engine.start()
    assert engine.status.state == "broken", "only a new process helps"
    go_on.set()
    second = start(lambda progress: FakePipeline(), files=again(engine), max_attempts=max_attempts)
    assert {wait(second, each).state for each in (job, next_job)} == {ended.state, "completed"} - {"queued"}


def test_stopping_ends_the_running_job_and_takes_no_more(start: Any) -> None:
    engine = start(lambda progress: FakePipeline(lambda index: time.sleep(0.05)))
    running, waiting = submit(engine), submit(engine)
    wait(engine, running, "running")
    assert engine.stop(within=5)
    states = [wait(engine, running).state, wait(engine, waiting, "queued").state]
    assert states == ["completed", "queued"], "the next process draws what waits"
    with pytest.raises(Busy, match="stopping"):
        submit(engine)


def again(engine: Engine) -> Files:
    """The files of an engine, as the next process opens them."""
    return Files(Store(engine.files.store.folder))


def test_what_waits_is_taken_up_by_the_next_process(start: Any) -> None:
    """In its order; what took too long to end first, and that try does not count."""
    engine = start(lambda progress: FakePipeline(lambda index: time.sleep(0.1)), max_attempts=1)
    subject = stored(engine, 300, 200)
    request = parse_request({"prompt": "a fox", "num_steps": 50, "seed": 7})
    slow = engine.submit(request, {"content_image": subject}, Origin("page:me", batch="b"))
    others = [submit(engine, num_steps=1) for _ in range(3)]
    watched: list[str] = []

    async def watch() -> None:
        watched.extend([job.state async for job in engine.watch(slow.id)])

    watcher = threading.Thread(target=lambda: asyncio.run(watch()))
    watcher.start()
    wait(engine, slow, "running")
    assert engine.stop(within=0.3)
    watcher.join(5)
    assert watched[-1] == "queued", "whoever watches is let go"
    drawn: list[int] = []
    second = start(lambda progress: FakePipeline(drawn.append), max_attempts=1, files=again(engine))
    before = second.get(slow.id)
    assert before is not None
    assert (before.request, before.work, before.pictures) == (request, slow.work, slow.pictures)
    assert [wait(second, job).state for job in [slow, *others]] == ["completed"] * 4
    assert drawn == [*range(50), 0, 0, 0]
    assert second.batches("page:me") == [[slow.id]]
    third = start(lambda progress: FakePipeline(), files=again(engine))
    finished = third.get(slow.id)
    assert finished is not None
    assert finished.result is not None
    assert finished.result == (second.get(slow.id) or slow).result
    assert read_parameters(finished.result.path)["seed"] == 7


def crash(engine: Engine, job: Job) -> Files:
    """What a process leaves that ends at once, with `job` running: a copy of its data as it is now."""
    wait(engine, job, "running")
    folder = engine.files.store.folder
    copy = folder.parent / f"{folder.name}-{secrets.token_hex(4)}"
    copy.mkdir()
    with engine.files.store.transaction() as db:
        db.execute("SELECT 1")
        for path in folder.glob("uso.db*"):
            shutil.copy(path, copy)
    return Files(Store(copy))


def test_a_crash_costs_an_attempt_and_too_many_end_the_job(start: Any) -> None:
    go_on = threading.Event()
    pipe = FakePipeline(lambda index: go_on.wait(10))
    engine = start(lambda progress: pipe, max_attempts=2)
    job, cancelled = submit(engine), submit(engine)
    second = start(lambda progress: pipe, max_attempts=2, files=crash(engine, job))
    third = start(lambda progress: FakePipeline(), max_attempts=2, files=crash(second, job))
    ended = wait(third, job)
    assert (ended.state, ended.attempts) == ("failed", 2)
    assert "ended 2 times" in (ended.error or "")
    assert wait(third, cancelled).state == "completed"
    engine.cancel(job.id)
    fourth = start(lambda progress: FakePipeline(), files=crash(engine, job))
    assert wait(fourth, job).state == "cancelled", "a promise holds beyond the process"
    go_on.set()


def test_the_device_rests_once_there_is_nothing_to_draw(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rests, rested = [], threading.Event()

    def give_back() -> None:
        rests.append(engine.waiting)
        rested.set()

    monkeypatch.setattr(engine_module, "REST_SECONDS", 0.2)
    monkeypatch.setattr("uso.serve.device.give_back", give_back)
    go_on = threading.Event()
    engine = start(lambda progress: FakePipeline(lambda index: go_on.wait(5)))  # type: ignore[func-returns-value]
    for _ in range(2):
        jobs = [submit(engine) for _ in range(3)]
        time.sleep(0.5)
        assert not rested.is_set(), "others wait, or one is drawn"
        go_on.set()
        for job in jobs:
            assert wait(engine, job).state == "completed"
        assert rested.wait(10)
        go_on.clear()
        rested.clear()
    time.sleep(0.5)
    assert rests == [0, 0], "once"


def test_a_full_disk_loses_nothing(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "RETRY_SECONDS", 0.05)
    begun, go_on = threading.Event(), threading.Event()
    engine = start(lambda progress: FakePipeline(lambda index: begun.set() or go_on.wait(5)))  # type: ignore[func-returns-value]
    job = submit(engine)
    assert begun.wait(10)
    update = engine_module._update
    failures = iter(range(3))

    def full(*args: Any) -> None:
        if next(failures, None) is not None:
            raise sqlite3.OperationalError("database or disk is full")
        update(*args)

    monkeypatch.setattr(engine_module, "_update", full)
    go_on.set()
    assert wait(engine, job).state == "completed"
    assert next(failures, None) is None


def test_a_webhook_is_due_exactly_when_the_job_has_ended(start: Any) -> None:
    engine = start(lambda progress: FakePipeline())
    request = parse_request({"prompt": "", "num_steps": 1})
    origin = Origin(webhook="https://example.com/hook", base_url="http://here", session_id="sess_1")
    jobs = [wait(engine, engine.submit(request, {}, origin)) for _ in range(2)]
    rows = engine.files.store.all("SELECT * FROM outbox ORDER BY created_at")
    assert [row["task_id"] for row in rows] == [job.id for job in jobs]
    assert len({row["id"] for row in rows}) == 2
    told = json.loads(rows[0]["body"])
    assert told["output"]["generated_image"]["uri"].startswith("http://here/files/")
    assert (told["status"], told["session_id"], rows[0]["next_try_at"]) == (9, "sess_1", jobs[0].updated_at)


def test_what_is_past_its_time_is_forgotten(start: Any) -> None:
    engine = start(lambda progress: FakePipeline())
    old, new = (wait(engine, submit(engine)) for _ in range(2))
    assert old.result is not None
    assert new.result is not None
    long_ago = time.time() - engine.files.keep_seconds - 1
    with engine.files.store.transaction() as db:
        db.execute("UPDATE files SET created_at = ? WHERE id = ?", (long_ago, old.result.file.id))
        db.execute("UPDATE tasks SET updated_at = ? WHERE id = ?", (long_ago, old.id))
    del engine._finished[old.id]
    assert engine.get(old.id), "in memory as it is in the store"
    engine.sweep()
    assert engine.get(old.id) is None
    assert not old.result.path.exists()
    assert engine.get(new.id) == new
    assert new.result.path.exists()


def test_what_comes_with_a_job_is_stored_with_it_or_not_at_all(start: Any) -> None:
    engine = start(lambda progress: FakePipeline())

    def refuse(db: sqlite3.Connection, job_id: str) -> None:
        db.execute("INSERT INTO idempotency VALUES ('', 'key', '', ?, 0)", (job_id,))
        raise Busy("not now")

    with pytest.raises(Busy, match="not now"):
        engine.submit(parse_request({"prompt": ""}), {}, within=refuse)
    assert engine.files.store.all("SELECT id FROM tasks") == []
    assert engine.files.store.all("SELECT key FROM idempotency") == []
    assert engine.waiting == 0


def test_a_picture_that_was_deleted_fails_its_job_alone(start: Any) -> None:
    go_on = threading.Event()
    engine = start(lambda progress: FakePipeline(lambda index: go_on.wait(5)))
    submit(engine)
    subject = stored(engine, 300, 200)
    job = engine.submit(parse_request({"prompt": ""}), {"content_image": subject})
    assert not engine.files.delete(subject.file.id), "a job needs it"
    engine.files.path(subject.file.id).unlink()
    go_on.set()
    assert "`content_image` is not on the server any more" in (wait(engine, job).error or "")
    assert wait(engine, submit(engine)).state == "completed"
    assert engine.delete(job.id)
    assert engine.get(job.id) is None


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
