"""The pool of training pictures: every look drawn on several subjects, beside the same pictures plain.

`python -m training.pool` writes shards, each a folder `CACHE/pool/<split>-<number>/` with

    content.npy  uint8 (N, 128, 128, 3)  pictures, plain
    target.npy   uint8 (N, 128, 128, 3)  the same pictures in a look
    look.npy     int64 (N,)  id of the look
    subject.npy  int64 (N,)  row of subjects.json
    looks.json   [{"id", "family", "words", "params", "palette"}, ...], of painted looks the first three; a
                 look's PICTURES rows are neighbours, in this order

and `CACHE/pool/subjects.json`: [{"name", "held_out"}, ...]. A folder appears when it is complete. Splits:
"train"; "named" (the same subjects, each always by the same drawing in the same place: what a prompt alone
shall draw); "looks" (subjects and looks not in train, families in train), "families" (subjects and families
not in train); "paintings" (subjects and paintings not in train, by `training.painterly`).
"""

import argparse
import json
import multiprocessing
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from training.data import CACHE, HELD_OUT, TEXTURE_PHOTOS, Pictures, held_out, photos
from training.looks import FAMILIES, HELD_OUT_FAMILIES, apply, draw_look, luma, plain
from training.models import NATIVE_SIDE

POOL = CACHE / "pool"
SEED = 20_262
STREAMS = {
    "train": 0,
    "looks": 1,
    "families": 2,
    "paintings": 3,
    "named": 4,
}  # of random numbers: no look is in two splits
TRAINED = ("train", "named")  # the splits that training sees
PICTURES = 8  # a look
PHOTO_SHARE = 0.12
TRAINED_PHOTO_SHARE = 0.3  # where the model learns, which sees but these few
RECOLOURED = {"photograph": 0.75, "drawing": 0.25}  # of them there
JOINED = 0.35  # of the photographs there: another one in a part of them
BLANK = 9.0  # least standard deviation of lightness, in levels, of a picture that is not near-blank
SIDE = NATIVE_SIDE
SHARD = 100  # looks
NAMED_BY = "twemoji"  # the set of the one drawing that stands for a name, if it has it: flat and simple
NAMED_SHARE = 29 / 32  # of the picture's side, which it takes


