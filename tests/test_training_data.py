"""The data side of training: licences, subjects, looks, pool."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from training import data, evaluate, judges, looks, painterly, pool, tells


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


def test_held_out_lists() -> None:
    """They are fixed: scores of one day stay comparable with another day's."""
    counts = {kind: len(names) for kind, names in data.HELD_OUT.items()}
    assert counts["subjects"] == 160
    assert counts["looks"] >= 120
    assert data.HELD_OUT["photographs"] == ["coffee cup photo", "temple photo"]
    assert set(looks.HELD_OUT_FAMILIES) == set(data.HELD_OUT["families"]) < set(looks.FAMILIES)
    assert set(data.HELD_OUT["paintings"]) < set(painterly.MANNERS)
    assert all(map(data.held_out, data.HELD_OUT["subjects"] + data.HELD_OUT["photographs"]))
    assert not data.held_out("cat photo")
    assert len({pool.SEED, judges.SEED, evaluate.SEED}) == 3


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


@pytest.mark.parametrize(("rgb", "name"), [((1, 0.98, 0.98), "white"), ((0.1, 0.3, 0.85), "blue")])
def test_colours_have_names(rgb: tuple[float, ...], name: str) -> None:
    assert looks.colour_name(np.array(rgb)) == name


@pytest.fixture
def subjects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A cache of one drawing for each of some subjects, seen and held out, and of two photographs."""
    names = [f"subject {i}" for i in range(40)] + data.HELD_OUT["subjects"][:20]
    encoded = cv2.imencode(".png", cv2.cvtColor(drawing(256), cv2.COLOR_RGBA2BGRA))[1].tobytes()
    (tmp_path / "pictures.bin").write_bytes(encoded)
    (tmp_path / "pictures.json").write_text(json.dumps([[name, "set", 0, len(encoded)] for name in names]))
    monkeypatch.setattr(pool, "POOL", tmp_path)
    monkeypatch.setattr(pool, "SIDE", 32)
    monkeypatch.setattr(pool, "Pictures", lambda: data.Pictures(tmp_path))
    photo = np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)
    monkeypatch.setattr(pool, "photos", lambda: {"cat photo": photo, "temple photo": photo})
    return [*names, "cat photo", "temple photo"]


def test_a_shard_holds_aligned_pairs_and_is_made_once(tmp_path: Path, subjects: list[str]) -> None:
    job = ("train", 4, 2, subjects)
    assert pool.make_shard(job) == 2
    folder = tmp_path / "train-0004"
    content, target = np.load(folder / "content.npy"), np.load(folder / "target.npy")
    assert content.shape == target.shape == (2 * pool.PICTURES, 32, 32, 3)
    assert not np.array_equal(content, target)
    records = json.loads((folder / "looks.json").read_text())
    look = np.load(folder / "look.npy")
    assert look.tolist() == [record["id"] for record in records for _ in range(pool.PICTURES)]
    rows = np.load(folder / "subject.npy").reshape(2, pool.PICTURES)
    assert all(len(set(row)) == pool.PICTURES for row in rows.tolist())

    before = (folder / "target.npy").stat().st_mtime_ns
    pool.make_shard(job)
    assert (folder / "target.npy").stat().st_mtime_ns == before


@pytest.mark.parametrize(("split", "unseen"), [("train", False), ("looks", True), ("families", True)])
def test_the_pool_never_trains_on_what_is_held_out(
    tmp_path: Path, subjects: list[str], split: str, unseen: bool
) -> None:
    pool.make_shard((split, 0, 6, subjects))
    folder = tmp_path / f"{split}-0000"
    rows = np.load(folder / "subject.npy")
    assert {data.held_out(subjects[row]) for row in rows} == {unseen}
    families = {record["family"] for record in json.loads((folder / "looks.json").read_text())}
    assert all((family in looks.HELD_OUT_FAMILIES) == (split == "families") for family in families)


def test_a_name_stands_for_one_drawing(
    tmp_path: Path, subjects: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = np.full((256, 256, 4), 255, np.uint8)
    encoded = cv2.imencode(".png", other)[1].tobytes()
    index = json.loads((tmp_path / "pictures.json").read_text())
    start = (tmp_path / "pictures.bin").stat().st_size
    with open(tmp_path / "pictures.bin", "ab") as packed:
        packed.write(encoded)
    blank = [[name, "another set", start, len(encoded)] for name in subjects[:40]]
    flat = [[name, pool.NAMED_BY, *span] for name, _, *span in index]
    (tmp_path / "pictures.json").write_text(json.dumps([*blank, *flat]))
    pool.make_shard(("named", 0, 2, subjects))
    content = np.load(tmp_path / "named-0000" / "content.npy")
    assert (content == content[0]).all()
    assert pool.contrast(content[0]) > pool.BLANK
    rows = np.load(tmp_path / "named-0000" / "subject.npy")
    assert not any(data.held_out(subjects[row]) for row in rows)


def test_training_sees_photographs_in_many_colours(subjects: list[str]) -> None:
    contents = pool.pool_contents(subjects, "train")
    rng = np.random.default_rng(0)
    red = np.zeros((90, 120, 3), np.uint8)
    red[..., 0] = 200
    contents.photos["cat photo"] = red
    drawn = [contents.draw_subject(rng, "cat photo") for _ in range(20)]
    assert len({tuple(rgba[0, 0]) for rgba in drawn}) > 10
    assert all(rgba[..., 3].min() == 255 for rgba in drawn)
    names = [subjects[contents.draw(rng)[0]] for _ in range(200)]
    assert 0.2 < names.count("cat photo") / 200 < 0.4


def test_a_part_of_a_photograph_is_another_one() -> None:
    dark, light = (np.full((pool.SIDE, pool.SIDE, 3), level, np.uint8) for level in (20, 220))
    joined = pool.join(np.random.default_rng(0), dark, light)
    assert 0.3 < (joined > 120).mean() < 0.5
    assert {joined.min(), joined.max()} == {20, 220}


def test_a_held_out_look_is_drawn_again(subjects: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    contents = pool.Contents(subjects, unseen=False)
    first = looks.draw_look(np.random.default_rng(7), "poster")
    monkeypatch.setitem(data.HELD_OUT, "looks", [first.name])
    look, _ = pool.draw_set(np.random.default_rng(7), contents, "poster")
    assert look["words"] != first.words


@pytest.mark.parametrize("family", [*tells.SCREENS, *tells.GRIDS, "blueprint", "crt screen", "reeded glass"])
def test_waves_are_those_of_the_drawing(family: str) -> None:
    """At most waves a drawing's spectrum is several times what it is nearby in other directions."""
    side = 256
    stands_out = []
    for i in range(4):
        look = looks.draw_look(np.random.default_rng(i), family)
        # some marks are of some tones
        tones = np.kron([[40, 90], [150, 215]], np.ones((side // 2, side // 2)))
        picture = np.dstack([tones, tones, tones, np.full_like(tones, 255)]).astype(np.uint8)
        drawn = looks.apply(look, picture, seed=i).astype(np.float64)
        drawn -= drawn.mean((0, 1))
        window = np.hanning(side)[:, None] * np.hanning(side)
        at = (np.arange(side) + 0.5) / side
        for x, y in tells.waves(family, look.params):
            wave = np.exp(-2j * np.pi * (x * at + y * at[:, None]))
            strength = np.abs((drawn * (window * wave)[..., None]).sum((0, 1))).max()
            radius = np.hypot(x, y) * 1.07
            around = [
                np.exp(-2j * np.pi * radius * (np.cos(t) * at + np.sin(t) * at[:, None]))
                for t in np.linspace(0.2, np.pi, 12)
            ]
            others = [np.abs((drawn * (window * each)[..., None]).sum((0, 1))).max() for each in around]
            stands_out.append(strength > 3 * np.median(others))
    assert np.mean(stands_out) > 0.7


def test_what_is_told_of_a_look() -> None:
    look = looks.draw_look(np.random.default_rng(0), "pixel art")
    record = {"family": look.family, "params": look.params, "palette": look.palette.tolist()}
    told = tells.to_be_told(record)
    phases, values, palette = np.split(told, np.cumsum(tells.PARTS)[:-1])
    cells = round(1 / look.params["cell"])
    phases = phases.reshape(tells.WAVES, 2, len(tells.PLACES), 2)
    np.testing.assert_allclose(phases[0, 0, -1, 0], np.cos(2 * np.pi * cells * 7 / 8), atol=1e-4)
    np.testing.assert_allclose(phases[0, 1, :, 0], 1)  # its columns do not change downwards
    assert np.isnan(phases[2:]).all()
    assert (~np.isnan(values)).sum() == len(look.params)
    np.testing.assert_allclose(palette.reshape(5, 3) / 2 + 0.5, look.palette, atol=1e-6)
    assert np.isnan(tells.to_be_told({"family": "painting: oil"})).all()


def test_the_evaluated_looks_are_not_in_the_pool() -> None:
    evaluated = set(data.HELD_OUT["looks"])
    families = [family for family in looks.FAMILIES if family not in looks.HELD_OUT_FAMILIES]
    for number in range(20):
        for i in range(0, 200, 10):
            rng = np.random.default_rng((pool.SEED, pool.STREAMS["train"], number, i))
            look = looks.draw_look(rng, families[(number * 7 + i) % len(families)])
            assert look.name not in evaluated


def test_paintings(tmp_path: Path, subjects: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    painterly.make_shard(("train", painterly.FIRST_SHARD, 1, subjects))
    folder = tmp_path / "train-5000"
    target = np.load(folder / "target.npy")
    assert target.shape == (pool.PICTURES, 32, 32, 3)
    assert all(map(pool.contrast, target))
    (record,) = json.loads((folder / "looks.json").read_text())
    assert record["family"].removeprefix("painting: ") in painterly.MANNERS
    assert " painting, " in record["words"]


@pytest.mark.parametrize("unseen", [False, True])
def test_painting_manners_are_held_out(unseen: bool) -> None:
    rng = np.random.default_rng(0)
    used = {
        painterly.MANNERS[i] for _ in range(200) for i in painterly.draw_painting(rng, unseen=unseen).weights
    }
    held_out = set(data.HELD_OUT["paintings"])
    assert used == (held_out if unseen else set(painterly.MANNERS) - held_out - painterly.SUBJECT_LOST)


def test_hues_turn_around_grey() -> None:
    picture = np.array([[[128, 128, 128], [200, 60, 50]]], np.uint8)
    turned = painterly.turn_hues(picture, 180)
    np.testing.assert_allclose(turned[0, 0], 128, atol=1)
    assert turned[0, 1, 0] < turned[0, 1, 2]
    np.testing.assert_allclose(painterly.turn_hues(picture, 360), picture, atol=1)


def test_placing_keeps_the_picture_and_clears_the_rest() -> None:
    rng = np.random.default_rng(1)
    placed = pool.place(rng, drawing(256))
    assert placed.shape == (128, 128, 4)
    assert placed[..., 3].max() == 255
    assert (placed[..., 3] == 0).mean() > 0.3
    # no dark fringe from see-through pixels: half covered pixels keep the disc's colour
    half = (placed[..., 3] > 60) & (placed[..., 3] < 200)
    assert placed[half][:, 0].mean() > 150
