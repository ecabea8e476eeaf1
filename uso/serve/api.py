"""The hosted app's HTTP API, for its own unmodified clients: only the base URL changes.

Its routes stand beside the page on Gradio's server, and only the routes: what FastAPI keeps on an app
(exception handlers, state) does not travel, so each route makes its own problems and finds the engine by
closure. Imports neither the page nor torch.
"""

import base64
import binascii
import hashlib
import json
import logging
import re
import secrets
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Annotated, Any, Generic, Literal, TypeVar

from fastapi import Depends, FastAPI, Header, Query, Request
from fastapi.concurrency import contextmanager_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from uso import __version__
from uso.errors import InputError
from uso.images import MAX_BYTES
from uso.schema import PROMPT_MAX_CHARS, GenerationRequest, ImageRef, parse_request
from uso.serve.engine import Busy, Engine, Job, Origin, QueueFull
from uso.serve.fetch import Fetcher
from uso.serve.files import Picture, StoredFile
from uso.serve.keys import Keys, Limits, TooOften
from uso.serve.store import is_full, iso

logger = logging.getLogger(__name__)

NAMESPACE, NAME = "infsh", "bytedance-uso"
OPEN = ("healthz", "readyz", "openapi.json")
PREFIXES = ("apps", "tasks", "files", "sessions", "run", *OPEN)
JSON_MAX_BYTES = MAX_BYTES * 4 // 3 + 2**20  # one picture of the largest size in base64, and the rest
SNAPSHOT_SECONDS = 5.0  # clients give up after ten without one
SESSION_SECONDS = 300
PICTURES = ("content_image", "style_image", "extra_style_image")
SHOWN_TYPES = ("image/png", "image/jpeg", "image/webp", "image/heif", "image/heic")  # others are only saved

# The clients' numbers; tasks made through POST /run have the old ones
STATUS = {"queued": 2, "running": 7, "cancelling": 8, "completed": 10, "failed": 11, "cancelled": 12}
OLD_STATUS = STATUS | {"cancelling": 7, "completed": 9, "failed": 10, "cancelled": 11}

PROBLEMS = {
    400: ("invalid_request", "Invalid request"),
    401: ("unauthorized", "Unauthorized"),
    403: ("forbidden", "Forbidden"),
    404: ("not_found", "Not found"),
    405: ("invalid_request", "Method not allowed"),
    409: ("conflict", "Conflict"),
    410: ("gone", "Gone"),
    413: ("invalid_request", "Too large"),
    415: ("invalid_request", "Unsupported media type"),
    422: ("validation_error", "Validation error"),
    429: ("rate_limited", "Too many requests"),
    500: ("internal_error", "Internal error"),
    503: ("unavailable", "Unavailable"),
}
# Routes with it ask for a key; that is also how the OpenAPI document says so.
KEYED = Depends(HTTPBearer(auto_error=False, description="A key made by `python -m uso keys create NAME`."))


class Problem(HTTPException):
    """What a client did wrong; `code` where it is not the usual one of the status."""

    def __init__(self, status: int, detail: str, *, code: str = "", headers: dict[str, str] | None = None):
        super().__init__(status, detail, headers)
        self.code = code


# What goes over the wire

Data = TypeVar("Data")


class FileInfo(BaseModel):
    """A picture. Who has its `uri` may read it, without a key."""

    uri: str
    content_type: str
    size: int = Field(description="Bytes.")
    filename: str


class Output(BaseModel):
    generated_image: FileInfo
    seed: int = Field(description="The seed that was used.")
    width: int
    height: int
    timings: dict[str, float] = Field(description="Seconds of each phase.")


class Task(BaseModel):
    id: str
    short_id: str
    status: int = Field(
        description="2 queued, 7 running, 8 cancelling, 9 uploading, 10 completed, 11 failed, 12 cancelled. "
        "Of a task made through POST /run: 9 completed, 10 failed, 11 cancelled."
    )
    status_text: str
    progress: int = Field(ge=0, le=100)
    input: dict[str, Any]
    output: Output | None
    error: str
    logs: list[str]
    session_id: str | None
    created_at: str
    updated_at: str


class Estimate(BaseModel):
    """What a picture will cost, by what others did on this device."""

    seconds: float | None = Field(description="From its first phase to its last; null before the first.")
    memory: int = Field(description="Bytes at the peak.")


class TaskStatus(BaseModel):
    id: str
    status: int
    updated_at: str


class TaskFile(FileInfo):
    id: str
    role: Literal["input", "output"]


class DeletedFiles(BaseModel):
    deleted: list[str]
    skipped: list[str] = Field(description="Needed by a task that has not ended, or somebody else's.")


