"""Jobs: what was asked, where each stands and what came of it; one worker thread that owns the device.

A job belongs to the server: whoever knows its id may watch it, cancel it or keep what is there, and nobody's
leaving stops it. Its state changes only by compare-and-set under one lock. Imports no torch: the worker does,
while the page is already up.
"""

import asyncio
import itertools
import logging
import secrets
import tempfile
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from uso.errors import Cancelled, USOError
from uso.metadata import describe, save_png
from uso.schema import GenerationRequest, draw_seed, resolve_size
from uso.serve.work import Drawn, Event, Phase, Progress, Work

logger = logging.getLogger(__name__)

State = Literal["queued", "running", "completed", "failed", "cancelled"]
Stop = Literal["cancel", "keep"]
FINAL: tuple[State, ...] = ("completed", "failed", "cancelled")
KEPT_JOBS = 200  # finished jobs, with their pictures on disk, that can still be asked for
WATCH_SECONDS = 0.2

LoadProgress = Callable[[str, float], None]


class Busy(USOError):
    """No job can be taken now: the queue is full, or the server stops or has no model."""


@dataclass(frozen=True)
class Result:
    """A finished picture: its PNG, its parameters as executed, and how it went.

    `seconds` by phase.
    """

    path: Path
    parameters: dict[str, Any]
    seconds: dict[Phase, float]
    memory: str


@dataclass(frozen=True)
class Job:
    """A job at one moment; a change makes a new one with the next `version`. `notes` are for the user."""

    id: str
    request: GenerationRequest
    work: Work
    image_sha256: Mapping[str, str]
    notes: tuple[str, ...] = ()
    state: State = "queued"
    version: int = 0
    phase: Phase = "encoding"
    step: int = 0
    seconds_left: float | None = None
    preview: str | None = None
    stop: Stop | None = None
    error: str | None = None
    result: Result | None = None

    @property
    def done(self) -> bool:
        return self.state in FINAL


@dataclass(frozen=True)
class Status:
    """The engine itself: `text` says what it does, or what is wrong and what to do.

    "failed" loading can be tried again; a "broken" device needs a new process.
    """

    state: Literal["loading", "ready", "failed", "broken", "stopping"] = "loading"
    text: str = "Loading the model"
    fraction: float = 0.0
    memory: str = ""


@dataclass(frozen=True)
class _Pace:
    """How long the last picture took, to say how long others will."""

    step_pixel: float  # seconds a step takes per pixel of the picture
    rest: float  # seconds of encoding and decoding
    decoding: float

    @classmethod
    def of(cls, work: Work, drawn: Drawn) -> "_Pace":
        seconds = drawn.seconds
        step_pixel = seconds["drawing"] / drawn.steps / (work.width * work.height)
        return cls(step_pixel, seconds["encoding"] + seconds["decoding"], seconds["decoding"])


