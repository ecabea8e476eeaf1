"""Writes docs/api.md from the API's own OpenAPI document: `python docs/api.py`."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from uso.serve.api import INPUT_SCHEMA, build_api  # noqa: E402
from uso.serve.engine import Engine  # noqa: E402
from uso.serve.fetch import Fetcher  # noqa: E402
from uso.serve.keys import Limits  # noqa: E402

INTRODUCTION = """\
# The API

The hosted app's, for its own clients: `inferencesh` (Python) and `@inferencesh/sdk` (JavaScript) work
unmodified with another base URL.

```python
from inferencesh import inference

client = inference(api_key="uso_...", base_url="http://127.0.0.1:7860")
result = client.run({"app": "infsh/bytedance-uso", "input": {"prompt": "a fox", "style_image": "style.jpg"}})
print(result["output"]["generated_image"]["uri"])
```

**Keys.** `python -m uso keys create NAME` makes one and shows it once. Asked for whenever others than this
machine can reach the server, or by `--require-keys`; then as `Authorization: Bearer KEY`. Upload and download
URLs hold a secret instead. A key sees its own tasks and sessions alone.

**Answers** are `{"data": ..., "messages": []}`; with the header `X-API-Version: 2` the data alone. **Errors**
are `application/problem+json` with `type` (`.../errors/CODE`), `title`, `status`, `detail` and, for a wrong
input, `field`. 429 and 503 come with `Retry-After`, computed from the queue.

**Streams** (`GET /tasks/{task_id}/stream`) are JSON lines, a whole task each: now, at each change, at the
latest every ten seconds, and at the end. With `Accept: text/event-stream` they are unnamed server-sent
events.

**Webhooks** get `{id, status, output, error, session_id, created_at, updated_at}` by POST when the task has
ended, with status 9 completed, 10 failed or 11 cancelled, and are tried again for hours. With
`USO_WEBHOOK_SECRET` they are signed as [Standard Webhooks](https://www.standardwebhooks.com) says.

**Cost.** Of a task's time 11 ms are the API's: 5 from the request to the first step, 6 from the last
latents to the answer, without decoding (2 ms) and PNG (4 ms). 200 tasks from 20 clients at once were taken
in 3.4 s and ended in their order; meanwhile the page answered within 0.4 s, and memory grew by 33 MiB in
all. (`pytest -s -k "50_ms or 200_tasks"`: the least of 15 tasks without a model, and nano; 2 cores of an
AMD EPYC, no GPU, busy with other work besides; 2026-11-24.)

This page is made by `python docs/api.py` from `GET /openapi.json`.
"""


def main() -> None:
    (HERE / "api.md").write_text(page(), encoding="utf-8")


def page() -> str:
    engine = Engine(lambda progress: None, model="nano")
    limits = Limits(per_minute=1, queue=1)
    document = build_api(engine, Fetcher(), keys=None, limits=limits).openapi()
    return "\n".join(
        [INTRODUCTION, *operations(document), *inputs(), *schemas(document["components"]["schemas"])]
    )


def operations(document: dict[str, Any]) -> Iterator[str]:
    yield "## Calls\n\n| call | key | what | answer |\n|---|---|---|---|"
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            status, answer = next(iter(operation["responses"].items()))
            shapes = [shape(content.get("schema", {})) for content in answer.get("content", {}).values()]
            query = "".join(f" ?{p['name']}" for p in operation.get("parameters", []) if p["in"] == "query")
            key = "yes" if "security" in operation else ""
            yield (
                f"| `{method.upper()} {path}`{query} | {key} | {' '.join(operation['description'].split())} "
                f"| {status} {shapes[0] if shapes else ''} |"
            )


def inputs() -> Iterator[str]:
    yield "\n## Input\n\n| field | type | what |\n|---|---|---|"
    for name, spec in INPUT_SCHEMA["properties"].items():
        limits = f", {spec['minimum']:g} to {spec['maximum']:.10g}" if "minimum" in spec else ""
        limits += f" in steps of {spec['multipleOf']}" if "multipleOf" in spec else ""
        default = f", default {spec['default']}" if "default" in spec else ""
        required = ", required" if name in INPUT_SCHEMA["required"] else ""
        kind = spec.get("type", "picture")
        yield f"| {name} | {kind}{limits}{default}{required} | {spec['description']} |"
    yield (
        '\nA picture is a URL, `{"uri": URL}`, `{"path": PATH}` of an upload, a data URI or base64. '
        "Foreign URLs are read under the server's rules (`USO_FOREIGN_URLS`)."
    )


def schemas(components: dict[str, Any]) -> Iterator[str]:
    yield "\n## Shapes"
    for name, schema in sorted(components.items()):
        if name.startswith("Answer_"):
            continue
        yield f"\n### {name}\n"
        if "description" in schema:
            yield " ".join(schema["description"].split()) + "\n"
        yield "| field | type | what |\n|---|---|---|"
        for field, spec in schema["properties"].items():
            optional = "" if field in schema.get("required", ()) else ", optional"
            kind = "see Input" if (name, field) == ("RunRequest", "input") else shape(spec)
            yield f"| {field} | {kind}{optional} | {spec.get('description', '')} |"


def shape(spec: dict[str, Any]) -> str:
    """A schema in a few words."""
    if "$ref" in spec:
        name = spec["$ref"].rpartition("/")[2]
        if not name.startswith("Answer_"):
            return f"[{name}](#{name.lower()})"
        inner = name.removeprefix("Answer_").rstrip("_")
        item = inner.removeprefix("list_")
        link = f"[{item}](#{item.lower()})"
        return f"list of {link}" if inner != item else link
    if "anyOf" in spec:
        return " or ".join(shape(option) for option in spec["anyOf"])
    if "enum" in spec:
        return " or ".join(f'"{value}"' for value in spec["enum"])
    if spec.get("type") == "array":
        return f"list of {shape(spec['items'])}"
    return str(spec.get("type", "any"))


if __name__ == "__main__":
    main()