class Session(BaseModel):
    id: str
    status: Literal["active", "ended", "expired"]
    app_id: str
    task_id: str | None = Field(description="The newest task.")
    call_count: int
    idle_timeout: int = Field(description="Seconds.")
    expires_at: str
    ended_at: str | None
    created_at: str
    updated_at: str


class Upload(BaseModel):
    """A file to come: its bytes are PUT to `upload_url`, without a key."""

    id: str
    uri: str
    upload_url: str
    filename: str
    content_type: str
    size: int
    path: str


class Version(BaseModel):
    id: str
    input_schema: dict[str, Any]
    output_schema: dict[str, Any]


class App(BaseModel):
    id: str
    namespace: str
    name: str
    description: str
    version: Version


class Health(BaseModel):
    status: str


class Answer(BaseModel, Generic[Data]):
    """With the header `X-API-Version: 2`, `data` comes bare."""

    data: Data
    messages: list[str] = []
    success: bool = True
    status: int = 200


class ProblemDetails(BaseModel):
    """RFC 9457. `error` repeats it for old clients."""

    type: str
    title: str
    status: int
    detail: str
    field: str | None = Field(default=None, description="The field of the input that is to blame.")
    success: Literal[False] = False
    error: dict[str, str]


def _input_schema() -> dict[str, Any]:
    """The request's schema without `$defs`: pictures may also come as base64, the bare text of a data URI."""
    schema = GenerationRequest.model_json_schema()
    image = schema.pop("$defs")["ImageRef"]
    for name in PICTURES:
        spec = schema["properties"][name]
        del spec["$ref"]
        spec |= {key: value for key, value in image.items() if key not in spec}
    return schema


INPUT_SCHEMA = _input_schema()


class RunRequest(BaseModel):
    """A task to run. Further keys (setup, infra, workers, run_at, metadata) are taken and have no effect."""

    model_config = ConfigDict(extra="allow")

    app: str = Field(
        description=f"`{NAMESPACE}/{NAME}`, with `@version` and `:function` or without.",
        examples=[f"{NAMESPACE}/{NAME}"],
    )
    input: Annotated[dict[str, Any], WithJsonSchema(INPUT_SCHEMA)]
    function: str | None = None
    webhook: str | None = Field(
        default=None, max_length=8192, description="URL that is called when the task has ended."
    )
    session: str | None = Field(
        default=None, max_length=255, description='"new", or the id of a session to continue.'
    )
    session_timeout: int | None = Field(default=None, ge=1, le=86400, description="Idle seconds it may last.")


class FileRequest(BaseModel):
    filename: str | None = Field(default=None, max_length=4096)
    content_type: str | None = Field(default=None, max_length=255)
    path: str | None = Field(default=None, max_length=4096)
    size: int | None = Field(default=None, ge=0, le=MAX_BYTES)


class UploadRequest(BaseModel):
    files: list[FileRequest] = Field(min_length=1, max_length=32)


def task_of(job: Job, base_url: str) -> Task:
    """A job as the hosted app's clients know it; `base_url` is ours, as the client knows it."""
    given = job.request.model_dump(mode="json", exclude_unset=True)
    given |= {name: picture.file.described(base_url) for name, picture in job.pictures.items()}
    state = _state(job)
    return Task(
        id=job.id,
        short_id=job.id[:8],
        status=(OLD_STATUS if job.origin.legacy else STATUS)[state],
        status_text=state,
        progress=job.progress,
        input=given,
        output=Output.model_validate(job.result.output(base_url)) if job.result else None,
        error=job.error or "",
        logs=list(job.logs),
        session_id=job.origin.session_id,
        created_at=iso(job.created_at),
        updated_at=iso(job.updated_at),
    )


def _state(job: Job) -> str:
    return "cancelling" if job.state == "running" and job.stop == "cancel" else job.state


