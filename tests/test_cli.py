"""The commands: flags from the schema, exit codes, one-line errors, resume; on a fake device and on nano."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from uso import __version__, cli
from uso.batch import IMAGE_FIELDS
from uso.errors import CheckpointError, USOError
from uso.metadata import read_parameters, save_png
from uso.schema import GenerationRequest, bounds
from uso.serve.cost import Demand
from uso.serve.work import Drawn, Event, Progress, Sizes, Work
from uso.settings import get_settings

ROOT = Path(__file__).parents[1]
needs_nano = pytest.mark.skipif(
    not (ROOT / "assets" / "nano" / "model_index.json").is_file(), reason="assets/nano is not made yet"
)


class FakeDevice:
    """Draws a plain picture; what a prompt says happens."""

    name = "fake"
    in_use = 0

    def __init__(self) -> None:
        self.works: list[Work] = []

    def demand(self, work: Work, sizes: Sizes) -> Demand:
        return Demand(work.num_steps, 1.0, len(sizes), 1.0, 2 * 10**9)

    def run(self, work: Work, cancelled: Callable[[], bool]) -> Iterator[Event]:
        self.works.append(work)
        for step in range(1, work.num_steps + 1):
            yield Progress("drawing", step)
            if work.prompt == "fail":
                raise USOError("Step 1 made numbers\nthat are no picture.")
            if work.prompt == "crash":
                raise RuntimeError("odd")
            if work.prompt == "ctrl-c":
                raise KeyboardInterrupt
            if work.prompt == "break":
                from uso.serve.device import DeviceFault

                raise DeviceFault("The device hangs.")
        yield Drawn(
            Image.new("RGB", (work.width, work.height)),
            work.num_steps,
            {"encoding": 0.2, "drawing": 0.7, "decoding": 0.1},
            "full",
            notes=["Note."],
        )


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory with two pictures."""
    monkeypatch.chdir(tmp_path)
    for name in ("USO_MODEL", "USO_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("USO_DATA_DIR", str(tmp_path / "data"))
    get_settings.cache_clear()
    Image.new("RGB", (320, 200), "red").save("subject.png")
    Image.new("RGB", (64, 64), "blue").save("style.png")
    yield tmp_path
    get_settings.cache_clear()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    """Stands in for the model; its `works` tell what was drawn."""
    fake = FakeDevice()
    monkeypatch.setattr(cli, "load_device", lambda settings, say: fake)
    return fake


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(settings: Any, say: Any) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(cli, "load_device", load)


def picture_actions() -> dict[str, argparse.Action]:
    """The actions of `generate` that are about the picture, by destination."""
    (commands,) = (a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    (group,) = (g for g in commands.choices["generate"]._action_groups if g.title == "the picture")
    return {action.dest: action for action in group._group_actions}


def test_flags_are_the_fields_of_the_schema() -> None:
    actions = picture_actions()
    assert list(actions) == list(GenerationRequest.model_fields)
    for name, field in GenerationRequest.model_fields.items():
        action = actions[name]
        assert action.option_strings[0] == "--" + name.replace("_", "-")
        assert action.default == (None if field.is_required() else field.default)
        assert action.help
        assert field.description
        assert action.help.startswith(field.description)
    for name in ("width", "height", "num_steps", "guidance", "seed", "content_long_size"):
        limits = bounds(name)
        assert f"({limits['minimum']:g} to {limits['maximum']:.10g}" in str(actions[name].help)
    assert "in steps of 16" in str(actions["width"].help)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--width", "500", ("`width`", "500", "512", "1536", "16")),
        ("--width", "1000", ("`width`", "1000", "16", "992 or 1008")),
        ("--height", "1552", ("`height`", "1552", "1536")),
        ("--num-steps", "0", ("`num_steps`", "1 to 50")),
        ("--num-steps", "many", ("`num_steps`", "'many'", "1 to 50")),
        ("--guidance", "5.5", ("`guidance`", "5.5", "1 to 5")),
        ("--guidance", "nan", ("`guidance`", "nan")),
        ("--seed", "4294967296", ("`seed`", "4294967296", "4294967295")),
        ("--seed", "1.5", ("`seed`", "1.5", "whole")),
        ("--content-long-size", "1e3000", ("`content_long_size`", "inf", "1024")),
        ("--num-images", "0", ("--num-images", "'0'", "from 1")),
        ("--content-image", "absent.png", ("`content_image`", "absent.png")),
        ("--content-image", "https://example.com/a.png", ("`content_image`", "download")),
        ("--output", "out.jpg", ("--output", ".png")),
        ("--output", "style.png", ("style.png", "not made here", "--overwrite")),
        ("--output", "x" * 300 + ".png", ("xxx", "too long")),
        ("--batch", "absent.json", ("--batch", "absent.json")),
        ("--device", "quantum", ("--device", "quantum")),
        ("--wdith", "512", ("--wdith",)),
    ],
)
def test_wrong_values_end_in_one_line(
    capfd: pytest.CaptureFixture[str], flag: str, value: str, words: tuple[str, ...]
) -> None:
    try:
        code: Any = cli.main(["generate", "--prompt", "x", flag, value])
    except SystemExit as end:  # argparse's own way out
        code = end.code
    out, err = capfd.readouterr()
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert all(word in err for word in words), err


