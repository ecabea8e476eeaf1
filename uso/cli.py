"""`python -m uso`: generate, show, doctor, serve. Every flag about a picture is a field of the schema.

What is slow to import (torch, gradio) is imported by the commands that need it, for help and `show` at once.
Exit codes: 0 done, 1 something failed, 2 the call or its input is wrong (nothing was made), 130 Ctrl-C.
"""

import argparse
import contextlib
import hashlib
import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from uso import __version__
from uso.batch import IMAGE_FIELDS, Job, Plan, local_picture
from uso.errors import InputError, USOError
from uso.images import open_image
from uso.metadata import read_parameters, save_png
from uso.schema import GenerationRequest
from uso.serve.work import Drawn, Work

if TYPE_CHECKING:
    from PIL import Image

    from uso.serve.device import Device
    from uso.settings import Settings

PROGRAM = "python -m uso"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. `argv` without the program's name, default the process's."""
    args = build_parser().parse_args(argv)
    try:
        exit_code: int = args.command(args)
        return exit_code
    except (USOError, OSError) as error:
        if args.debug:
            traceback.print_exc()
        _complain(str(error))
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        _complain("stopped; finished pictures are kept, the same command makes the rest.")
        return 130


def _complain(message: str) -> None:
    """One line on stderr, whatever the message holds (names of files may hold control characters)."""
    line = "".join(letter if letter.isprintable() else "?" for letter in " ".join(message.split()))
    print(f"{PROGRAM}: {line}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(prog=PROGRAM, description="Your subject in any style, from pictures and a prompt.")
    parser.add_argument("--version", action="version", version=f"uso {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    common = _Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="Show where an error comes from.")
    model = _Parser(add_help=False)
    model.add_argument(
        "--model",
        help="nano (bundled), flux-dev, flux-krea-dev, flux-schnell, or a file or folder of weights "
        "(default: USO_MODEL, else nano).",
    )
    model.add_argument("--device", help="auto, cpu, mps, cuda or cuda:N (default: USO_DEVICE, else auto).")
    model.add_argument(
        "--memory",
        help="auto, full, staged or offload: what lies on the GPU (default: USO_MEMORY, else auto).",
    )
    model.add_argument(
        "--quantize",
        help="none, int8 or int4: a smaller, less exact model (default: USO_QUANTIZE, else none).",
    )
    model.add_argument(
        "--turbo", action=argparse.BooleanOptionalAction,
        help="Leave out what changes little from step to step: faster, less exact (USO_TURBO).",
    )  # fmt: skip

    def add(name: str, command: Callable[[argparse.Namespace], int], help: str, *parents: _Parser) -> _Parser:
        parents = (*parents, common)
        added = commands.add_parser(name, help=help, description=help, parents=parents, allow_abbrev=False)
        added.set_defaults(command=command)
        return added

    make = add("generate", generate, "Make pictures.", model)
    add_request_flags(make.add_argument_group("the picture"))
    files = make.add_argument_group("files")
    files.add_argument(
        "--num-images", type=_count, default=1, metavar="N",
        help="Pictures of each request (default: 1); a given seed counts up, -1 draws N different ones.",
    )  # fmt: skip
    files.add_argument(
        "--batch", type=Path, metavar="FILE",
        help="JSON list or JSON lines of requests, or the official evaluation format (prompt, image_paths). "
        "Paths start at the file's folder; flags hold for what an entry leaves out.",
    )  # fmt: skip
    files.add_argument(
        "--output", type=Path, metavar="PATH",
        help="The .png to write (default: output.png), with _0, _1, ... for several; with --batch the "
        "folder for <entry>_<image>.png (default: output). What is there already is skipped.",
    )  # fmt: skip
    files.add_argument("--overwrite", action="store_true", help="Make again, and replace, what is there.")

    look = add("show", show, "Print the parameters in a PNG made here.")
    look.add_argument("file", type=Path, metavar="FILE.png")
    look.add_argument("--json", action="store_true", help="As JSON.")
    add("doctor", doctor, "Say what is found, what is missing and whether it would run.", model)
    actions = add("keys", keys, "Make, list and revoke the API's keys.").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    for action, help in (
        ("create", "Make a key and print it, once, on the last line."),
        ("list", "Show the beginnings of all keys."),
        ("revoke", "End a key, at once."),
    ):
        doing = actions.add_parser(action, help=help, description=help, parents=[common], allow_abbrev=False)
        if action != "list":
            doing.add_argument("name", metavar="NAME", help="What tells the key from others: laptop, anna.")
    page = add("serve", serve, "Serve the page and the API.", model)
    page.add_argument("--host", help="Address to listen on (default: USO_HOST, else 127.0.0.1).")
    page.add_argument("--port", type=int, help="Port to listen on (default: USO_PORT, else 7860).")
    page.add_argument("--share", action="store_true", default=None, help="Make a public link (USO_SHARE).")
    page.add_argument("--auth", metavar="USER:PASSWORD", help="Ask for a name and a password (USO_AUTH).")
    page.add_argument(
        "--no-password", action="store_true", default=None,
        help="Serve beyond this machine without a password (USO_NO_PASSWORD).",
    )  # fmt: skip
    page.add_argument(
        "--require-keys", action=argparse.BooleanOptionalAction,
        help="Whether the API asks for a key (USO_REQUIRE_KEYS; default: if others can reach it).",
    )  # fmt: skip
    page.add_argument(
        "--allow-loopback-urls", action="store_true", default=None,
        help="Let pictures and webhooks be at this machine's own addresses (USO_ALLOW_LOOPBACK_URLS).",
    )  # fmt: skip
    return parser


def add_request_flags(parser: argparse._ActionsContainer) -> None:
    """One flag for each field of `GenerationRequest`: name, default, limits and help are the schema's."""
    for name, spec in GenerationRequest.model_json_schema()["properties"].items():
        notes = [f"{spec['minimum']:g} to {spec['maximum']:.10g}"] if "minimum" in spec else []
        notes += [f"in steps of {spec['multipleOf']}"] if "multipleOf" in spec else []
        notes += [f"default: {spec['default']}"] if spec.get("default") not in (None, False) else []
        help = spec["description"] + (f" ({', '.join(notes)})" if notes else "")
        options: dict[str, Any] = {"default": spec.get("default"), "help": help.replace("%", "%%")}
        if spec.get("type") == "boolean":
            options["action"] = argparse.BooleanOptionalAction
        elif "minimum" in spec:
            options |= {"type": _number, "metavar": "N"}
        else:
            options["metavar"] = "FILE" if name in IMAGE_FIELDS else "TEXT"
        parser.add_argument(f"--{name.replace('_', '-')}", **options)


