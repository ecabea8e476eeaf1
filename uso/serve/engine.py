"""Jobs: what was asked, where each stands and what came of it; one worker thread that owns the device.

A job belongs to the server: whoever knows its id may watch it, cancel it or keep what is there, and nobody's
leaving stops it. Its state changes only by compare-and-set under one lock, in the store first: what a process
left queued or running, the next one takes up. Imports no torch: the worker does, the page is up by then.
"""

import asyncio
import contextlib
import io
import itertools
import json
import logging
import math
import secrets
import sqlite3
import tempfile
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from uso.errors import Cancelled, USOError
from uso.metadata import describe, save_png
from uso.schema import GenerationRequest, draw_seed, parse_request, resolve_size
from uso.serve.cost import Calibration, Cost
from uso.serve.files import Files, Picture, StoredFile
from uso.serve.store import Store, is_full
from uso.serve.webhooks import payload
from uso.serve.work import Drawn, Event, Phase, Progress, Sizes, Work

logger = logging.getLogger(__name__)

State = Literal["queued", "running", "completed", "failed", "cancelled"]
Stop = Literal["cancel", "keep"]
FINAL: tuple[State, ...] = ("completed", "failed", "cancelled")
REMEMBERED_JOBS = 1000  # finished jobs held in memory; all are in the store
WATCH_SECONDS = 0.2
RETRY_SECONDS = 1.0  # between tries to write to a store that fails, for a full disk
REST_SECONDS = 60.0  # without a job, after which the device gives memory back

LoadProgress = Callable[[str, float], None]


