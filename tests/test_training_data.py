"""The data side of training: licences, subjects, looks, pool."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from training import data, looks, pool


def drawing(size: int = 128) -> np.ndarray:
    """A red disc with a dark square in it and a pale stripe, on a see-through ground."""
    rgba = np.zeros((size, size, 4), np.uint8)
    cv2.circle(rgba, (size // 2, size // 2), size * 2 // 5, (200, 60, 50, 255), -1)
    rgba[size // 3 : size // 2, size // 3 : size // 2, :3] = 30
    rgba[size * 5 // 8 : size * 11 // 16, size // 4 : size * 3 // 4, :3] = 235
    return rgba


@pytest.mark.parametrize("spdx", sorted(data.ALLOWED_LICENCES))
def test_free_licences_pass(spdx: str) -> None:
    assert data.check_licence({"name": "A", "license": {"spdx": spdx}}) == spdx


@pytest.mark.parametrize("spdx", ["CC-BY-SA-4.0", "GPL-3.0", "CC-BY-NC-4.0", None])
def test_other_licences_are_refused(spdx: str | None) -> None:
    with pytest.raises(data.LicenceError, match=f"'A' has licence '{spdx}'"):
        data.check_licence({"name": "A", "license": {"spdx": spdx}})


def test_share_alike_is_named_as_the_reason() -> None:
    with pytest.raises(data.LicenceError, match="share-alike"):
        data.check_licence({"name": "OpenMoji", "license": {"spdx": "CC-BY-SA-4.0"}})


@pytest.mark.parametrize(
    ("codepoints", "name", "expected"),
    [
        ("1f34e", "red apple", True),
        ("1f408-200d-2b1b", "black cat", True),
        ("1f44b-1f3fd", "waving hand", False),  # skin tone
        ("1f1eb-1f1f7", "france", False),  # flag
        ("31-20e3", "keycap 1", False),
        ("1f3c3-200d-2640", "woman running", False),
        ("1f468-200d-1f469-200d-1f467", "family man woman girl", False),
    ],
)
def test_wanted(codepoints: str, name: str, expected: bool) -> None:
    assert data.wanted(codepoints, name) is expected


def test_icons_are_mapped_by_codepoint_then_name_then_alias() -> None:
    def icon_set(icons: list[str], chars: dict[str, str], aliases: dict[str, str]) -> dict:
        parents = {alias: {"parent": parent} for alias, parent in aliases.items()}
        return {"icons": {"icons": dict.fromkeys(icons), "aliases": parents}, "chars": chars}

    first = icon_set(
        ["red-apple", "bear", "two-hearts"],
        {
            "1F34E": "red-apple",
            "1f43b-fe0f": "bear",
            "1f495": "two-hearts",
            "1f496": "hearts",
            "1f497": "hearts",
        },
        {"bear-face": "bear", "hearts": "two-hearts"},
    )
    unnamed = icon_set(["redapple", "bear-face-1", "unknown", "hearts", "grizzly"], {}, {"bear": "grizzly"})
    found = data.name_subjects({"first": first, "unnamed": unnamed})
    assert found["first"]["red-apple"] == "1f34e"
    # "hearts" means several codepoints: not used
    assert found["unnamed"] == {"redapple": "1f34e", "bear-face-1": "1f43b", "grizzly": "1f43b"}
    assert data.subject_words({"first": first})["1f34e"] == "red apple"


def test_held_out_subjects_do_not_move() -> None:
    names = [f"subject {i}" for i in range(1000)]
    assert sum(map(data.held_out, names)) == 107
    assert data.held_out("temple photo")
    assert not data.held_out("cat photo")


@pytest.mark.parametrize("family", sorted(looks.FAMILIES))
def test_a_look_is_the_same_at_every_size_and_not_blank(family: str) -> None:
    look = looks.draw_look(np.random.default_rng(3), family)
    small = looks.apply(look, drawing(128), seed=1)
    assert small.shape == (128, 128, 3)
    assert small.dtype == np.uint8
    assert np.array_equal(small, looks.apply(look, drawing(128), seed=1))
    assert pool.contrast(small) > pool.BLANK
    large = cv2.resize(looks.apply(look, drawing(256), seed=1), (128, 128), interpolation=cv2.INTER_AREA)
    difference = np.abs(cv2.blur(large, (9, 9)).astype(float) - cv2.blur(small, (9, 9))).mean()
    assert difference < 12
    wide = looks.apply(look, drawing(128)[32:96], seed=1)
    assert wide.shape == (64, 128, 3)


def test_looks_are_drawn_from_the_generator_alone() -> None:
    first, again = (looks.draw_look(np.random.default_rng(5)) for _ in range(2))
    other = looks.draw_look(np.random.default_rng(6))
    assert first.words == again.words
    assert np.array_equal(first.palette, again.palette)
    assert not np.array_equal(first.palette, other.palette)
    assert first.words.startswith(first.family)
    assert set(looks.HELD_OUT_FAMILIES) < set(looks.FAMILIES)


@pytest.mark.parametrize(("rgb", "name"), [((1, 0.98, 0.98), "white"), ((0.1, 0.3, 0.85), "blue")])
def test_colours_have_names(rgb: tuple[float, ...], name: str) -> None:
    assert looks.colour_name(np.array(rgb)) == name


def test_a_shard_holds_aligned_pairs_and_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"subject {i}" for i in range(60)]
    encoded = cv2.imencode(".png", cv2.cvtColor(drawing(256), cv2.COLOR_RGBA2BGRA))[1].tobytes()
    (tmp_path / "pictures.bin").write_bytes(encoded)
    (tmp_path / "pictures.json").write_text(json.dumps([[name, "set", 0, len(encoded)] for name in names]))
    monkeypatch.setattr(pool, "POOL", tmp_path)
    monkeypatch.setattr(pool, "Pictures", lambda: data.Pictures(tmp_path))
    photo = np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)
    monkeypatch.setattr(pool, "photos", lambda: {"cat photo": photo})

    job = ("train", 4, 48, 64, 2, [*names, "cat photo"])
    assert pool.make_shard(job) == 2
    folder = tmp_path / "train-0004-48x64"
    content, target = np.load(folder / "content.npy"), np.load(folder / "target.npy")
    assert content.shape == target.shape == (2 * pool.PICTURES, 48, 64, 3)
    assert not np.array_equal(content, target)
    records = json.loads((folder / "looks.json").read_text())
    look = np.load(folder / "look.npy")
    assert look.tolist() == [record["id"] for record in records for _ in range(pool.PICTURES)]
    assert not {record["family"] for record in records} & set(looks.HELD_OUT_FAMILIES)
    subjects = np.load(folder / "subject.npy").reshape(2, pool.PICTURES)
    assert all(len(set(row)) == pool.PICTURES for row in subjects.tolist())
    assert not any(data.held_out(job[5][i]) for i in subjects.ravel())

    before = (folder / "target.npy").stat().st_mtime_ns
    pool.make_shard(job)
    assert (folder / "target.npy").stat().st_mtime_ns == before


def test_placing_keeps_the_picture_and_clears_the_rest() -> None:
    rng = np.random.default_rng(1)
    placed = pool.place(rng, drawing(256), 64, 96)
    assert placed.shape == (64, 96, 4)
    assert placed[..., 3].max() == 255
    assert (placed[..., 3] == 0).mean() > 0.3
    # no dark fringe from see-through pixels: half covered pixels keep the disc's colour
    half = (placed[..., 3] > 60) & (placed[..., 3] < 200)
    assert placed[half][:, 0].mean() > 150