@pytest.mark.parametrize("end", ["minimum", "maximum"])
def test_the_limits_themselves_are_allowed(device: FakeDevice, end: str) -> None:
    names = ("width", "height", "num_steps", "guidance", "seed", "content_long_size")
    flags = [f"--{name.replace('_', '-')}={bounds(name)[end]}" for name in names]
    assert cli.main(["generate", "--prompt", "", *flags]) == 0
    (work,) = device.works
    for name in set(names) - {"seed"}:
        assert getattr(work, name) == bounds(name)[end]


def test_one_picture(device: FakeDevice, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = ["--content-image", "subject.png", "--extra-style-image", "style.png"]
    rest = ["--num-steps", "3", "--seed", "5", "--keep-size", "--output", "a/b.png"]
    call = ["generate", "--prompt", "a cat", *pictures, *rest]
    assert cli.main(call) == 0
    (work,) = device.works
    assert (work.prompt, work.width, work.height, work.num_steps, work.seed) == ("a cat", 1024, 640, 3, 5)
    assert work.content_image
    assert work.content_image.size == (320, 200)
    assert [image.size for image in work.style_images] == [(64, 64)]
    parameters = read_parameters("a/b.png")
    assert parameters["seed"] == 5
    assert parameters["model"] == "nano"
    assert parameters["width"] == 1024
    assert set(parameters["image_sha256"]) == {"content_image", "extra_style_image"}
    assert set(GenerationRequest.model_fields) - set(IMAGE_FIELDS) <= set(parameters)
    out, err = capsys.readouterr()
    assert "a/b.png (1024x640, seed 5, 1.0 s)" in out
    assert "Note." in out
    assert "1 to draw: 2.0 GB of memory; how long it takes is known after the first picture" in err

    assert cli.main(call) == 0
    assert len(device.works) == 1
    assert "a/b.png is there" in capsys.readouterr().out
    assert cli.main([*call, "--overwrite"]) == 0
    assert len(device.works) == 2
    assert "1 to draw: about 1.0 s, 2.0 GB of memory" in capsys.readouterr().err


def test_a_random_seed_is_told_and_several_differ(
    device: FakeDevice, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", "--prompt", "", "--num-images", "3", "--num-steps", "1"]) == 0
    seeds = [work.seed for work in device.works]
    assert len(set(seeds)) == 3
    assert [read_parameters(f"output_{k}.png")["seed"] for k in range(3)] == seeds
    assert all(f"seed {seed}" in capsys.readouterr().out for seed in seeds[:1])


def write_batch(*prompts: str) -> None:
    Path("batch.jsonl").write_text("".join(f"{json.dumps({'prompt': prompt})}\n" for prompt in prompts))


BATCH = ["generate", "--batch", "batch.jsonl", "--num-steps", "2", "--seed", "1"]


def test_a_failing_item_does_not_stop_the_others(
    device: FakeDevice, capsys: pytest.CaptureFixture[str]
) -> None:
    write_batch("a", "fail", "crash", "b")
    assert cli.main(BATCH) == 1
    assert sorted(path.name for path in Path("output").iterdir()) == ["0_0.png", "3_0.png"]
    second, third, count = capsys.readouterr().err.splitlines()[-3:]
    assert "batch.jsonl line 2" in second
    assert "numbers that are no picture" in second
    assert "batch.jsonl line 3" in third
    assert "RuntimeError: odd" in third
    assert "2 of 4 pictures failed" in count

    device.works.clear()
    assert cli.main(BATCH) == 1
    assert [work.prompt for work in device.works] == ["fail", "crash"]


@pytest.mark.usefixtures("no_model")
def test_a_batch_is_checked_before_the_model_loads(capsys: pytest.CaptureFixture[str]) -> None:
    Path("batch.json").write_text(
        '[{"prompt": "a"},\n{"prompt": "b", "width": 8},\n{"prompt": "c", "seed": -2}]'
    )
    assert cli.main(["generate", "--batch", "batch.json"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "line 2: `width`" in first
    assert "line 3: `seed`" in second
    assert not Path("output").exists()


def test_the_progress_bar_counts_pictures_and_steps(
    device: FakeDevice, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    write_batch("a", "fail", "b")
    assert cli.main(BATCH) == 1
    err = capsys.readouterr().err
    assert "picture 1 of 3" in err
    assert "picture 3 of 3" in err
    assert "6/6" in err


def test_ctrl_c_keeps_what_is_finished(device: FakeDevice, capsys: pytest.CaptureFixture[str]) -> None:
    write_batch("a", "ctrl-c", "b")
    assert cli.main(BATCH) == 130
    assert os.listdir("output") == ["0_0.png"]
    Image.open("output/0_0.png").load()
    assert "stopped" in capsys.readouterr().err.splitlines()[-1]


def test_a_lost_device_ends_the_run(device: FakeDevice, capsys: pytest.CaptureFixture[str]) -> None:
    write_batch("break", "b")
    assert cli.main(BATCH) == 1
    assert len(device.works) == 1
    assert "The device hangs." in capsys.readouterr().err


def test_a_picture_that_changed_meanwhile_is_not_used(
    device: FakeDevice, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(settings: Any, say: Any) -> FakeDevice:
        Image.new("RGB", (64, 64), "green").save("style.png")
        return device

    monkeypatch.setattr(cli, "load_device", load)
    assert cli.main(["generate", "--prompt", "", "--style-image", "style.png"]) == 1
    assert "`style_image` was changed" in capsys.readouterr().err
    assert not Path("output.png").exists()


def test_errors_have_no_traceback_unless_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(settings: Any, say: Any) -> Any:
        raise CheckpointError("There is no\nmodel \x1b[31m'x'.")

    monkeypatch.setattr(cli, "load_device", load)
    call = ["generate", "--prompt", "", "--model", "x"]
    assert cli.main(call) == 1
    err = capsys.readouterr().err
    assert err == f"{cli.PROGRAM}: There is no model ?[31m'x'.\n"
    assert cli.main([*call, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_show(capsys: pytest.CaptureFixture[str]) -> None:
    parameters = {"prompt": "a cat", "seed": 5, "image_sha256": {}, "odd": "\x1b[2J"}
    save_png(Image.new("RGB", (16, 16)), "a.png", parameters)
    assert cli.main(["show", "a.png"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[:2] == ["prompt: a cat", "seed: 5"]
    assert "\x1b" not in out
    assert cli.main(["show", "a.png", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == parameters
    for name in ("style.png", "absent.png"):
        assert cli.main(["show", name]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    assert cli.main(["doctor", "--model", "empty"]) == 1
    assert "would not run" in capsys.readouterr().out


@needs_nano
def test_doctor_is_content_with_nano(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--model", "nano", "--device", "cpu"]) == 0
    assert "Ready." in capsys.readouterr().out


def test_serve_hands_over_the_flags(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[Any] = []

    def serve(settings: Any) -> int:
        served.append(settings)
        return 7

    monkeypatch.setitem(sys.modules, "uso.serve.server", SimpleNamespace(serve=serve))
    assert cli.main(["serve", "--port", "8000", "--host", "0.0.0.0", "--model", "flux-dev"]) == 7
    (settings,) = served
    assert (settings.port, settings.host, settings.model, settings.device) == (
        8000, "0.0.0.0", "flux-dev", "auto",
    )  # fmt: skip
    assert cli.main(["serve", "--port", "0"]) == 2
    assert "`--port`" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"uso {__version__}\n"


@pytest.mark.parametrize("call", ["--help", "generate --help", "show a.png", "generate --prompt x --width 1"])
def test_answers_without_heavy_imports(call: str) -> None:
    save_png(Image.new("RGB", (16, 16)), "a.png", {"seed": 1})
    code = (
        "import sys, uso.cli\n"
        f"try: uso.cli.main({call.split()})\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'torch', 'gradio', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, timeout=30)
    assert done.returncode == 0, done.stderr.decode()


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@needs_nano
def test_nano_draws_and_repeats(capsys: pytest.CaptureFixture[str]) -> None:
    pictures = ["--content-image", "subject.png", "--style-image", "style.png"]
    call = ["generate", "--prompt", "a cat", *pictures, "--num-steps", "4", "--seed", "3", "--output"]
    assert cli.main([*call, "a.png"]) == 0
    assert cli.main([*call, "b.png", "--device", "cpu"]) == 0
    first, second = Image.open("a.png"), Image.open("b.png")
    assert first.size == (1024, 640)
    assert first.tobytes() == second.tobytes()
    assert read_parameters("a.png") == read_parameters("b.png")
    assert "seed 3" in capsys.readouterr().out


@needs_nano
def test_nano_stopped_by_ctrl_c() -> None:
    call = [sys.executable, "-m", "uso", "generate", "--prompt", "x", "--num-images", "9", "--width", "512"]
    with subprocess.Popen(
        [*call, "--num-steps", "50"],
        env=environment(),
        stderr=subprocess.PIPE,
        # a shell that runs us in the background has it ignored, here and in what we start
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        try:
            deadline = time.monotonic() + 240  # the machine may be busy
            while not Path("output_0.png").exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, err
    assert b"Traceback" not in err
    assert err.splitlines()[-1].startswith(b"python -m uso: stopped")
    assert not list(Path().glob("*.part"))
    for path in Path().glob("output_*.png"):
        Image.open(path).load()