class Busy(USOError):
    """No job can be taken now: the server stops or has no model. Try again after `retry_after` seconds."""

    def __init__(self, message: str, *, retry_after: float = 30.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class QueueFull(Busy):
    """Too many jobs wait already."""


@dataclass(frozen=True)
class Origin:
    """Who asked for a job and who is to be told: see the table of tasks in `uso.serve.store`."""

    owner: str = ""
    batch: str | None = None
    session_id: str | None = None
    webhook: str | None = None
    base_url: str = ""
    legacy: bool = False


@dataclass(frozen=True)
class Result:
    """A finished picture: its PNG at `path`, its parameters as executed, and how it went.

    `seconds` by phase.
    """

    path: Path
    parameters: dict[str, Any]
    seconds: dict[Phase, float]
    memory: str
    file: StoredFile

    def output(self, base_url: str) -> dict[str, Any]:
        """What the hosted app puts out, and what we add; `base_url` is ours, as the client knows it."""
        return {
            "generated_image": self.file.described(base_url),
            "seed": self.parameters["seed"],
            "width": self.parameters["width"],
            "height": self.parameters["height"],
            "timings": {phase: round(seconds, 3) for phase, seconds in self.seconds.items()},
        }


@dataclass(frozen=True)
class Job:
    """A job at one moment; a change makes a new one with the next `version`.

    `notes` are for the user, `logs` tell what was done, a line a step. Times are seconds since 1970.
    """

    id: str
    request: GenerationRequest
    work: Work
    pictures: Mapping[str, Picture] = field(default_factory=dict)
    origin: Origin = Origin()
    notes: tuple[str, ...] = ()
    state: State = "queued"
    version: int = 0
    attempts: int = 0
    phase: Phase = "encoding"
    step: int = 0
    seconds_left: float | None = None
    preview: str | None = None
    stop: Stop | None = None
    logs: tuple[str, ...] = ()
    error: str | None = None
    result: Result | None = None
    created_at: float = 0.0
    updated_at: float = 0.0

    @property
    def done(self) -> bool:
        return self.state in FINAL

    @property
    def progress(self) -> int:
        """Percent of the steps that are drawn."""
        return 100 if self.state == "completed" else 100 * self.step // self.work.num_steps


@dataclass(frozen=True)
class Status:
    """The engine itself: `text` says what it does, or what is wrong and what to do.

    "failed" loading can be tried again; a "broken" device needs a new process, which draws what waits.
    """

    state: Literal["loading", "ready", "failed", "broken", "stopping"] = "loading"
    text: str = "Loading the model"
    fraction: float = 0.0
    memory: str = ""


class Engine:
    """Takes jobs, runs them one by one, tells where they stand.

    Args:
        load: makes the pipeline; called in the worker with `progress(text, fraction)`.
        model: the model's name, for the pictures' parameters.
        files: where jobs last, and their pictures; left out, a folder that goes with the engine.
        queue_limit: jobs that may wait.
        max_attempts: how often a job is begun, when the server ends while it runs.
        device, memory, step_limit: see `uso.serve.device.Device`.
        lossy: `Settings.lossy`.
    """

    def __init__(
        self,
        load: Callable[[LoadProgress], Any],
        *,
        model: str,
        files: Files | None = None,
        queue_limit: int = 32,
        max_attempts: int = 3,
        device: str = "auto",
        memory: str = "auto",
        step_limit: float = 600.0,
        lossy: Mapping[str, Any] = {},
    ) -> None:
        self.model = model
        self.queue_limit = queue_limit
        self.max_attempts = max_attempts
        self._load_pipeline = load
        self._lossy = dict(lossy)
        self._placement: dict[str, Any] = {
            "device": device, "memory": memory, "step_limit": step_limit, "turbo": "turbo" in lossy,
        }  # fmt: skip
        self._device: Any = None
        self._status = Status()
        if files is None:
            self._folder = tempfile.TemporaryDirectory(prefix="uso-", ignore_cleanup_errors=True)
            files = Files(Store(Path(self._folder.name)))
        self.files = files
        self._store = files.store
        self._jobs: dict[str, Job] = {}  # queued and running
        self._finished: OrderedDict[str, Job] = OrderedDict()
        self._queue: deque[str] = deque()
        self._watchers: dict[str, set[Callable[[], object]]] = {}
        self._calibration = Calibration(self._store.folder / "calibration.json")
        self._stopping = False
        self._out_of_time = False
        self._changed = threading.Condition(threading.RLock())
        self._worker: threading.Thread | None = None
        self._take_up()

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
        pictures: Mapping[str, Picture],
        origin: Origin = Origin(),
        *,
        within: Callable[[sqlite3.Connection, str], None] = lambda db, job_id: None,
    ) -> Job:
        """Queue a picture; `pictures` by request field. It is in the store when this returns.

        `within` is called with the job's id in the transaction that stores it; what it raises undoes both.

        Raises:
            InputError: the size cannot follow the subject's shape.
            Busy: try later.
        """
        work, note = _settled(request, _sizes(pictures))
        now = time.time()
        job = Job(
            secrets.token_urlsafe(12),
            request,
            work,
            dict(pictures),
            origin,
            (note,) if note else (),
            created_at=now,
            updated_at=now,
        )
        with self._changed:
            self.check_open()
            with self._store.transaction() as db:
                _insert(db, job)
                within(db, job.id)
            self._jobs[job.id] = job
            self._queue.append(job.id)
            self._changed.notify_all()
        return job

    def check_open(self) -> None:
        """Raise Busy when a job could not be taken now."""
        with self._changed:
            if self._status.state not in ("loading", "ready"):
                raise Busy(self._status.text)
            if len(self._queue) >= self.queue_limit:
                raise QueueFull(
                    f"{len(self._queue)} pictures wait already, the limit is {self.queue_limit}: try later.",
                    retry_after=self.seconds_until_room(),
                )

    def seconds_until_room(self) -> float:
        """When the next queued job probably begins, and leaves its place in the queue."""
        with self._changed:
            running = next((job for job in self._jobs.values() if job.state == "running"), None)
            if running is None:
                return 1.0
            return max(running.seconds_left or self._seconds(running) or 10.0, 1.0)

    def get(self, job_id: str) -> Job | None:
        """A job of this or a former process, unless it was deleted."""
        job = self._jobs.get(job_id) or self._finished.get(job_id)
        if job is None:
            with self._changed:  # or it could be changed or deleted while its row is read
                job = self._jobs.get(job_id) or self._finished.get(job_id)
                if job is None and (row := self._store.one("SELECT * FROM tasks WHERE id = ?", job_id)):
                    job = self._remember(self._of_row(row))
        return job

    def batches(self, owner: str) -> list[list[str]]:
        """Ids of an owner's jobs, oldest first, those of one batch together."""
        rows = self._store.all("SELECT id, batch FROM tasks WHERE owner = ? ORDER BY number", owner)
        grouped = itertools.groupby(rows, key=lambda row: row["batch"])
        return [[row["id"] for row in batch] for _, batch in grouped]

    def delete(self, job_id: str) -> bool:
        """Forget a job that has ended; False while it has not. Its files stay."""
        with self._changed:
            if job_id in self._jobs:
                return False
            with self._store.transaction() as db:
                db.execute("DELETE FROM tasks WHERE id = ?", (job_id,))
            self._finished.pop(job_id, None)
        return True

    def sweep(self) -> None:
        """Forget the jobs and files that are past their time, see `Files.sweep`."""
        self.files.sweep()
        expired = time.time() - self.files.keep_seconds
        with self._changed:
            for job in [job for job in self._finished.values() if job.updated_at < expired]:
                del self._finished[job.id]

    def position(self, job_id: str) -> int:
        """How many jobs come first; 0 is running or next."""
        with self._changed:
            running = any(job.state == "running" for job in self._jobs.values())
            return self._queue.index(job_id) + running if job_id in self._queue else 0

    def seconds_until(self, job_id: str) -> float | None:
        """Estimated wait before a queued job begins; None while nothing was measured."""
        with self._changed:
            if job_id not in self._queue:
                return None
            ahead = [
                self._seconds(self._jobs[other])
                for other in itertools.takewhile(lambda other: other != job_id, self._queue)
            ]
            running = [job.seconds_left for job in self._jobs.values() if job.state == "running"]
            return sum(seconds or 0.0 for seconds in ahead + running) or None

    def cost(self, request: GenerationRequest, sizes: Sizes) -> Cost | None:
        """What a picture will cost, by what others did on this device; None until the model is loaded.

        `sizes` are the (width, height) of its pictures, by request field. Raises InputError as `submit`.
        """
        return self._cost(_settled(request, sizes)[0], sizes)

    def _cost(self, work: Work, sizes: Sizes) -> Cost | None:
        if (device := self._device) is None:
            return None
        name = f"{self.model} on {device.name}"
        return self._calibration.predict(name, device.demand(work, sizes), device.in_use)

    def _seconds(self, job: Job) -> float | None:
        cost = self._cost(job.work, _sizes(job.pictures))
        return cost.seconds if cost else None

    @property
    def waiting(self) -> int:
        """Jobs queued or running."""
        with self._changed:
            return len(self._queue) + any(job.state == "running" for job in self._jobs.values())

    def cancel(self, job_id: str) -> bool:
        """True: the job is or will be cancelled and gives no picture. False: it has ended, or is unknown."""
        with self._changed:
            return self._set(job_id, "queued", state="cancelled", stop="cancel") or self._set(
                job_id, "running", stop="cancel"
            )

    def keep(self, job_id: str) -> bool:
        """Stop after this step and make the picture of what is there; False unless it is being drawn."""
        with self._changed:
            job = self._jobs.get(job_id)
            return job is not None and job.stop is None and self._set(job_id, "running", stop="keep")

    async def watch(self, job_id: str, *, repeat: float = math.inf) -> AsyncIterator[Job]:
        """The job now and after each change, fast ones in one, until it has ended or the server stops.

        Any number may watch. Without a change it comes again after `repeat` seconds.
        """
        ended, loop = asyncio.Event(), asyncio.get_running_loop()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody watches any more
                loop.call_soon_threadsafe(ended.set)

        with self._changed:
            self._watchers.setdefault(job_id, set()).add(wake)
        try:
            version, told = -1, 0.0
            while (job := self.get(job_id)) is not None:
                if job.version != version or time.monotonic() - told >= repeat:
                    version, told = job.version, time.monotonic()
                    yield job
                if job.done or (self._status.state in ("stopping", "broken") and job.state == "queued"):
                    return
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(ended.wait(), WATCH_SECONDS)
                ended.clear()
        finally:
            with self._changed:
                self._watchers[job_id].discard(wake)
                if not self._watchers[job_id]:
                    del self._watchers[job_id]

    def stop(self, *, within: float) -> bool:
        """Take and begin no more jobs, give the running one `within` seconds; True if the device is at rest.

        What waits, and what does not end in time, stays queued in the store for the next process.
        """
        with self._changed:
            self._stopping = True
            self._status = replace(
                self._status, state="stopping", text="The server is stopping: try again later."
            )
            self._changed.notify_all()
            worker = self._worker
        if worker is None:
            return True
        worker.join(within)
        if worker.is_alive():
            self._out_of_time = True
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

        def wanted() -> bool:
            return bool(self._queue) or self._stopping

        while True:
            with self._changed:
                if not self._changed.wait_for(wanted, REST_SECONDS):
                    self._device.rest()
                    self._changed.wait_for(wanted)
                if self._stopping:
                    return
                job_id = self._queue[0]
                attempts = self._jobs[job_id].attempts + 1
            if self._persist(job_id, "queued", state="running", attempts=attempts) and not self._execute(
                job_id
            ):
                return

    def _load(self) -> bool:
        from uso.serve.device import Device  # imports torch for seconds; the page is up meanwhile

        began = time.monotonic()
        try:
            self._device = device = Device(self._load_pipeline(self._report_loading), **self._placement)
            self._report_loading("Compiling", 1.0)
            device.compile()
        except Exception as error:
            logger.exception("The model could not be loaded")
            self._give_up(f"The model could not be loaded. {_sentence(error)}")
            return False
        logger.info("Loaded %s in %.1f s (%s)", self.model, time.monotonic() - began, device.placement)
        with self._changed:
            if not self._stopping:
                self._status = Status("ready", "Ready", 1.0, device.placement)
        return True

    def _report_loading(self, text: str, fraction: float) -> None:
        with self._changed:
            if not self._stopping:
                self._status = Status("loading", text, fraction)

    def _execute(self, job_id: str) -> bool:
        """Run one job to its end; False when the device is of no use any more."""
        from uso.serve.device import DeviceFault

        job = self._jobs[job_id]
        began = time.monotonic()
        try:
            pictures = {name: self.files.open(picture, field=name) for name, picture in job.pictures.items()}
            work = Work.of(
                job.request, pictures, width=job.work.width, height=job.work.height, seed=job.work.seed
            )
            for event in self.run(
                work,
                lambda: self._out_of_time or self._jobs[job_id].stop == "cancel",
                keep=lambda: self._jobs[job_id].stop == "keep",
            ):
                if isinstance(event, Drawn):
                    self._complete(job_id, event)
                    continue
                if event.step == 0:
                    began = time.monotonic()
                self._report(job_id, event, time.monotonic() - began)
        except Cancelled:
            if not self._requeue(job_id, attempts=job.attempts - 1):  # this one does not count
                self._finish(job_id, state="cancelled")
        except DeviceFault as error:
            logger.error("%s", error)
            with self._changed:
                self._status = Status("broken", str(error))
            if job.attempts >= self.max_attempts or not self._requeue(job_id, attempts=job.attempts):
                self._finish(job_id, state="failed", error=str(error))
            return False
        except Exception as error:
            logger.exception("Job %s failed", job_id)
            self._finish(job_id, state="failed", error=_sentence(error))
        return True

    def _report(self, job_id: str, event: Progress, seconds: float) -> None:
        """`seconds` were spent on the steps so far; before the first, the last picture's pace counts."""
        job = self._jobs[job_id]
        cost = self._cost(job.work, _sizes(job.pictures))
        decoding = cost.phases["decoding"] if cost and cost.phases else 0.0
        if event.phase == "decoding":
            left: float | None = decoding
        elif event.step == 0:
            left = cost.seconds if cost else None
        else:
            left = seconds / event.step * (job.work.num_steps - event.step) + decoding
        drawing = event.phase == "drawing" and event.step > 0
        line = f"Step {event.step} of {job.work.num_steps}" if drawing else event.phase.capitalize()
        self._set(
            job_id,
            "running",
            phase=event.phase,
            step=event.step,
            seconds_left=left,
            preview=event.preview or job.preview,
            logs=job.logs if job.logs[-1:] == (line,) else (*job.logs, line),
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
            image_sha256={name: picture.file.sha256 for name, picture in job.pictures.items()},
            lossy=self._lossy,
        )
        if drawn.steps < work.num_steps:
            parameters["stopped_at_step"] = drawn.steps
            notes.append(f"Stopped after {drawn.steps} of {work.num_steps} steps.")
        png = io.BytesIO()
        save_png(drawn.image, png, parameters)
        file = self.files.write(png.getvalue(), filename="generated_image.png", content_type="image/png")
        demand = replace(self._device.demand(work, _sizes(job.pictures)), steps=drawn.steps)
        self._calibration.learn(f"{self.model} on {self._device.name}", demand, drawn.seconds, drawn.peak)
        with self._changed:  # memory may have run out
            self._status = replace(self._status, memory=self._device.placement)
        result = Result(self.files.path(file.id), parameters, drawn.seconds, drawn.memory, file)
        self._finish(job_id, state="completed", result=result, notes=tuple(notes))

    def _finish(self, job_id: str, *, state: State, **changes: Any) -> None:
        self._persist(job_id, "running", state=state, **changes)

    def _requeue(self, job_id: str, *, attempts: int) -> bool:
        """Give a running job back, for the next process. False if it was cancelled."""
        with self._changed:
            job = self._jobs[job_id]
            return job.stop != "cancel" and self._persist(
                job_id, "running", state="queued", stop=None, attempts=attempts, step=0, logs=()
            )

    def _give_up(self, text: str) -> None:
        with self._changed:
            self._status = Status("failed", text)
            waiting = list(self._queue)
        for job_id in waiting:
            self._persist(job_id, "queued", state="failed", error=text)

    def _persist(self, job_id: str, expected: State, **changes: Any) -> bool:
        """`_set` for the worker, who must not lose what it did because the disk is full for a while."""
        while True:
            try:
                return self._set(job_id, expected, **changes)
            except (sqlite3.Error, OSError):
                logger.exception("The state of job %s cannot be stored", job_id)
                if self._stopping:
                    return False
                time.sleep(RETRY_SECONDS)

    def _set(self, job_id: str, expected: State, **changes: Any) -> bool:
        """Change a job if it is in the `expected` state; the only place where one changes.

        A change of state, or a stop that is promised, is stored before anybody can see it.
        """
        with self._changed:
            before = self._jobs.get(job_id)
            if before is None or before.state != expected:
                return False
            job = replace(before, version=before.version + 1, updated_at=time.time(), **changes)
            if job.done and job.stop == "cancel" and job.state != "cancelled":
                job = replace(job, state="cancelled", result=None, error=None)  # promised meanwhile
            if job.state != "running":
                job = replace(job, preview=None, seconds_left=None)
            if (job.state, job.stop) != (before.state, before.stop):
                with self._store.transaction() as db:
                    _update(db, job)
            if before.state == "queued" != job.state:
                self._queue.remove(job_id)
            elif job.state == "queued" != before.state:
                self._queue.appendleft(job_id)
            if job.done:
                del self._jobs[job_id]
                self._remember(job)
                for wake in self._watchers.get(job_id, ()):
                    wake()
            else:
                self._jobs[job_id] = job
            self._changed.notify_all()
            return True

    def _remember(self, job: Job) -> Job:
        self._finished[job.id] = job
        while len(self._finished) > REMEMBERED_JOBS:
            self._finished.popitem(last=False)
        return job

    # The store

    def _take_up(self) -> None:
        """Continue with what a former process left: queued again in their order, unless tried too often."""
        rows = self._store.all("SELECT * FROM tasks WHERE state IN ('queued', 'running') ORDER BY number")
        for row in rows:
            job = self._jobs[row["id"]] = self._of_row(row)
            if job.state == "queued":
                self._queue.append(job.id)
            elif job.stop == "cancel":
                self._set(job.id, "running", state="cancelled")
            elif job.attempts < self.max_attempts:
                self._set(job.id, "running", state="queued", stop=None)
            else:
                error = f"The server ended {job.attempts} times while this was drawn: it is not tried again."
                self._set(job.id, "running", state="failed", error=error)

    def _of_row(self, row: sqlite3.Row) -> Job:
        request = parse_request(json.loads(row["request"]))
        result = json.loads(row["result"]) if row["result"] else None
        if result:
            file = StoredFile(**result.pop("file"))
            result = Result(self.files.path(file.id), file=file, **result)
        pictures = json.loads(row["pictures"])
        return Job(
            row["id"],
            request,
            Work.of(request, {}, width=row["width"], height=row["height"], seed=row["seed"]),
            {name: Picture.of(picture) for name, picture in pictures.items()},
            Origin(
                **{key: row[key] for key in ("owner", "batch", "session_id", "webhook", "base_url")},
                legacy=bool(row["legacy"]),
            ),
            tuple(json.loads(row["notes"])),
            row["state"],
            attempts=row["attempts"],
            stop=row["stop"],
            logs=tuple(json.loads(row["logs"])),
            error=row["error"],
            result=result,
            created_at=row["created_at"],
            updated_at=row["updated_at"],
        )