class Engine:
    """Takes jobs, runs them one by one, tells where they stand.

    Args:
        load: makes the pipeline; called in the worker with `progress(text, fraction)`.
        model: the model's name, for the pictures' parameters.
        queue_limit: jobs that may wait.
        device, memory, step_limit: see `uso.serve.device.Device`.
    """

    def __init__(
        self,
        load: Callable[[LoadProgress], Any],
        *,
        model: str,
        queue_limit: int = 32,
        device: str = "auto",
        memory: str = "auto",
        step_limit: float = 600.0,
    ) -> None:
        self.model = model
        self.queue_limit = queue_limit
        self._load_pipeline = load
        self._placement: dict[str, Any] = {"device": device, "memory": memory, "step_limit": step_limit}
        self._device: Any = None
        self._status = Status()
        self._jobs: dict[str, Job] = {}
        self._queue: deque[str] = deque()
        self._pace: _Pace | None = None
        self._stopping = False
        self._changed = threading.Condition(threading.RLock())
        self._folder = tempfile.TemporaryDirectory(prefix="uso-results-", ignore_cleanup_errors=True)
        self._worker: threading.Thread | None = None

    # What anybody may ask, from any thread

    @property
    def status(self) -> Status:
        return self._status

    def start(self) -> None:
        """Begin to load in the background, or again after a failed load; jobs may be submitted at once."""
        with self._changed:
            if self._worker is not None and self._status.state != "failed":
                return
            self._status = Status()
            self._worker = threading.Thread(target=self._work, name="uso-engine", daemon=True)
            self._worker.start()

    def submit(
        self,
        request: GenerationRequest,
        pictures: Mapping[str, Image.Image],
        image_sha256: Mapping[str, str],
    ) -> Job:
        """Queue a picture; `pictures` and the hashes of their files by request field.

        Raises:
            InputError: the size cannot follow the subject's shape.
            Busy: try later.
        """
        content = pictures.get("content_image")
        size = resolve_size(
            width=request.width,
            height=request.height,
            keep_size=request.keep_size,
            content_size=content.size if content else None,
        )
        seed = draw_seed(request.seed)
        work = Work.of(request, pictures, width=size.width, height=size.height, seed=seed)
        notes = (size.note,) if size.note else ()
        job = Job(secrets.token_urlsafe(12), request, work, image_sha256, notes)
        with self._changed:
            if self._status.state not in ("loading", "ready"):
                raise Busy(self._status.text)
            if len(self._queue) >= self.queue_limit:
                raise Busy(
                    f"{len(self._queue)} pictures wait already, the limit is {self.queue_limit}: try later."
                )
            self._jobs[job.id] = job
            self._queue.append(job.id)
            self._changed.notify_all()
        return job

    def get(self, job_id: str) -> Job | None:
        return self._jobs.get(job_id)

    def position(self, job_id: str) -> int:
        """How many jobs come first; 0 is running or next."""
        with self._changed:
            running = any(job.state == "running" for job in self._jobs.values())
            return self._queue.index(job_id) + running if job_id in self._queue else 0

    def seconds_until(self, job_id: str) -> float | None:
        """Estimated wait before a queued job begins; None while nothing was measured."""
        with self._changed:
            if self._pace is None or job_id not in self._queue:
                return None
            ahead = list(itertools.takewhile(lambda other: other != job_id, self._queue))
            running = [job for job in self._jobs.values() if job.state == "running"]
            return sum(self._estimate(other) for other in ahead) + sum(
                job.seconds_left or 0 for job in running
            )

    def estimate(self, width: int, height: int, num_steps: int) -> float | None:
        """Seconds a picture takes by what was measured; None before the first."""
        if (pace := self._pace) is None:
            return None
        return pace.rest + pace.step_pixel * num_steps * width * height

    def _estimate(self, job_id: str) -> float:
        work = self._jobs[job_id].work
        return self.estimate(work.width, work.height, work.num_steps) or 0.0

    @property
    def waiting(self) -> int:
        """Jobs queued or running."""
        with self._changed:
            return len(self._queue) + any(job.state == "running" for job in self._jobs.values())

    def cancel(self, job_id: str) -> bool:
        """True: the job is or will be cancelled and gives no picture. False: it has ended, or is unknown."""
        with self._changed:
            if self._set(job_id, "queued", state="cancelled", stop="cancel"):
                self._queue.remove(job_id)
                return True
            return self._set(job_id, "running", stop="cancel")

    def keep(self, job_id: str) -> bool:
        """Stop after this step and make the picture of what is there; False unless it is being drawn."""
        with self._changed:
            job = self._jobs.get(job_id)
            return job is not None and job.stop is None and self._set(job_id, "running", stop="keep")

    async def watch(self, job_id: str) -> AsyncIterator[Job]:
        """The job now and after each change, fast ones in one, until it has ended. Any number may watch."""
        version = -1
        while (job := self.get(job_id)) is not None:
            if job.version != version:
                version = job.version
                yield job
                if job.done:
                    return
            await asyncio.sleep(WATCH_SECONDS)

    def stop(self, *, within: float) -> bool:
        """Take no more jobs, cancel the waiting, give the running one `within` seconds; True if all ended."""
        with self._changed:
            self._stopping = True
            self._status = replace(
                self._status, state="stopping", text="The server is stopping: try again later."
            )
            for job_id in list(self._queue):
                self._queue.remove(job_id)
                self._set(job_id, "queued", state="cancelled", error="The server was stopped.")
            self._changed.notify_all()
            worker = self._worker
        if worker is None:
            return True
        worker.join(within)
        if worker.is_alive():
            for job in list(self._jobs.values()):
                self.cancel(job.id)
            worker.join(within)
        return not worker.is_alive()

    # The unit of work

    def run(
        self, work: Work, cancelled: Callable[[], bool], *, keep: Callable[[], bool] = lambda: False
    ) -> Iterator[Event]:
        """Draw on the device, see `Device.run`. One at a time: the worker runs one job after another."""
        return self._device.run(work, cancelled, keep=keep)

    # The worker

    def _work(self) -> None:
        if not self._load():
            return
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._stopping)
                if self._stopping:
                    return
                job_id = self._queue.popleft()
                self._set(job_id, "queued", state="running")
            if not self._execute(job_id):
                return

    def _load(self) -> bool:
        from uso.serve.device import Device  # imports torch for seconds; the page is up meanwhile

        began = time.monotonic()
        try:
            self._device = device = Device(self._load_pipeline(self._report_loading), **self._placement)
        except Exception as error:
            logger.exception("The model could not be loaded")
            self._give_up("failed", f"The model could not be loaded. {_sentence(error)}")
            return False
        memory = f"{device.device.type}, memory mode {device.memory}: {device.why}"
        logger.info("Loaded %s in %.1f s (%s)", self.model, time.monotonic() - began, memory)
        with self._changed:
            if not self._stopping:
                self._status = Status("ready", "Ready", 1.0, memory)
        return True

    def _report_loading(self, text: str, fraction: float) -> None:
        with self._changed:
            if not self._stopping:
                self._status = Status("loading", text, fraction)

    def _execute(self, job_id: str) -> bool:
        """Run one job to its end; False when the device is of no use any more."""
        from uso.serve.device import DeviceFault

        work = self._jobs[job_id].work
        began = time.monotonic()
        try:
            for event in self.run(
                work,
                lambda: self._jobs[job_id].stop == "cancel",
                keep=lambda: self._jobs[job_id].stop == "keep",
            ):
                if isinstance(event, Drawn):
                    self._complete(job_id, event)
                    continue
                if event.step == 0:
                    began = time.monotonic()
                self._report(job_id, event, time.monotonic() - began)
        except Cancelled:
            self._finish(job_id, state="cancelled")
        except DeviceFault as error:
            self._finish(job_id, state="failed", error=str(error))
            self._give_up("broken", str(error))
            return False
        except Exception as error:
            logger.exception("Job %s failed", job_id)
            self._finish(job_id, state="failed", error=_sentence(error))
        return True

    def _report(self, job_id: str, event: Progress, seconds: float) -> None:
        """`seconds` were spent on the steps so far; before the first, the last picture's pace counts."""
        job = self._jobs[job_id]
        decoding = self._pace.decoding if self._pace else 0.0
        if event.phase == "decoding":
            left: float | None = decoding
        elif event.step == 0:
            left = self._estimate(job_id) or None
        else:
            left = seconds / event.step * (job.work.num_steps - event.step) + decoding
        self._set(
            job_id,
            "running",
            phase=event.phase,
            step=event.step,
            seconds_left=left,
            preview=event.preview or job.preview,
        )

    def _complete(self, job_id: str, drawn: Drawn) -> None:
        job, work = self._jobs[job_id], self._jobs[job_id].work
        notes = [*job.notes, *drawn.notes]
        parameters = describe(
            job.request,
            width=work.width,
            height=work.height,
            seed=work.seed,
            model=self.model,
            image_sha256=job.image_sha256,
        )
        if drawn.steps < work.num_steps:
            parameters["stopped_at_step"] = drawn.steps
            notes.append(f"Stopped after {drawn.steps} of {work.num_steps} steps.")
        path = Path(self._folder.name) / f"uso-{job_id}.png"
        save_png(drawn.image, path, parameters)
        self._pace = _Pace.of(work, drawn)
        result = Result(path, parameters, drawn.seconds, drawn.memory)
        self._finish(job_id, state="completed", result=result, notes=tuple(notes))

    def _finish(self, job_id: str, *, state: State, **changes: Any) -> None:
        """End a running job. A cancel that was promised holds, even if the picture was finished meanwhile."""
        with self._changed:
            if self._jobs[job_id].stop == "cancel":
                state, changes = "cancelled", {}
            self._set(job_id, "running", state=state, preview=None, seconds_left=None, **changes)

    def _give_up(self, state: Literal["failed", "broken"], text: str) -> None:
        with self._changed:
            self._status = Status(state, text)
            while self._queue:
                self._set(self._queue.popleft(), "queued", state="failed", error=text)

    def _set(self, job_id: str, expected: State, **changes: Any) -> bool:
        """Change a job if it is in the `expected` state; the only place where one changes."""
        with self._changed:
            job = self._jobs.get(job_id)
            if job is None or job.state != expected:
                return False
            job = replace(job, version=job.version + 1, **changes)
            if job.done:
                job = replace(job, work=replace(job.work, content_image=None, style_images=()))
            self._jobs[job_id] = job
            if job.done:
                self._forget_oldest()
            self._changed.notify_all()
            return True

    def _forget_oldest(self) -> None:
        done = [job for job in self._jobs.values() if job.done]
        for job in done[:-KEPT_JOBS]:
            if job.result:
                job.result.path.unlink(missing_ok=True)
            del self._jobs[job.id]


def _sentence(error: Exception) -> str:
    """Our own errors speak to people; of others they get the kind, and the log has the rest."""
    return str(error) if isinstance(error, USOError) else f"{type(error).__name__}: {error}"