def _number(text: str) -> float | str:
    """A number, or the text as it is: the schema then says in one sentence what it should have been."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _count(text: str) -> int:
    if not text.isdecimal() or not (count := int(text)):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return count


def _settings(args: argparse.Namespace) -> "Settings":
    """The settings of the process, with the flags that are given in their place."""
    from pydantic import ValidationError

    from uso.settings import Settings, get_settings

    environment = get_settings()
    names = ["model", "device", "memory", "quantize", "turbo", "host", "port", "share", "auth", "no_password"]
    names += ["require_keys", "allow_loopback_urls"]
    given = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    try:
        return Settings(**given) if given else environment
    except ValidationError as error:
        flaws = [f"`--{flaw['loc'][0]}` {flaw['input']!r}: {flaw['msg']}." for flaw in error.errors()]
        raise InputError(" ".join(flaws)) from None


def generate(args: argparse.Namespace) -> int:
    """Check everything, then make what is not there; what fails on the way does not stop the rest."""
    settings = _settings(args)
    flags = {name: getattr(args, name) for name in GenerationRequest.model_fields}
    flags |= {name: local_picture(name, flags[name], Path()) for name in IMAGE_FIELDS}
    plan = Plan(
        flags={name: value for name, value in flags.items() if value is not None},
        num_images=args.num_images,
        model=Path(settings.model).expanduser().resolve().name,  # of a folder, only its name is told
        overwrite=args.overwrite,
        lossy=settings.lossy,
    )
    if args.batch:
        plan.add_batch(args.batch, args.output or Path("output"))
    else:
        plan.add_single(args.output or Path("output.png"))
    for problem in plan.problems:
        _complain(problem)
    if plan.problems:
        return 2
    for job in plan.done:
        print(f"{job.output} is there with these parameters: skipped (--overwrite makes it again).")
    if not plan.jobs:
        return 0
    try:
        for folder in {job.output.parent for job in plan.jobs}:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"`--output` cannot be written to: {error}.") from error
    failures = make_all(plan.jobs, settings=settings, model=plan.model, debug=args.debug)
    for failure in failures:
        _complain(failure)
    if failures:
        _complain(f"{len(failures)} of {len(plan.jobs)} pictures failed; the same command tries them again.")
    return 1 if failures else 0


def make_all(jobs: Sequence[Job], *, settings: "Settings", model: str, debug: bool) -> list[str]:
    """Make and save the pictures under one progress bar over all steps; returns what failed.

    What they will cost is told before.

    Raises CheckpointError when the model cannot be loaded, DeviceFault when the device gave up.
    """
    from tqdm import tqdm

    from uso.serve.cost import Calibration, Demand, cost_text
    from uso.serve.device import DeviceFault

    failures = []
    with tqdm(total=sum(job.request.num_steps for job in jobs), unit="step", disable=None) as bar:
        device = load_device(settings, bar.set_description)
        calibration = Calibration(settings.data_dir / "calibration.json")

        def demand_of(job: Job) -> tuple[str, Demand]:  # asked again after each picture: memory may run out
            return f"{model} on {device.name}", device.demand(work_of(job, {}), job.sizes)

        costs = [calibration.predict(*demand_of(job), device.in_use) for job in jobs]
        bar.write(f"{len(jobs)} to draw: {cost_text(costs)}", file=sys.stderr)
        begun = 0  # steps of the pictures before this one
        for number, job in enumerate(jobs, 1):
            bar.set_description(f"picture {number} of {len(jobs)}")
            try:
                drawn = make(job, device, lambda step: bar.update(begun + step - bar.n))  # noqa: B023
                calibration.learn(*demand_of(job), drawn.seconds, drawn.peak)
                size = f"{drawn.image.width}x{drawn.image.height}"
                seconds = sum(drawn.seconds.values())
                notes = " ".join(filter(None, [job.note, *drawn.notes]))
                bar.write(f"{job.output} ({size}, seed {job.request.seed}, {seconds:.1f} s) {notes}".rstrip())
            except DeviceFault:
                raise
            except Exception as error:
                if debug:
                    traceback.print_exc()
                kind = "" if isinstance(error, USOError) else f"{type(error).__name__}: "
                failures.append(f"{job.origin}{job.output} failed: {kind}{error}")
            begun += job.request.num_steps
            bar.update(begun - bar.n)
    return failures


def load_device(settings: "Settings", say: Callable[[str], None]) -> "Device":
    """The model on its device; `say` is told what is being loaded."""
    from uso.model.checkpoints import load_pipeline
    from uso.model.devices import choose_device
    from uso.serve.device import Device

    choose_device(settings.device)  # before gigabytes are read
    pipe = load_pipeline(settings.model, settings=settings, progress=lambda text, fraction: say(text))
    return Device(pipe, device=settings.device, memory=settings.memory, turbo=settings.turbo)


def work_of(job: Job, pictures: Mapping[str, "Image.Image"]) -> Work:
    size = {side: job.parameters[side] for side in ("width", "height")}
    return Work.of(job.request, pictures, **size, seed=job.request.seed)


def make(job: Job, device: "Device", on_step: Callable[[int], object]) -> Drawn:
    """Draw one picture and save it; `on_step` is told the number of steps done."""
    request, parameters = job.request, job.parameters
    pictures = {}
    for name, digest in parameters["image_sha256"].items():
        data = Path(getattr(request, name).path).read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise InputError(f"`{name}` was changed while the batch ran: give the command again.", field=name)
        pictures[name] = open_image(data, field=name)
    for event in device.run(work_of(job, pictures), cancelled=lambda: False):
        if isinstance(event, Drawn):
            save_png(event.image, job.output, parameters)
            return event
        on_step(event.step)
    raise USOError("The engine ended without a picture.")


def show(args: argparse.Namespace) -> int:
    """Print what a PNG says about how it was made."""
    parameters = read_parameters(args.file)
    if args.json:
        print(json.dumps(parameters, indent=2))
        return 0
    for pair in parameters.items():
        # A stranger's PNG may hold control characters: JSON escapes them.
        print(": ".join(x if isinstance(x, str) and x.isprintable() else json.dumps(x) for x in pair))
    return 0


def doctor(args: argparse.Namespace) -> int:
    """Print what was found and what would run; 0 when generation would work."""
    from uso.doctor import report

    found = report(settings=_settings(args))
    print(found)
    return found.exit_code


def keys(args: argparse.Namespace) -> int:
    """Make, list or revoke keys; a running server knows at once."""
    from uso.serve.keys import Keys
    from uso.serve.store import Store, iso

    with contextlib.closing(Store(_settings(args).data_dir)) as store:
        ring = Keys(store)
        if args.action == "create":
            key = ring.create(args.name)
            print("Keep this key: it is not shown again.")
            print(key)
        elif args.action == "revoke":
            ring.revoke(args.name)
            print(f"{args.name} is revoked.")
        else:
            for row in ring.all():
                used = f"used {iso(row['used_at'])}" if row["used_at"] else "never used"
                state = f"revoked {iso(row['revoked_at'])}" if row["revoked_at"] else used
                print(f"{row['prefix']}...  {row['name']}  made {iso(row['created_at'])}  {state}")
    return 0


def serve(args: argparse.Namespace) -> int:
    """Serve page and API until Ctrl-C."""
    from uso.serve.server import serve

    return serve(_settings(args))