def _sizes(pictures: Mapping[str, Picture]) -> Sizes:
    return {name: (picture.width, picture.height) for name, picture in pictures.items()}


def _settled(request: GenerationRequest, sizes: Sizes) -> tuple[Work, str | None]:
    """What is to be drawn, its pictures apart, and what the user is to be told of it."""
    size = resolve_size(
        width=request.width,
        height=request.height,
        keep_size=request.keep_size,
        content_size=sizes.get("content_image"),
    )
    seed = draw_seed(request.seed)
    return Work.of(request, {}, width=size.width, height=size.height, seed=seed), size.note


def _insert(db: sqlite3.Connection, job: Job) -> None:
    values = {
        "id": job.id,
        **asdict(job.origin),
        "state": job.state,
        "request": job.request.model_dump_json(exclude_unset=True),
        "pictures": json.dumps({name: asdict(picture) for name, picture in job.pictures.items()}),
        "width": job.work.width,
        "height": job.work.height,
        "seed": job.work.seed,
        "notes": json.dumps(job.notes),
        "created_at": job.created_at,
        "updated_at": job.updated_at,
    }
    marks = ", ".join(f":{name}" for name in values)
    db.execute(f"INSERT INTO tasks ({', '.join(values)}) VALUES ({marks})", values)
    db.executemany(
        "INSERT OR IGNORE INTO task_files VALUES (?, ?, 'input')",
        [(job.id, picture.file.id) for picture in job.pictures.values()],
    )


