"""What the page says, as HTML: the status line, a picture's figures, hints and errors, what the model is."""

import html
import re

from uso.model.variants import VARIANTS
from uso.schema import GenerationRequest
from uso.serve.cost import seconds_text
from uso.serve.engine import Engine, Job

PHASES = {"encoding": "Looking at the pictures", "decoding": "Developing the picture"}


def status_line(engine: Engine, jobs: list[Job]) -> str:
    """One line that is always true: what happens now, how far it is, what to do if it went wrong."""
    live = [job for job in jobs if not job.done]
    if engine.status.state != "ready":
        if engine.status.state == "loading":
            return _status(engine.status.text, engine.status.fraction)
        return f'<div class="line">{problem(engine.status.text)}</div>'
    if not live:
        return _outcome(jobs[-1]) if jobs else _status("Ready", also=engine.status.memory)
    job = live[0]
    if job.state == "queued":
        ahead = engine.position(job.id)
        before = "next" if ahead == 0 else f"{ahead} before yours"
        return _status(f"Queued: {before}{_left(engine.seconds_until(job.id), 'about {} to wait')}")
    if job.stop == "cancel":
        return _status("Cancelling")
    if job.phase == "drawing":
        text = f"Step {job.step} of {job.work.num_steps}{_left(job.seconds_left, '{} left')}"
    else:
        text = PHASES[job.phase]
    also = f"{len(live) - 1} more to come" if live[1:] else ""
    return _status(text, job.step / job.work.num_steps, also=also)


def _outcome(job: Job) -> str:
    if job.state == "failed":
        return f'<div class="line">{problem(job.error or "")}</div>'
    if job.state == "cancelled":
        return _status(job.error or "Cancelled")
    assert job.result is not None
    notes = [in_words(note) for note in job.notes]
    return _status(" ".join([f"Done in {seconds_text(sum(job.result.seconds.values()))}.", *notes]))


def _status(text: str, fraction: float | None = None, also: str = "") -> str:
    bar = ""
    if fraction is not None:
        bar = f'<progress max="1" value="{fraction}" aria-label="Progress"></progress>'
    return f'<div class="line"><span>{html.escape(text)}</span>{bar}<small>{html.escape(also)}</small></div>'


def _left(seconds: float | None, words: str) -> str:
    return "" if seconds is None else " · " + words.format(seconds_text(seconds))


def info_line(job: Job | None) -> str:
    """Seed, size, steps and model of the picture that is shown."""
    if job is None or job.result is None:
        return ""
    used = job.result.parameters
    steps = used.get("stopped_at_step", used["num_steps"])
    size = f"{used['width']}x{used['height']}"
    facts = [f"Seed <b>{used['seed']}</b>", size, f"{steps} steps"]
    if "quantize" in used:
        facts.append(html.escape(used["quantize"]))
    if used.get("turbo"):
        facts.append("turbo")
    return " · ".join(facts)


def announcement(engine: Engine, jobs: list[Job]) -> str:
    """For screen readers: the status without its figures, so that it speaks up only when something is new."""
    if engine.status.state != "ready" or not jobs:
        return html.escape(engine.status.text)
    live = [job for job in jobs if not job.done]
    if live:
        return "Queued" if live[0].state == "queued" else "Drawing"
    return html.escape(
        {"completed": "The picture is done", "cancelled": "Cancelled"}.get(jobs[-1].state, "Failed")
    )


def title(model: str) -> str:
    return f"<h1>USO</h1><span>any subject, in any style</span>{about_model(model)}"


def about_model(model: str) -> str:
    """The model's name, and behind it what it is, under which licence, and how to get the full one."""
    if model == "nano":
        kind = " (small stand-in)"
        text = (
            "nano is a tiny model of the same make, bundled so that everything runs on a laptop; it draws "
            "soft, simple pictures of a subject in a style, and from words alone a few simple things. "
            "It draws no scenes, and recolours photographs more than it redraws them. "
            "For the full one, <code>python -m uso doctor --model flux-dev</code> "
            "says what is needed and where to accept its licence; then start with "
            "<code>python app.py --model flux-dev</code>."
        )
    elif model in VARIANTS:
        kind, variant = "", VARIANTS[model]
        text = f"{html.escape(variant.hub_id)} with USO, under the {html.escape(variant.licence)}."
    else:
        kind, text = "", "Weights of your own; their licence holds."
    return f"<details><summary>Model: <b>{html.escape(model)}</b>{kind}</summary><p>{text}</p></details>"


def takes_guidance(model: str) -> bool:
    return model not in VARIANTS or VARIANTS[model].guidance_embed


def hint(name: str) -> str:
    return f"<p class='hint'>{html.escape(GenerationRequest.model_fields[name].description or '')}</p>"


def told(text: str) -> str:
    return f"<p class='hint'>{html.escape(text)}</p>"


def problem(text: str) -> str:
    return f"<p class='problem' role='alert'>{html.escape(in_words(text))}</p>"


def in_words(text: str) -> str:
    """An error or a note in the page's words: it names fields as the API does."""
    text = re.sub("`?keep_size`?", "`keep_size`", text.replace("content picture", "subject"))
    for name, known in GenerationRequest.model_fields.items():
        text = text.replace(f"`{name}`", known.title or name)
    return text
