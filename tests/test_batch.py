"""Batch files, names, seeds and resume: all that is decided before a model is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from uso.batch import Job, Plan, local_picture
from uso.errors import InputError
from uso.metadata import save_png


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with pictures, beside the working directory."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    (tmp_path / "data").mkdir()
    Image.new("RGB", (300, 200), "red").save(tmp_path / "data" / "subject.png")
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "data" / "style.jpg")
    return tmp_path / "data"


def plan_of(folder: Path, batch: Any, *, num_images: int = 1, overwrite: bool = False, **flags: Any) -> Plan:
    """The plan of a batch file; text is written as it is, anything else as JSON."""
    path = folder / "batch.json"
    path.write_text(batch if isinstance(batch, str) else json.dumps(batch), encoding="utf-8")
    plan = Plan(flags=flags, num_images=num_images, model="fake", overwrite=overwrite)
    plan.add_batch(path, Path("out"))
    return plan


def make(job: Job, **changed: Any) -> None:
    """What a run leaves behind."""
    job.output.parent.mkdir(exist_ok=True)
    save_png(Image.new("RGB", (16, 16)), job.output, {**job.parameters, **changed})


def test_official_evaluation_format(folder: Path) -> None:
    entries = [
        {"prompt": "both", "image_paths": ["subject.png", "style.jpg", "style.jpg"], "target_path": "t.png"},
        {"prompt": "style only", "image_paths": ["", "style.jpg"], "seed": 7},
        {"prompt": "", "image_paths": []},
    ]
    plan = plan_of(folder, entries, num_images=2, seed=3407)
    assert plan.problems == []
    assert [str(job.output) for job in plan.jobs] == [f"out/{i}_{j}.png" for i in range(3) for j in range(2)]
    assert [job.request.seed for job in plan.jobs] == [3407, 3408, 7, 8, 3407, 3408]
    both, style_only, neither = (job.request for job in plan.jobs[::2])
    assert both.content_image
    assert both.content_image.path == str(folder / "subject.png")
    assert both.style_image == both.extra_style_image != None  # noqa: E711
    assert style_only.content_image is None
    assert style_only.style_image
    assert (neither.content_image, neither.style_image, neither.extra_style_image) == (None, None, None)


def test_flags_hold_for_what_an_entry_leaves_out(folder: Path) -> None:
    style = {"path": str(folder / "style.jpg")}
    plan = plan_of(
        folder,
        [
            {},
            {"prompt": "b", "num_steps": 2, "style_image": None},
            {"prompt": "c", "image_paths": ["subject.png"]},
        ],
        prompt="a",
        num_steps=9,
        style_image=style,
    )
    assert plan.problems == []
    requests = [job.request for job in plan.jobs]
    assert [(request.prompt, request.num_steps) for request in requests] == [("a", 9), ("b", 2), ("c", 9)]
    assert [request.style_image is not None for request in requests] == [True, False, False]


@pytest.mark.parametrize(
    "text",
    [
        '{"prompt": "a"}\n\n{"prompt": "b", "width": 500}\n',
        '\ufeff{"prompt": "a"}\r\n\r\n{"prompt": "b", "width": 500}',
        '[{"prompt": "a"},\n\n{"prompt": "b", "width": 500}]',
        '[ {"prompt": "a"\n} ,\n{"prompt": ",", "width": 500}\n\n, {"prompt": "c"}]',
    ],
)
def test_problems_name_the_line(folder: Path, text: str) -> None:
    plan = plan_of(folder, text)
    (problem,) = plan.problems
    assert problem.startswith(f"{folder / 'batch.json'} line 3: ")
    assert "`width`" in problem
    assert "500" in problem
    assert "512" in problem


def test_every_problem_is_told(folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"GIF89a")
    lines = [
        '{"prompt": "fine"}',
        '{"prompt": "x", "num_steps": 51, "guidance": 9}',
        '{"prompt": "x", "style_image": "absent.png"}',
        '{"prompt": "x", "content_image": "broken.png"}',
        '{"prompt": "x", "content_image": "https://example.com/a.png"}',
        '{"prompt": "x", "image_paths": ["", "", "", ""]}',
        '{"prompt": "x", "image_paths": [3]}',
        '{"prompt": "x"',
        "[1]",
        '{"width": 512}',
        '{"prompt": "x", "id": "../x"}',
        '{"prompt": "x", "id": "0"}',
        '{"prompt": "x", "widht": 512}',
        '{"prompt": "x", "content_image": "subject.png", "content_long_size": 16}',
    ]
    plan = plan_of(folder, "\n".join(lines))
    start = f"{folder / 'batch.json'} line "
    told = dict(problem.removeprefix(start).split(": ", 1) for problem in plan.problems)
    expected = {
        2: ("num_steps", "51", "50", "guidance", "9", "5"),
        3: ("style_image", "absent.png"),
        4: ("content_image", "PNG"),
        5: ("content_image", "URL", "download"),
        6: ("image_paths", "at most 3"),
        7: ("content_image", "3"),
        8: ("not JSON",),
        9: ("must be an object",),
        10: ("prompt", "missing"),
        11: ("id", "../x"),
        12: ("out/0_0.png", "another entry"),
        13: ("widht", "width"),
        14: ("content_long_size", "16"),
    }
    assert {int(line) for line in told} == set(expected)
    for line, words in expected.items():
        assert all(word in told[str(line)] for word in words), told[str(line)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no entries"),
        ("[]", "no entries"),
        ('[{"prompt": "a"},\n{"prompt" 1}]', "line 2: not JSON"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_unusable_batch_files(folder: Path, text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        plan_of(folder, text)


def test_absent_batch_file_and_wrong_outputs(folder: Path) -> None:
    plan = Plan(flags={"prompt": ""}, num_images=1, model="fake", overwrite=False)
    with pytest.raises(InputError, match=r"absent\.json"):
        plan.add_batch(folder / "absent.json", Path("out"))
    with pytest.raises(InputError, match="folder"):
        plan.add_batch(folder / "absent.json", Path("out.png"))
    with pytest.raises(InputError, match=r"\.png"):
        plan.add_single(Path("out.jpg"))


@pytest.mark.parametrize(
    "name", ["..", "../a", "/a", "a/../b", "a//b", ".a", "a\\b", "a b", "", "é", "a\n", "x" * 101, True, None]
)
def test_names_stay_inside_the_output_folder(folder: Path, name: Any) -> None:
    plan = plan_of(folder, [{"prompt": "", "save_dir": name}])
    assert plan.jobs == []
    assert "`save_dir`" in plan.problems[0]


@pytest.mark.parametrize("name", ["cat-1", "dogs/poodle.v2", 7])
def test_names_of_outputs(folder: Path, name: Any) -> None:
    plan = plan_of(folder, [{"prompt": "", "id": name}])
    assert [job.output for job in plan.jobs] == [Path("out") / f"{name}_0.png"]


def test_seeds() -> None:
    def seeds(seed: int, num_images: int) -> list[Any]:
        plan = Plan(flags={"prompt": "", "seed": seed}, num_images=num_images, model="fake", overwrite=False)
        plan.add_single(Path("out.png"))
        numbers = [""] if num_images == 1 else [f"_{k}" for k in range(num_images)]
        assert plan.problems or [str(job.output) for job in plan.jobs] == [f"out{k}.png" for k in numbers]
        return plan.problems or [job.request.seed for job in plan.jobs]

    assert seeds(5, 1) == [5]
    assert seeds(5, 3) == [5, 6, 7]
    assert len(set(seeds(-1, 50))) == 50
    assert min(seeds(-1, 50)) >= 0
    assert "4294967296" in str(seeds(2**32 - 1, 2))


def test_resume_skips_what_is_there(folder: Path) -> None:
    entries = [
        {"prompt": "a", "content_image": "subject.png", "seed": 1},
        {"prompt": "b", "style_image": "style.jpg"},
        {"prompt": "c"},
    ]
    flags: dict[str, Any] = {"width": 512, "height": 512, "guidance": 3.5}
    first = plan_of(folder, entries, **flags)
    assert len(first.jobs) == 3
    for job in first.jobs[:2]:
        make(job)
    again = plan_of(folder, entries, **flags)
    assert [job.output.name for job in again.done] == ["0_0.png", "1_0.png"]  # the second with any seed
    assert [job.output.name for job in again.jobs] == ["2_0.png"]
    assert again.problems == []
    assert len(plan_of(folder, entries, overwrite=True, **flags).jobs) == 3


def test_another_picture_is_never_replaced(folder: Path) -> None:
    entry = {"prompt": "a", "content_image": "subject.png", "seed": 1}
    flags: dict[str, Any] = {"width": 512, "height": 512}
    (job,) = plan_of(folder, [entry], **flags).jobs
    for changed in ({"seed": 2}, {"model": "other"}, {"width": 528}, {"stopped_at_step": 3}):
        make(job, **changed)
        words = f"another {next(iter(changed))}:"
        plan = plan_of(folder, [entry], **flags)
        assert plan.jobs == plan.done == []
        assert words in plan.problems[0]
        assert "--overwrite" in plan.problems[0]
    make(job, software="uso of another version")
    assert plan_of(folder, [entry], **flags).problems == []
    two = plan_of(folder, [{**entry, "prompt": "b"}], num_steps=3, **flags)
    assert "prompt, num_steps" in two.problems[0]
    Image.new("RGB", (300, 200), "green").save(folder / "subject.png")
    assert "another image_sha256" in plan_of(folder, [entry], **flags).problems[0]
    job.output.write_text("mine")
    assert "not made here" in plan_of(folder, [entry], **flags).problems[0]


def test_pictures_are_local_files() -> None:
    assert local_picture("style_image", "a.png", Path("b")) == {"path": "b/a.png"}
    assert local_picture("style_image", {"path": "/a.png"}, Path("b")) == {"path": "/a.png"}
    assert local_picture("style_image", "", Path("b")) is None
    for url in ("http://a/b.png", "HTTPS://a/b.png", "data:image/png;base64,"):
        with pytest.raises(InputError, match=r"`style_image` is a URL .*download"):
            local_picture("style_image", url, Path())
    with pytest.raises(InputError, match="download"):
        local_picture("style_image", {"uri": "http://a/b.png"}, Path())