def _update(db: sqlite3.Connection, job: Job) -> None:
    """Store what has changed; with the end come the row of the picture and the webhook to send."""
    result = job.result
    db.execute(
        "UPDATE tasks SET state = ?, stop = ?, attempts = ?, notes = ?, logs = ?, result = ?, error = ?,"
        " updated_at = ? WHERE id = ?",
        (
            job.state,
            job.stop,
            job.attempts,
            json.dumps(job.notes),
            json.dumps(job.logs),
            json.dumps({key: value for key, value in asdict(result).items() if key != "path"})
            if result
            else None,
            job.error,
            job.updated_at,
            job.id,
        ),
    )
    if result:
        Files.insert(db, result.file, owner=job.origin.owner)
        db.execute("INSERT INTO task_files VALUES (?, ?, 'output')", (job.id, result.file.id))
    if job.done and job.origin.webhook:
        told = {
            "id": job.id,
            "state": job.state,
            "output": result.output(job.origin.base_url) if result else None,
            "error": job.error,
            "session_id": job.origin.session_id,
            "created_at": job.created_at,
            "updated_at": job.updated_at,
        }
        db.execute(
            "INSERT INTO outbox (id, task_id, url, body, created_at, next_try_at) VALUES (?, ?, ?, ?, ?, ?)",
            (
                f"msg_{secrets.token_urlsafe(18)}",
                job.id,
                job.origin.webhook,
                payload(told),
                job.updated_at,
                job.updated_at,
            ),
        )


def _sentence(error: Exception) -> str:
    """Our own errors speak to people; of others they get the kind, and the log has the rest."""
    if is_full(error):
        return "The server's disk is full: try again later."
    return str(error) if isinstance(error, USOError) else f"{type(error).__name__}: {error}"
