"""The engine and the server under load, on nano: `python -m benchmarks.server`; the last line is JSON.

First the engine in this process, whose moments can be seen, with all tasks in its queue at once. Then the
server as its users start it, on loopback, with clients that each wait for an answer before they ask again.
Exit code 1 when a task was overtaken by a later one.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.server import APP, Server
from uso import load_pipeline
from uso.schema import parse_request
from uso.serve.engine import Engine, Job
from uso.serve.work import Drawn, Event, Progress, Work

WAIT_SECONDS = 600


def fields(seed: int, steps: int) -> dict[str, Any]:
    return {"prompt": "a small red boat", "width": 512, "height": 512, "num_steps": steps, "seed": seed}


def spread(seconds: Iterable[float]) -> dict[str, float]:
    values = sorted(seconds)
    return {"median": statistics.median(values), "p95": values[int(0.95 * (len(values) - 1))]}


class WatchedEngine(Engine):
    """Notes, by seed, when a task began, its first step was there, and its pixels were."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.began: dict[int, float] = {}
        self.first_step: dict[int, float] = {}
        self.drawn: dict[int, float] = {}

    def run(self, work: Work, cancelled: Callable[[], bool], **kwargs: Any) -> Iterator[Event]:
        self.began[work.seed] = time.time()
        for event in super().run(work, cancelled, **kwargs):
            if isinstance(event, Progress) and event.step == 1:
                self.first_step.setdefault(work.seed, time.time())
            if isinstance(event, Drawn):
                self.drawn[work.seed] = time.time()
            yield event


def measure_engine(tasks: int, steps: int) -> dict[str, Any]:
    engine = WatchedEngine(lambda progress: load_pipeline("nano"), model="nano", queue_limit=tasks)
    engine.start()
    wait_for(engine, engine.submit(parse_request(fields(0, steps)), {}))  # loads, and is not counted
    jobs = [engine.submit(parse_request(fields(seed, steps)), {}) for seed in range(1, tasks + 1)]
    ended = {job.work.seed: wait_for(engine, job) for job in jobs}
    engine.stop(within=WAIT_SECONDS)
    at = {seed: job.updated_at for seed, job in ended.items()}  # when it ended
    return {
        "tasks_a_second": tasks / (max(at.values()) - min(engine.began[seed] for seed in at)),
        "begin_to_first_step": spread(engine.first_step[seed] - engine.began[seed] for seed in at),
        "decode": spread(job.result.seconds["decoding"] for job in ended.values() if job.result),
        "png_and_store": spread(at[seed] - engine.drawn[seed] for seed in at),
        "in_order": sorted(at, key=at.__getitem__) == sorted(at),
    }


def wait_for(engine: Engine, job: Job) -> Job:
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        now = engine.get(job.id)
        if now is not None and now.done:
            if now.result is None:
                raise SystemExit(f"Task {job.id}: {now.state} {now.error}")
            return now
        time.sleep(0.05)
    raise SystemExit(f"Task {job.id} did not end within {WAIT_SECONDS} seconds: {engine.status.text}")


@dataclass(frozen=True)
class Told:
    """One task as its client saw it, in seconds since 1970."""

    sent: float
    taken: float
    first_step: float
    ended: float  # by the server's own note
    answered: float
    downloaded: float


def measure_server(tasks: int, clients: int, steps: int) -> dict[str, Any]:
    limits = {
        "USO_KEY_RATE": str(100 * tasks),
        "USO_KEY_QUEUE": str(clients),
        "USO_QUEUE_LIMIT": str(clients),
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        Server(Path(folder), environment={name: str(limit) for name, limit in limits.items()}) as server,
        ThreadPoolExecutor(clients) as pool,
    ):
        ask(server, 0, steps)
        began = time.time()
        told = list(pool.map(lambda seed: ask(server, seed, steps), range(1, tasks + 1)))
    return {
        "tasks_a_second": tasks / (max(task.answered for task in told) - began),
        "submit": spread(task.taken - task.sent for task in told),
        "submit_to_first_step": spread(task.first_step - task.sent for task in told),
        "submit_to_answer": spread(task.answered - task.sent for task in told),
        "end_to_answer": spread(task.answered - task.ended for task in told),
        "download": spread(task.downloaded - task.answered for task in told),
        "in_order": all(a.ended < b.ended for a in told for b in told if a.taken < b.sent),
    }


def ask(server: Server, seed: int, steps: int) -> Told:
    """A task from its submission to its picture, followed by its stream."""
    with server.http() as http:
        sent = time.time()
        answer = http.post("/apps/run", json={"app": APP, "input": fields(seed, steps)}).raise_for_status()
        taken, first_step, task = time.time(), 0.0, answer.json()["data"]
        with http.stream("GET", f"/tasks/{task['id']}/stream") as lines:
            for line in lines.iter_lines():
                task = json.loads(line)
                if not first_step and task["progress"]:
                    first_step = time.time()
        answered = time.time()
        if task["output"] is None:
            raise SystemExit(f"Task {task['id']}: {task['status_text']} {task['error']}")
        http.get(task["output"]["generated_image"]["uri"]).raise_for_status()
        ended = datetime.fromisoformat(task["updated_at"]).timestamp()
        return Told(sent, taken, first_step, ended, answered, time.time())


def report(name: str, found: dict[str, Any]) -> None:
    order = "in the order of arrival" if found["in_order"] else "NOT IN THE ORDER OF ARRIVAL"
    print(f"{name}: {found['tasks_a_second']:.2f} tasks a second, {order}")
    for key, value in found.items():
        if isinstance(value, dict):
            print(f"  {key.replace('_', ' ') + ', s':34}{value['median']:10.4f}{value['p95']:10.4f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    print(
        f"nano, 512x512, {args.steps} steps, {args.tasks} tasks, {os.cpu_count()} cores{'':8}median       p95"
    )
    engine = measure_engine(args.tasks, args.steps)
    report("engine", engine)
    server = measure_server(args.tasks, args.clients, args.steps)
    report(f"server, {args.clients} clients", server)
    print(json.dumps(vars(args) | {"engine": engine, "server": server}))
    return 0 if engine["in_order"] and server["in_order"] else 1


if __name__ == "__main__":
    sys.exit(main())
