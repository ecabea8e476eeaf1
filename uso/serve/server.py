"""One server: the page and the API over one engine, and what goes on beside them."""

import contextlib
import functools
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from uso.errors import InputError, USOError
from uso.serve.api import Front, build_api
from uso.serve.engine import Engine, LoadProgress
from uso.serve.fetch import Fetcher
from uso.serve.files import Files
from uso.serve.keys import Keys, Limits, redact_logs
from uso.serve.store import Store
from uso.serve.ui import check_exposure, is_exposed, launch
from uso.serve.webhooks import Deliverer
from uso.settings import Settings

logger = logging.getLogger(__name__)

STOP_SECONDS = 20.0
SWEEP_SECONDS = 60.0
FETCH_SECONDS = 8.0  # for one picture: three must come within the 30 seconds that a client waits


def serve(settings: Settings) -> int:
    """Serve until SIGTERM or Ctrl-C, then end the running job or leave it to the next process; the exit code.

    A device that is of no use any more ends the process with 1, for a supervisor to start it again. Page and
    API answer before the model is there: it is loaded in the background.
    """
    check_exposure(settings)
    redact_logs()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("uso").setLevel(logging.INFO)
    asked_to_stop = threading.Event()
    with data_store(settings) as store:
        files = Files(store, keep_seconds=settings.keep_days * 86400, quota=int(settings.quota_gb * 1e9))
        engine = Engine(
            _loader(settings),
            model=Path(settings.model).name,  # of a folder, only its name is told
            files=files,
            device=settings.device,
            memory=settings.memory,
            lossy=settings.lossy,
            queue_limit=settings.queue_limit,
            max_attempts=settings.max_attempts,
            step_limit=settings.step_limit,
        )
        fetcher = Fetcher(
            policy=settings.foreign_urls,
            hosts=settings.foreign_hosts,
            allow_loopback=settings.allow_loopback_urls,
            seconds=FETCH_SECONDS,
        )
        secret = settings.webhook_secret.get_secret_value() if settings.webhook_secret else None
        deliverer = Deliverer(store, fetcher, secret=secret)
        asks = asks_for_keys(settings)
        api = build_api(
            engine,
            fetcher,
            keys=Keys(store) if asks else None,
            limits=Limits(per_minute=settings.key_rate, queue=settings.key_queue),
        )
        front = functools.partial(Front, origins=settings.cors_origins)
        try:
            page = launch(engine, settings, routes=api.routes, front=front)
        except OSError as error:
            where = f"{settings.host}:{settings.port}"
            raise InputError(
                f"Nobody can listen on {where}: is the port taken? Give another --port."
            ) from error
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: asked_to_stop.set())
        asking = "; its API asks for keys: python -m uso keys create NAME" if asks else ""
        print(f"USO is at http://{settings.host}:{settings.port}{asking}", flush=True)
        engine.start()
        deliverer.start()
        next_sweep = time.monotonic() + SWEEP_SECONDS
        while not asked_to_stop.wait(1) and engine.status.state != "broken":
            if time.monotonic() > next_sweep:
                _sweep(engine)
                next_sweep = time.monotonic() + SWEEP_SECONDS
        broken = engine.status.state == "broken"
        engine.stop(within=STOP_SECONDS)
        deliverer.stop()
        page.close(verbose=False)
        if broken:
            logger.error("The server ends because of its device. Start it again: it draws what waits.")
            os._exit(1)  # a hung device holds up the usual end
    return 0


def asks_for_keys(settings: Settings) -> bool:
    """Whether the API does: as set, else when others can reach it, or when the page has a password."""
    if settings.require_keys is None:
        return is_exposed(settings) or settings.auth is not None
    return settings.require_keys


def _sweep(engine: Engine) -> None:
    try:
        engine.sweep()
    except Exception:  # a full disk, say: the next round may do better
        logger.exception("What is past its time could not be removed")


@contextlib.contextmanager
def data_store(settings: Settings) -> Iterator[Store]:
    """The store in the data folder, this server's alone: two over one folder would draw each task twice.

    Where the usual folder cannot be had, one that goes with the server. USOError where it was set.
    """
    with contextlib.ExitStack() as stack:
        try:
            store = _open(settings.data_dir, stack)
        except USOError as error:
            if "data_dir" in settings.model_fields_set:
                raise
            logger.warning("%s Without it, tasks, pictures and keys go with this server.", error)
            folder = tempfile.TemporaryDirectory(prefix="uso-", ignore_cleanup_errors=True)
            store = _open(Path(stack.enter_context(folder)), stack)
        yield store


def _open(folder: Path, stack: contextlib.ExitStack) -> Store:
    store = stack.enter_context(contextlib.closing(Store(folder)))
    try:
        stack.enter_context(FileLock(folder / "server.lock", timeout=0))
    except Timeout:
        raise USOError(f"Another server uses {folder}: set USO_DATA_DIR to another folder.") from None
    return store


def _loader(settings: Settings) -> Callable[[LoadProgress], Any]:
    def load(progress: LoadProgress) -> Any:
        # they import torch: in the worker, when the page is up
        from uso.model.checkpoints import load_pipeline
        from uso.model.devices import choose_device

        choose_device(settings.device)  # before gigabytes are read
        return load_pipeline(settings.model, settings=settings, progress=progress)

    return load