class Contents:
    """Draws content pictures: an emoji on a see-through ground, or a photograph's crop."""

    photo_share = PHOTO_SHARE

    def __init__(self, names: list[str], *, unseen: bool) -> None:
        self.pictures = Pictures()
        self.rows = {name: row for row, name in enumerate(names)}
        self.drawings = defaultdict(list)
        for i, subject in enumerate(self.pictures.subjects):
            if held_out(subject) == unseen:
                self.drawings[subject].append(i)
        self.photos = {name: photo for name, photo in photos().items() if held_out(name) == unseen}
        self.subject_photos = sorted(set(self.photos) - TEXTURE_PHOTOS)
        self.names = sorted(self.drawings)

    def draw(self, rng: np.random.Generator) -> tuple[int, np.ndarray]:
        """Row of a random subject and uint8 (SIDE, SIDE, 4)."""
        names = self.subject_photos if rng.random() < self.photo_share else self.names
        name = names[rng.integers(len(names))]
        return self.rows[name], self.draw_subject(rng, name)

    def draw_subject(self, rng: np.random.Generator, name: str) -> np.ndarray:
        """One of the subject's drawings, or a crop of its photograph, uint8 (SIDE, SIDE, 4)."""
        if name in self.photos:
            crop = random_crop(rng, self.photos[name])
            return np.dstack([crop, np.full((SIDE, SIDE), 255, np.uint8)])
        drawings = self.drawings[name]
        return place(rng, self.pictures.rgba(drawings[rng.integers(len(drawings))]))

    def ground(self, rng: np.random.Generator, rgba: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The plain picture on some ground, and the picture as a look shall draw it.

        A plain ground is replaced by the look's own; a busy one (noise, photograph) belongs to the picture.
        """
        kind = rng.choice(
            ["white", "pale", "colour", "gradient", "noise", "photo"], p=[0.56, 0.12, 0.08, 0.11, 0.03, 0.1]
        )
        if rgba[..., 3].min() == 255 or kind == "white":
            return plain(rgba, np.full(3, 255)), rgba
        busy = kind in ("noise", "photo")
        ends = rng.uniform(190 if kind == "pale" else 0, 255, (2, 3)).astype(np.float32)
        if kind == "photo":
            name = sorted(self.photos)[rng.integers(len(self.photos))]
            ground = random_crop(rng, self.photos[name])
        elif busy:
            cells = rng.integers(3, 24)
            spots = rng.random((cells, cells), np.float32)
            noise = np.asarray(cv2.resize(spots, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC))
            ground = np.clip(ends[0] + (ends[1] - ends[0]) * noise[..., None], 0, 255)
        elif kind == "gradient":
            angle = rng.uniform(0, 2 * np.pi)
            y, x = np.mgrid[:SIDE, :SIDE]
            along = np.cos(angle) * x + np.sin(angle) * y
            along = (along - along.min()) / np.ptp(along)
            ground = ends[0] + (ends[1] - ends[0]) * along[..., None]
        else:
            ground = ends[0]
        content = plain(rgba, ground)
        inside = rgba[..., 3] > 128
        seen = abs(
            float(
                luma(content[inside].astype(np.float32)).mean()
                - luma(content[~inside].astype(np.float32)).mean()
            )
        )
        if seen < 35:
            return plain(rgba, np.full(3, 255)), rgba
        return content, np.dstack([content, np.full((SIDE, SIDE), 255, np.uint8)]) if busy else rgba


class VariedContents(Contents):
    """Photographs more often; they are few, so mostly in other colours and with parts of each other."""

    photo_share = TRAINED_PHOTO_SHARE

    def draw_subject(self, rng: np.random.Generator, name: str) -> np.ndarray:
        """One of the subject's drawings, or a crop of its photograph, uint8 (SIDE, SIDE, 4)."""
        rgba = super().draw_subject(rng, name)
        photograph = name in self.photos
        if photograph and rng.random() < JOINED:
            others = sorted(self.photos)
            rgba[..., :3] = join(rng, rgba[..., :3], random_crop(rng, self.photos[rng.choice(others)]))
        if rng.random() < RECOLOURED["photograph" if photograph else "drawing"]:
            rgba[..., :3] = recolour(rng, rgba[..., :3])
        return rgba


class NamedContents(Contents):
    """Each subject by the same drawing, in the middle and on white."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(names, unseen=False)
        for drawings in self.drawings.values():
            drawings.sort(key=lambda i: self.pictures.sets[i] != NAMED_BY)

    def draw(self, rng: np.random.Generator) -> tuple[int, np.ndarray]:
        """Row of a random subject and uint8 (SIDE, SIDE, 4)."""
        name = self.names[rng.integers(len(self.names))]
        drawing = self.pictures.rgba(self.drawings[name][0])
        side = round(SIDE * NAMED_SHARE)
        return self.rows[name], put(drawing, side, (SIDE - side) // 2, (SIDE - side) // 2)

    def ground(self, rng: np.random.Generator, rgba: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The plain picture on white, and the picture as a look shall draw it."""
        return plain(rgba, np.full(3, 255)), rgba


def random_crop(rng: np.random.Generator, photo: np.ndarray, *, least: float = 0.35) -> np.ndarray:
    """A square of between `least` and all of the photograph, maybe mirrored, uint8 (SIDE, SIDE, 3)."""
    scale = min(photo.shape[:2]) / SIDE * rng.uniform(least, 1.0)
    side = int(SIDE * scale)
    top, left = rng.integers(photo.shape[0] - side + 1), rng.integers(photo.shape[1] - side + 1)
    method = cv2.INTER_AREA if scale > 1 else cv2.INTER_LINEAR
    crop = cv2.resize(
        np.ascontiguousarray(photo[top : top + side, left : left + side]),
        (SIDE, SIDE),
        interpolation=method,
    )
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def join(rng: np.random.Generator, picture: np.ndarray, other: np.ndarray) -> np.ndarray:
    """`other` in two fifths of `picture`, in smooth spots; all uint8 (SIDE, SIDE, 3)."""
    spots = cv2.resize(rng.random((4, 4), np.float32), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    share = np.clip((spots - np.quantile(spots, 0.6)) * rng.uniform(4, 60) + 0.5, 0, 1)[..., None]
    return (picture + share * (other.astype(np.float32) - picture) + 0.5).astype(np.uint8)


def recolour(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """Another hue, saturation, gamma and tint, uint8 (SIDE, SIDE, 3)."""
    rgb = picture.astype(np.float32) / 255
    grey = luma(rgb)[..., None]
    turn = cv2.Rodrigues(np.full(3, rng.normal(0, 0.8) / 3**0.5))[0].astype(np.float32)  # about the greys
    rgb = grey ** np.exp(rng.normal(0, 0.3)) + rng.uniform(0.3, 1.4) * (rgb - grey) @ turn.T
    rgb *= np.exp(rng.normal(0, 0.3, 3)).astype(np.float32)
    return (np.clip(rgb, 0, 1) * 255 + 0.5).astype(np.uint8)


def place(rng: np.random.Generator, rgba: np.ndarray) -> np.ndarray:
    """A drawing scaled, shifted and maybe mirrored on an empty uint8 (SIDE, SIDE, 4)."""
    side = round(SIDE * rng.uniform(0.68, 1.04))
    if rng.random() < 0.5:
        rgba = rgba[:, ::-1]
    top, left = (
        (SIDE - side) // 2 + int(rng.uniform(-1, 1) * (abs(SIDE - side) / 2 + 0.04 * side)) for _ in range(2)
    )
    return put(rgba, side, top, left)


def put(rgba: np.ndarray, side: int, top: int, left: int) -> np.ndarray:
    """A drawing of `side` pixels with its corner at (top, left) of an empty uint8 (SIDE, SIDE, 4)."""
    solid = rgba.astype(np.float32)
    solid[..., :3] *= solid[..., 3:] / 255  # premultiplied, or transparent pixels' colour would bleed in
    small = cv2.resize(
        solid, (side, side), interpolation=cv2.INTER_AREA if side <= rgba.shape[0] else cv2.INTER_LINEAR
    )
    small[..., :3] = np.clip(small[..., :3] * 255 / np.maximum(small[..., 3:], 1), 0, 255)
    out = np.zeros((SIDE, SIDE, 4), np.uint8)
    y0, x0, y1, x1 = max(top, 0), max(left, 0), min(top + side, SIDE), min(left + side, SIDE)
    out[y0:y1, x0:x1] = small[y0 - top : y1 - top, x0 - left : x1 - left] + 0.5
    return out


def contrast(picture: np.ndarray) -> float:
    """Standard deviation of a picture's lightness, in levels of 255."""
    return float(luma(picture.astype(np.float32)).std())


Rows = list[tuple[np.ndarray, np.ndarray, int]]


def draw_rows(rng: np.random.Generator, contents: Contents, draw: Callable[..., np.ndarray]) -> Rows | None:
    """PICTURES of (content, target, subject row), all of other subjects; None if near-blank.

    `draw(rgba, seed=...)` draws a uint8 (SIDE, SIDE, 4) picture in the look.
    """
    rows: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    misses = 0
    while len(rows) < PICTURES:
        row, rgba = contents.draw(rng)
        content, seen = contents.ground(rng, rgba)
        target = draw(seen, seed=int(rng.integers(2**31)))
        if contrast(content) < BLANK or contrast(target) < BLANK:
            misses += 1
            if misses > PICTURES:
                return None
        elif row not in rows:
            rows[row] = content, target
    return [(content, target, row) for row, (content, target) in rows.items()]


def draw_set(rng: np.random.Generator, contents: Contents, family: str) -> tuple[dict[str, Any], Rows]:
    """What `looks.json` tells of a look but its id, and its rows."""
    while True:
        look = draw_look(rng, family)
        rows = draw_rows(rng, contents, partial(apply, look))
        if rows is not None and look.name not in HELD_OUT["looks"]:
            return {
                "family": look.family,
                "words": look.words,
                "params": look.params,
                "palette": look.palette.tolist(),
            }, rows


def write_shard(
    split: str,
    number: int,
    count: int,
    draw: Callable[[int, np.random.Generator], tuple[dict[str, Any], Rows]],
) -> None:
    """Write a shard of `count` looks unless it exists; `draw` gives what is told of look i, and its rows."""
    folder = POOL / f"{split}-{number:04d}"
    if folder.exists():
        return
    part = folder.with_name(f".{folder.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    shape = (count * PICTURES, SIDE, SIDE, 3)
    arrays = [
        np.lib.format.open_memmap(part / name, "w+", np.uint8, shape)
        for name in ("content.npy", "target.npy")
    ]
    look_ids, subject_rows, records = [], [], []
    for i in range(count):
        look, rows = draw(i, np.random.default_rng((SEED, STREAMS[split], number, i)))
        identity = STREAMS[split] * 100_000_000 + number * 1000 + i
        records.append({"id": identity, **look})
        for j, (content, target, row) in enumerate(rows):
            arrays[0][i * PICTURES + j], arrays[1][i * PICTURES + j] = content, target
            look_ids.append(identity)
            subject_rows.append(row)
    np.save(part / "look.npy", np.array(look_ids))
    np.save(part / "subject.npy", np.array(subject_rows))
    (part / "looks.json").write_text(json.dumps(records))
    part.rename(folder)


def pool_contents(names: list[str], split: str) -> Contents:
    """What a split draws from."""
    if split == "named":
        return NamedContents(names)
    return VariedContents(names, unseen=False) if split == "train" else Contents(names, unseen=True)


def make_shard(job: tuple[str, int, int, list[str]]) -> int:
    """Draw one shard of parametric looks unless it exists; the number of its looks."""
    split, number, count, names = job
    cv2.setNumThreads(1)
    families = [name for name in FAMILIES if (name in HELD_OUT_FAMILIES) == (split == "families")]
    contents = pool_contents(names, split)

    def draw(i: int, rng: np.random.Generator) -> tuple[dict[str, Any], Rows]:
        return draw_set(rng, contents, families[(number * 7 + i) % len(families)])

    write_shard(split, number, count, draw)
    return count


def write_subjects() -> list[str]:
    """Write `subjects.json`; the subjects' names, by row."""
    POOL.mkdir(parents=True, exist_ok=True)
    names = sorted(set(Pictures().subjects) | set(photos()) - TEXTURE_PHOTOS)
    subjects = [{"name": name, "held_out": held_out(name)} for name in names]
    (POOL / "subjects.json").write_text(json.dumps(subjects))
    return names


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--looks", type=int, default=4000, help="looks to train on (default 4000)")
    parser.add_argument("--named", type=int, default=1600, help="looks on named drawings (default 1600)")
    parser.add_argument("--first", type=int, default=0, help="shards of looks to leave out, known by now")
    parser.add_argument("--processes", type=int, default=2, help="worker processes (default 2)")
    args = parser.parse_args()
    names = write_subjects()
    jobs = [
        (split, args.first + i, SHARD, names)
        for split, looks in (("train", args.looks), ("named", args.named))
        for i in range(-(-looks // SHARD))
    ]
    jobs[4:4] = [(split, 0, 120, names) for split in ("looks", "families")]
    with (
        multiprocessing.Pool(args.processes) as pool,
        tqdm(total=sum(job[2] for job in jobs), unit="look") as bar,
    ):
        for count in pool.imap_unordered(make_shard, jobs):
            bar.update(count)


if __name__ == "__main__":
    main()