def _dumps(value: Any) -> str:
    """ASCII: a raw U+2028 would end a line for some clients."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def _answer(request: Request, data: BaseModel | Sequence[BaseModel], status: int = 200) -> Response:
    if isinstance(data, BaseModel):
        content: Any = data.model_dump(mode="json")
    else:
        content = [item.model_dump(mode="json") for item in data]
    if request.headers.get("x-api-version") != "2":
        content = {"data": content, "messages": [], "success": True, "status": status}
    return Response(_dumps(content), status, media_type="application/json")


def _problem(request: Request, error: Exception) -> Response:
    """Any exception as problem+json; what nobody foresaw is logged and not told."""
    status, detail, field, code, headers = 500, "The server failed; its log says why.", None, "", {}
    if isinstance(error, InputError):
        status, detail, field = 422, str(error), error.field
    elif isinstance(error, RequestValidationError):
        malformed = any(flaw["type"] == "json_invalid" for flaw in error.errors())
        status, detail = (400, "The body is not valid JSON.") if malformed else (422, _flaws(error))
    elif isinstance(error, QueueFull | TooOften):
        status, detail, headers = 429, str(error), _retry_after(error.retry_after)
    elif isinstance(error, Busy):
        status, detail, headers = 503, str(error), _retry_after(error.retry_after)
    elif isinstance(error, HTTPException):
        status, detail, headers = error.status_code, error.detail, dict(error.headers or {})
        code = error.code if isinstance(error, Problem) else ""
    elif isinstance(error, ClientDisconnect):
        status, detail = 400, "The body was broken off."
    else:
        if is_full(error):
            status, detail, headers = 503, "The server's disk is full.", _retry_after(60)
        logger.exception("%s %s failed", request.method, request.scope["route"].path, exc_info=error)
    usual, title = PROBLEMS.get(status, PROBLEMS[400])
    code = code or usual
    content: dict[str, Any] = {
        "type": f"{_base_url(request)}/errors/{code}",
        "title": title,
        "status": status,
        "detail": detail,
        "success": False,
        "error": {"code": code, "message": detail},
    }
    if field:
        content["field"] = field
    return Response(_dumps(content), status, headers, "application/problem+json")


def _retry_after(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(max(round(seconds + 0.5), 1))}


def _flaws(error: RequestValidationError) -> str:
    """One sentence for each flaw: where it is, and what is wrong."""
    return " ".join(
        f"`{'.'.join(str(part) for part in flaw['loc'][1:]) or 'body'}`: {flaw['msg']}."
        for flaw in error.errors()
    )


def _base_url(request: Request) -> str:
    """Under which name the client reached us: a proxy's, or that of a share link, whose tunnel ends TLS."""
    headers = request.headers
    scheme = headers.get("x-forwarded-proto", request.url.scheme)
    host = headers.get("x-forwarded-host", headers.get("host", "localhost")).split(",")[0].strip()
    return f"{'https' if scheme.startswith('https') else 'http'}://{host}"


def _capped(receive: Receive, limit: int) -> Receive:
    """Raise 413 when more than `limit` bytes come."""
    received = 0

    async def receive_some() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise Problem(413, f"The body is above the limit of {limit // 2**20} MiB.")
        return message

    return receive_some


def build_api(engine: Engine, fetcher: Fetcher, *, keys: Keys | None, limits: Limits) -> FastAPI:
    """The API over `engine`. Without `keys` nobody is asked for one."""
    files, store = engine.files, engine.files.store

    class Route(APIRoute):
        """Asks for the key before it reads the body, and makes problem+json of all that is raised."""

        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()
            keyed = any(dependency is KEYED for dependency in self.dependencies)

            async def guarded(request: Request) -> Response:
                request = Request(request.scope, _capped(request.receive, JSON_MAX_BYTES))
                try:
                    request.state.owner = await admit(request) if keyed else ""
                    return await handle(request)
                except Exception as error:
                    return _problem(request, error)

            return guarded

    async def admit(request: Request) -> str:
        """The owner of what is asked for; 401 without a key where one is needed, 429 when asked too often."""
        if keys is None:
            return ""
        kind, _, presented = request.headers.get("authorization", "").partition(" ")
        key_id = await run_in_threadpool(keys.verify, presented.strip()) if kind.lower() == "bearer" else None
        if key_id is None:
            raise Problem(
                401,
                "Give a key, in the header Authorization: Bearer KEY. `python -m uso keys create` makes one.",
                headers={"WWW-Authenticate": "Bearer"},
            )
        limits.check(key_id)
        return f"key:{key_id}"

    api = FastAPI(title="USO", version=__version__, docs_url=None, redoc_url=None)
    api.router.route_class = Route

    # Tasks

    async def find(request: Request, task_id: str) -> Job:
        """A task of whoever asks; where keys are asked for, others' tasks are as unknown as any."""
        job = await run_in_threadpool(engine.get, task_id)
        if job is None or (keys is not None and job.origin.owner != request.state.owner):
            raise Problem(404, f"There is no task {task_id!r}.")
        return job

    @api.post("/apps/run", response_model=Answer[Task], dependencies=[KEYED], tags=["tasks"])
    async def run(
        request: Request,
        body: RunRequest,
        idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
    ) -> Response:
        """Begin a task; answered at once, follow it by its stream or its status.

        With the header `Idempotency-Key`, the same request again within a day answers the same task.
        """
        job = await begin(request, body, idempotency_key, legacy=False)
        return _answer(request, task_of(job, _base_url(request)))

    @api.post("/apps/estimate", response_model=Answer[Estimate], dependencies=[KEYED], tags=["tasks"])
    async def estimate(request: Request, body: RunRequest) -> Response:
        """What a task would cost; the same checks, but none is begun."""
        check_app(body)
        asked, pictures = await read_input(body.input, request.state.owner, _base_url(request))
        sizes = {name: (picture.width, picture.height) for name, picture in pictures.items()}
        cost = await run_in_threadpool(engine.cost, asked, sizes)
        if cost is None:
            raise Busy(engine.status.text, retry_after=5)
        return _answer(request, Estimate(seconds=cost.seconds, memory=cost.memory))

    @api.post("/run", response_model=Answer[Task], dependencies=[KEYED], tags=["tasks"])
    async def run_legacy(request: Request, body: RunRequest) -> Response:
        """The same for the oldest clients: the task speaks the old status numbers."""
        return _answer(request, task_of(await begin(request, body, None, legacy=True), _base_url(request)))

    async def begin(request: Request, body: RunRequest, idempotency_key: str | None, *, legacy: bool) -> Job:
        check_app(body)
        owner, base_url = request.state.owner, _base_url(request)
        if body.webhook:
            fetcher.check(body.webhook, field="webhook")
        digest = hashlib.sha256(await request.body()).hexdigest() if idempotency_key else ""
        if idempotency_key and (before := await run_in_threadpool(replayed, owner, idempotency_key, digest)):
            return before
        await run_in_threadpool(engine.check_open)
        asked, pictures = await read_input(body.input, owner, base_url)
        session_id = f"sess_{secrets.token_urlsafe(12)}" if body.session == "new" else body.session or None
        origin = Origin(owner, None, session_id, body.webhook or None, base_url, legacy)

        def within(db: sqlite3.Connection, task_id: str) -> None:
            check_queue(db, owner)
            if session_id:
                use_session(db, session_id, task_id, owner, body)
            if idempotency_key:
                db.execute(
                    "INSERT INTO idempotency VALUES (?, ?, ?, ?, ?)",
                    (owner, idempotency_key, digest, task_id, time.time()),
                )

        try:
            return await run_in_threadpool(engine.submit, asked, pictures, origin, within=within)
        except sqlite3.IntegrityError:  # the same request came twice at once, and the other was first
            before = await run_in_threadpool(replayed, owner, str(idempotency_key), digest)
            if before is None:
                raise
            return before

    def replayed(owner: str, key: str, digest: str) -> Job | None:
        """The task this key made, as it was answered then."""
        row = store.one("SELECT * FROM idempotency WHERE owner = ? AND key = ?", owner, key)
        if row is None:
            return None
        if row["sha256"] != digest:
            raise Problem(409, "This Idempotency-Key was used for another request: take a new one.")
        if (job := engine.get(row["task_id"])) is None:
            raise Problem(409, "The task of this Idempotency-Key was deleted: take a new one.")
        return replace(
            job,
            state="queued",
            stop=None,
            step=0,
            logs=(),
            result=None,
            error=None,
            updated_at=job.created_at,
        )

    def check_queue(db: sqlite3.Connection, owner: str) -> None:
        if keys is None:
            return
        query = "SELECT COUNT(*) FROM tasks WHERE owner = ? AND state IN ('queued', 'running')"
        (waiting,) = db.execute(query, (owner,)).fetchone()
        if waiting > limits.queue:  # this one is among them
            raise QueueFull(
                f"{limits.queue} pictures of this key wait already: try later.",
                retry_after=engine.seconds_until_room(),
            )

    @api.get("/tasks/{task_id}", response_model=Answer[Task], dependencies=[KEYED], tags=["tasks"])
    async def get_task(request: Request, task_id: str) -> Response:
        """A task as it is now."""
        return _answer(request, task_of(await find(request, task_id), _base_url(request)))

    @api.get(
        "/tasks/{task_id}/status", response_model=Answer[TaskStatus], dependencies=[KEYED], tags=["tasks"]
    )
    async def get_status(request: Request, task_id: str) -> Response:
        """Its status alone, for polling."""
        task = task_of(await find(request, task_id), _base_url(request))
        return _answer(request, TaskStatus(id=task.id, status=task.status, updated_at=task.updated_at))

    @api.get(
        "/tasks/{task_id}/stream",
        response_class=StreamingResponse,
        responses={
            200: {
                "description": "A task a line, from now to its end; at least one every ten seconds.",
                "content": {
                    "application/x-ndjson": {"schema": {"$ref": "#/components/schemas/Task"}},
                    "text/event-stream": {"schema": {"type": "string"}},
                },
            }
        },
        dependencies=[KEYED],
        tags=["tasks"],
    )
    async def stream_task(request: Request, task_id: str) -> Response:
        """Follow a task: JSON lines, or unnamed server-sent events when `Accept` asks for them.

        Whoever leaves only stops to watch.
        """
        await find(request, task_id)
        base_url, accept = _base_url(request), request.headers.get("accept", "")
        events = "text/event-stream" in accept and "application/x-ndjson" not in accept

        async def lines() -> AsyncIterator[str]:
            async for job in engine.watch(task_id, repeat=SNAPSHOT_SECONDS):
                task = task_of(job, base_url).model_dump(mode="json")
                if not events:
                    yield f"{_dumps(task)}\n"
                    continue
                if job.state == "completed" and not job.origin.legacy:
                    # of the clients that begin at /apps/run and read events, the older take 9 for completed
                    uploading = task | {"status": 9, "status_text": "uploading"}
                    yield f"data: {_dumps(uploading)}\n\n"
                yield f"data: {_dumps(task)}\n\n"

        return StreamingResponse(
            lines(),
            media_type="text/event-stream" if events else "application/x-ndjson",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )

    @api.post("/tasks/{task_id}/cancel", response_model=Answer[Task], dependencies=[KEYED], tags=["tasks"])
    async def cancel_task(request: Request, task_id: str) -> Response:
        """Cancel it; one that has ended stays as it is."""
        await find(request, task_id)
        await run_in_threadpool(engine.cancel, task_id)
        return _answer(request, task_of(await find(request, task_id), _base_url(request)))

    @api.delete("/tasks/{task_id}", status_code=204, dependencies=[KEYED], tags=["tasks"])
    async def delete_task(
        request: Request,
        task_id: str,
        files: Annotated[bool, Query(description="Delete its files, too.")] = False,
    ) -> Response:
        """Forget a task that has ended."""
        job = await ended(request, task_id)
        if files:
            await run_in_threadpool(remove_files, job, None)
        await run_in_threadpool(engine.delete, task_id)
        return Response(status_code=204)

    async def ended(request: Request, task_id: str) -> Job:
        job = await find(request, task_id)
        if not job.done:
            raise Problem(409, "The task has not ended: cancel it first.")
        return job

    def files_of(task_id: str, role: str | None) -> list[sqlite3.Row]:
        return store.all(
            "SELECT files.*, role FROM task_files JOIN files ON files.id = file_id"
            " WHERE task_id = ? AND role = COALESCE(?, role)",
            task_id,
            role,
        )

    def remove_files(job: Job, role: str | None) -> DeletedFiles:
        # whoever has a URL may use its file in a task, but not delete it
        removed = {
            row["id"]: row["owner"] == job.origin.owner and files.delete(row["id"])
            for row in files_of(job.id, role)
        }
        return DeletedFiles(
            deleted=[id for id, gone in removed.items() if gone],
            skipped=[id for id, gone in removed.items() if not gone],
        )

    Role = Annotated[Literal["input", "output"] | None, Query(description="Only those.")]

    @api.get(
        "/tasks/{task_id}/files", response_model=Answer[list[TaskFile]], dependencies=[KEYED], tags=["tasks"]
    )
    async def list_task_files(request: Request, task_id: str, role: Role = None) -> Response:
        """The pictures it read and made, as far as they are kept."""
        await find(request, task_id)
        base_url = _base_url(request)
        return _answer(
            request,
            [
                TaskFile(id=row["id"], role=row["role"], **StoredFile.of(row).described(base_url))
                for row in await run_in_threadpool(files_of, task_id, role)
            ],
        )

    @api.delete(
        "/tasks/{task_id}/files", response_model=Answer[DeletedFiles], dependencies=[KEYED], tags=["tasks"]
    )
    async def delete_task_files(request: Request, task_id: str, role: Role = None) -> Response:
        """Delete the files of a task that has ended, and keep the task."""
        job = await ended(request, task_id)
        return _answer(request, await run_in_threadpool(remove_files, job, role))

    # What a task is made of

    def check_app(body: RunRequest) -> None:
        match = re.fullmatch(r"(?:app/)?([^/@:]+/[^/@:]+)(?:@[\w.-]+)?(?::(\w+))?", body.app)
        if match is None or match[1] != f"{NAMESPACE}/{NAME}":
            raise Problem(404, f"There is no app {body.app!r}, only {NAMESPACE}/{NAME}.")
        for function in (match[2], body.function):
            if function not in (None, "", "run"):
                raise Problem(404, f"{NAMESPACE}/{NAME} has no function {function!r}, only run.")

    async def read_input(
        given: dict[str, Any], owner: str, base_url: str
    ) -> tuple[GenerationRequest, dict[str, Picture]]:
        """The request and its pictures, stored. Everything else is checked before a picture is fetched."""
        names = [name for name in PICTURES if given.get(name) is not None]
        prompt = await run_in_threadpool(recovered_prompt, given.get("prompt"))
        data = given | {name: {"path": "-"} for name in names}
        if "prompt" in given:
            data["prompt"] = prompt
        asked = parse_request(data)
        pictures = {name: await read_picture(name, given[name], owner, base_url) for name in names}
        refs = {name: ImageRef(path=picture.file.id) for name, picture in pictures.items()}
        return asked.model_copy(update=refs), pictures

    def recovered_prompt(prompt: Any) -> Any:
        """Clients upload a prompt that looks like base64, or like a file of theirs: this undoes it."""
        file = files.by_uri(prompt) if isinstance(prompt, str) else None
        if file is None:
            return prompt
        if file.filename:
            return file.filename
        if file.size > PROMPT_MAX_CHARS:
            raise InputError("`prompt` is a large file: give a text.", field="prompt")
        return base64.b64encode(files.path(file.id).read_bytes()).decode()

    async def read_picture(name: str, value: Any, owner: str, base_url: str) -> Picture:
        """A picture as clients give it: URL, {"uri"}, {"path"} of an upload, data URI or bare base64."""
        if isinstance(value, dict):
            value = value.get("uri") or value.get("path")
        if not isinstance(value, str) or not value.isascii() or "\0" in value:
            file = None
        else:
            file = await run_in_threadpool(lambda: files.by_uri(value) or files.by_path(value, owner=owner))
        if file is not None:
            return await run_in_threadpool(files.picture, file, field=name)
        if isinstance(value, str) and value.startswith(f"{base_url}/files/"):
            raise InputError(f"`{name}` is not on the server any more: give the picture again.", field=name)
        if isinstance(value, str) and value[:8].lower().startswith(("http://", "https://")):
            data = await fetcher.fetch(value, field=name)
        elif (decoded := await run_in_threadpool(_decoded, value)) is not None:
            data = decoded
        else:
            raise InputError(
                f"`{name}` must be a URL, a data URI, base64, "
                '{"uri": URL} or {"path": path of an upload}: no such upload was found.',
                field=name,
            )
        return await run_in_threadpool(files.keep_picture, data, field=name, owner=owner)

    # Files

    @api.post("/files", response_model=Answer[list[Upload]], dependencies=[KEYED], tags=["files"])
    async def announce_files(request: Request, body: UploadRequest) -> Response:
        """Announce files; each is then PUT to its `upload_url` within an hour."""
        base_url, uploads = _base_url(request), []
        for spec in body.files:
            filename = re.sub(r"[\x00-\x1f\x7f]", "", re.split(r"[/\\]", spec.filename or "")[-1])[:255]
            file, path, upload_secret = await run_in_threadpool(
                files.announce,
                owner=request.state.owner,
                filename=filename,
                content_type=spec.content_type or "application/octet-stream",
                path=spec.path or None,
                size=spec.size,
            )
            upload_url = replace(file, secret=upload_secret).uri(base_url)
            uploads.append(Upload(id=file.id, path=path, upload_url=upload_url, **file.described(base_url)))
        return _answer(request, uploads)

    uploading: set[tuple[str, str]] = set()
    bytes_body = {"requestBody": {"content": {"application/octet-stream": {}}, "required": True}}

    @api.put("/files/{secret}/{file_id}", status_code=204, tags=["files"], openapi_extra=bytes_body)
    async def upload_file(request: Request, secret: str, file_id: str) -> Response:
        """The bytes of an announced file, once. The secret in the URL stands for a key."""
        if (secret, file_id) in uploading:
            raise Problem(409, "This upload is under way already.")
        uploading.add((secret, file_id))
        try:
            if not await run_in_threadpool(files.awaited, file_id, secret):
                raise Problem(404, "There is no such upload: it is done, out of time or was never announced.")
            size, digest = 0, hashlib.sha256()
            async with contextmanager_in_threadpool(files.writing(file_id)) as target:
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > MAX_BYTES:
                        raise Problem(413, f"The file is above the limit of {MAX_BYTES // 2**20} MiB.")
                    digest.update(chunk)
                    await run_in_threadpool(target.write, chunk)
            await run_in_threadpool(files.arrived, file_id, size=size, sha256=digest.hexdigest())
        finally:
            uploading.discard((secret, file_id))
        return Response(status_code=204)

    @api.head("/files/{secret}/{file_id}", include_in_schema=False)
    @api.get(
        "/files/{secret}/{file_id}",
        response_class=FileResponse,
        responses={200: {"content": {"application/octet-stream": {}}, "description": "The bytes."}},
        tags=["files"],
    )
    async def download_file(secret: str, file_id: str) -> Response:
        """A file. The secret in the URL stands for a key."""
        file = await run_in_threadpool(files.find, file_id, secret)
        if file is None or not (path := files.path(file_id)).is_file():
            raise Problem(404, "There is no such file, or it is not kept any more.")
        shown = file.content_type in SHOWN_TYPES
        return FileResponse(
            path,
            media_type=file.content_type if shown else "application/octet-stream",
            filename=file.filename or file.id,
            content_disposition_type="inline" if shown else "attachment",
            headers={"Cache-Control": "private, max-age=86400", "X-Content-Type-Options": "nosniff"},
        )

    # Sessions

    def use_session(
        db: sqlite3.Connection, session_id: str, task_id: str, owner: str, body: RunRequest
    ) -> None:
        """Open a session, or continue one, with a task."""
        now = time.time()
        if body.session == "new":
            idle = body.session_timeout or SESSION_SECONDS
            db.execute(
                "INSERT INTO sessions (id, owner, created_at, updated_at, expires_at, idle_timeout)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (session_id, owner, now, now, now + idle, idle),
            )
        check_active(db.execute("SELECT * FROM sessions WHERE id = ?", (session_id,)).fetchone(), owner)
        db.execute(
            "UPDATE sessions SET call_count = call_count + 1, task_id = ?, updated_at = ?,"
            " expires_at = ? + idle_timeout WHERE id = ?",
            (task_id, now, now, session_id),
        )

    def check_active(row: sqlite3.Row | None, owner: str) -> sqlite3.Row:
        row = known_session(row, owner)
        if (status := session_of(row).status) != "active":
            raise Problem(410, f"The session is {status}: begin a new one.", code=f"session_{status}")
        return row

    def known_session(row: sqlite3.Row | None, owner: str) -> sqlite3.Row:
        if row is None or row["owner"] != owner:
            raise Problem(404, "There is no such session.")
        return row

    def read_session(session_id: str, owner: str) -> sqlite3.Row:
        return known_session(store.one("SELECT * FROM sessions WHERE id = ?", session_id), owner)

    def session_of(row: sqlite3.Row) -> Session:
        expired = row["expires_at"] < time.time()
        return Session(
            id=row["id"],
            status="ended" if row["ended_at"] else "expired" if expired else "active",
            app_id=f"{NAMESPACE}/{NAME}",
            task_id=row["task_id"],
            call_count=row["call_count"],
            idle_timeout=row["idle_timeout"],
            expires_at=iso(row["expires_at"]),
            ended_at=iso(row["ended_at"]) if row["ended_at"] else None,
            created_at=iso(row["created_at"]),
            updated_at=iso(row["updated_at"]),
        )

    @api.get("/sessions", response_model=Answer[list[Session]], dependencies=[KEYED], tags=["sessions"])
    def list_sessions(request: Request) -> Response:
        """All that are kept, the newest first."""
        rows = store.all(
            "SELECT * FROM sessions WHERE owner = ? ORDER BY created_at DESC LIMIT 1000", request.state.owner
        )
        return _answer(request, [session_of(row) for row in rows])

    @api.get(
        "/sessions/{session_id}", response_model=Answer[Session], dependencies=[KEYED], tags=["sessions"]
    )
    def get_session(request: Request, session_id: str) -> Response:
        """A session: tasks that belong together. USO keeps nothing from one to the next."""
        return _answer(request, session_of(read_session(session_id, request.state.owner)))

    @api.post(
        "/sessions/{session_id}/keepalive",
        response_model=Answer[Session],
        dependencies=[KEYED],
        tags=["sessions"],
    )
    def keep_session(request: Request, session_id: str) -> Response:
        """Let its time begin anew."""
        owner, now = request.state.owner, time.time()
        with store.transaction() as db:
            check_active(db.execute("SELECT * FROM sessions WHERE id = ?", (session_id,)).fetchone(), owner)
            db.execute(
                "UPDATE sessions SET updated_at = ?, expires_at = ? + idle_timeout WHERE id = ?",
                (now, now, session_id),
            )
        return _answer(request, session_of(read_session(session_id, owner)))

    @api.delete("/sessions/{session_id}", status_code=204, dependencies=[KEYED], tags=["sessions"])
    def end_session(request: Request, session_id: str) -> Response:
        """End it; its tasks go on."""
        read_session(session_id, request.state.owner)
        with store.transaction() as db:
            db.execute(
                "UPDATE sessions SET ended_at = ?1, updated_at = ?1 WHERE id = ?2 AND ended_at IS NULL",
                (time.time(), session_id),
            )
        return Response(status_code=204)

    # The app and the server

    @api.get("/apps/{namespace}/{name}", response_model=Answer[App], dependencies=[KEYED], tags=["app"])
    async def get_app(request: Request, namespace: str, name: str) -> Response:
        """The app, with the schemas of its input and output."""
        if (namespace, name.partition("@")[0]) != (NAMESPACE, NAME):
            raise Problem(404, f"There is no app {namespace}/{name}, only {NAMESPACE}/{NAME}.")
        version = Version(
            id=__version__, input_schema=INPUT_SCHEMA, output_schema=_flat(Output.model_json_schema())
        )
        return _answer(
            request,
            App(
                id=f"{NAMESPACE}/{NAME}",
                namespace=NAMESPACE,
                name=NAME,
                description=GenerationRequest.__doc__ or "",
                version=version,
            ),
        )

    @api.head("/healthz", include_in_schema=False)
    @api.get("/healthz", response_model=Health, tags=["server"])
    async def health() -> Response:
        """The server answers."""
        return Response(_dumps({"status": "ok"}), media_type="application/json")

    @api.head("/readyz", include_in_schema=False)
    @api.get("/readyz", response_model=Health, tags=["server"])
    async def ready() -> Response:
        """200 once tasks are taken and drawn."""
        status = engine.status
        if status.state != "ready":
            raise Busy(status.text, retry_after=5)
        return Response(_dumps({"status": "ready"}), media_type="application/json")

    async def unknown(request: Request) -> Response:
        here = [route for route in api.routes if route.matches(request.scope)[0] == Match.PARTIAL]
        if here:
            methods = {method for route in here for method in getattr(route, "methods", ())}
            allowed = {"Allow": ", ".join(sorted(methods))}
            raise Problem(405, f"{request.method} is not possible here.", headers=allowed)
        raise Problem(404, "There is nothing here.")

    for prefix in PREFIXES:
        for path in (f"/{prefix}", f"/{prefix}/{{rest:path}}"):
            api.add_api_route(
                path,
                unknown,
                methods=[],  # any
                operation_id=path,
                include_in_schema=False,
                dependencies=[] if prefix in OPEN else [KEYED],
            )
    api.openapi = lambda: _with_problems(FastAPI.openapi(api))  # type: ignore[method-assign]
    return api


def _with_problems(document: dict[str, Any]) -> dict[str, Any]:
    """The OpenAPI document with our problems in place of FastAPI's own 422."""
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas["Problem"] = ProblemDetails.model_json_schema()
    problem = {
        "description": "What is wrong, and what to do.",
        "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
            operation["responses"]["default"] = problem
    return document


def _flat(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema with its one level of `$defs` put in place."""
    definitions = schema.pop("$defs", {})
    for spec in schema["properties"].values():
        if "$ref" in spec:
            spec |= definitions[spec.pop("$ref").rpartition("/")[2]]
    return schema


def _decoded(value: Any) -> bytes | None:
    """The bytes of a base64 data URI or of bare base64; None for anything else."""
    if not isinstance(value, str):
        return None
    text = re.sub(r"\Adata:[^,]*;base64,", "", value)
    text = text.replace("\r", "").replace("\n", "")  # the program base64 breaks it into lines
    try:
        return base64.b64decode(text, validate=True) or None
    except (ValueError, binascii.Error):
        return None


class Front:
    """Before everything else, for the API's paths: doubled slashes, and its own rules for browsers.

    Gradio's own would let pages of any origin in, with cookies. Only the listed origins may read answers
    here, and never with cookies.
    """

    def __init__(self, app: ASGIApp, *, origins: Sequence[str]) -> None:
        self.app = app
        self.api = CORSMiddleware(
            self._without_origin,
            allow_origins=origins,
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = re.sub("/{2,}", "/", scope.get("path", ""))
        if scope["type"] == "http" and path.startswith("/") and path.split("/")[1] in PREFIXES:
            await self.api({**scope, "path": path, "raw_path": path.encode()}, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _without_origin(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(name, value) for name, value in scope["headers"] if name != b"origin"]
        await self.app({**scope, "headers": headers}, receive, send)
