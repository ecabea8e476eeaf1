"""Two small judges of pictures: `python -m training.judges --minutes 5` trains each into assets/judges/.

The style judge says which of many looks a picture has, the subject judge which of many plain pictures it
shows. Both learn contrastively, on their own pool: drawn from another seed than the model's, so other looks
and other views of the subjects that are not held out. No loss of the model uses them or their features;
`training.evaluate` does.
"""

import multiprocessing
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from training.data import CACHE
from training.looks import FAMILIES, HELD_OUT_FAMILIES, apply, draw_look
from training.loop import Run, averaged_weights, data_rng, device, kernels_by_muon, launch, training_options
from training.pool import SIDE, Contents, write_subjects
from training.style import contrast_loss

JUDGES = Path(__file__).parents[1] / "assets" / "judges"
SEED = 77_003
LOOKS = 1600  # parametric; one in EVERY_PAINTED more is painted
EVERY_PAINTED = 8
PICTURES = 5  # a look
BATCH = 96
EMBEDDING = 96
WIDTHS = (64, 96, 160)


class Judge(nn.Module):
    """Pictures to unit vectors, by convolutions; near vectors mean an equal look (or subject).

    `spatial`: look at where things are, for subjects; else at means and deviations of features, for looks.
    """

    def __init__(self, *, spatial: bool) -> None:
        super().__init__()
        self.spatial = spatial
        self.stages = nn.ModuleList()
        before = 48
        for i, width in enumerate(WIDTHS):
            convolution = nn.Conv2d(before, width, 3, stride=1 + (i > 0), padding=1, bias=False)
            self.stages.append(nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU()))
            before = width
        features = WIDTHS[-1] * 16 if spatial else 2 * (48 + sum(WIDTHS))
        self.head = nn.Sequential(nn.BatchNorm1d(features), nn.Linear(features, EMBEDDING))

    def forward(self, pictures: Tensor) -> Tensor:
        """`(B, 3, 128, 128)` in [-1, 1] to `(B, EMBEDDING)`."""
        x = F.pixel_unshuffle(pictures, 4).contiguous(memory_format=torch.channels_last)  # (B, 48, 32, 32)
        maps = [x]
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        if self.spatial:
            features = F.adaptive_avg_pool2d(x, 4).flatten(1)  # (B, C, 8, 8) -> (B, C * 16)
        else:
            features = torch.cat([part for m in maps for part in torch.std_mean(m, (2, 3))], 1)
        return F.normalize(self.head(features), dim=1)

    @torch.inference_mode()
    def embed(self, pictures: np.ndarray) -> np.ndarray:
        """uint8 `(N, 128, 128, 3)` to float32 `(N, EMBEDDING)`."""
        return torch.cat(
            [self(as_input(part)) for part in np.array_split(pictures, -(-len(pictures) // 64))]
        ).numpy()


def as_input(pictures: np.ndarray) -> Tensor:
    """uint8 `(B, H, W, 3)` to `(B, 3, H, W)` in [-1, 1]."""
    return torch.from_numpy(pictures / np.float32(127.5) - 1).permute(0, 3, 1, 2)


def found(similar: np.ndarray, *, top: int = 5) -> np.ndarray:
    """bool (N,): whether entry i is among the `top` greatest of row i of `similar` (N, M)."""
    own = similar[np.arange(len(similar)), np.arange(len(similar))]
    return (similar > own[:, None]).sum(1) < top


def load_judges() -> dict[str, Judge]:
    """The judges of "style" and "subject"."""
    return {name: load_judge(name) for name in ("style", "subject")}


def load_judge(name: str) -> Judge:
    """The judge of "style" or "subject"."""
    judge = Judge(spatial=name == "subject").eval()
    weights = load_file(JUDGES / f"{name}.safetensors")
    judge.load_state_dict({key: value.float() for key, value in weights.items()})
    return judge


def _draw_looks(job: tuple[int, int, list[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Looks first..last of the judges' pool: contents and targets, uint8 `(L, PICTURES, 128, 128, 3)`."""
    from training.painterly import Painter, draw_painting  # needs onnxruntime, which judging does not

    first, last, names = job
    cv2.setNumThreads(1)
    contents, painter = Contents(names, unseen=False), Painter()
    families = [name for name in FAMILIES if name not in HELD_OUT_FAMILIES]
    looks = []
    for i in range(first, last):
        rng = np.random.default_rng((SEED, i))
        if i % EVERY_PAINTED == 0:
            draw = partial(painter.draw, draw_painting(rng, unseen=False))
        else:
            draw = partial(apply, draw_look(rng, families[i % len(families)]))
        rows: list[tuple[np.ndarray, np.ndarray]] = []
        while len(rows) < PICTURES:
            content, seen = contents.ground(rng, contents.draw(rng)[1])
            rows.append((content, draw(seen, seed=int(rng.integers(2**31)))))
        looks.append(rows)
    pictures = np.array(looks)  # (L, PICTURES, 2, H, W, 3)
    return pictures[:, :, 0], pictures[:, :, 1]


def load_pool(processes: int = 2, looks: int = LOOKS) -> tuple[np.ndarray, np.ndarray]:
    """The judges' pool: contents and targets `(looks, PICTURES, 128, 128, 3)`, drawn unless in the cache."""
    folder = CACHE / f"judges-{looks}"
    if not folder.exists():
        names = write_subjects()
        jobs = [(first, min(first + 50, looks), names) for first in range(0, looks, 50)]
        with multiprocessing.Pool(processes) as pool:
            parts = list(tqdm(pool.imap(_draw_looks, jobs), total=len(jobs), desc="pool"))
        partial_folder = folder.with_suffix(".part")
        partial_folder.mkdir(exist_ok=True)
        for kind, arrays in zip(("contents", "targets"), zip(*parts, strict=True), strict=True):
            np.save(partial_folder / f"{kind}.npy", np.concatenate(arrays))
        partial_folder.rename(folder)
    return np.load(folder / "contents.npy", mmap_mode="r"), np.load(folder / "targets.npy", mmap_mode="r")


def view(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """A slight crop of a uint8 `(128, 128, 3)` picture, maybe a little soft, so that no pixel decides."""
    side = int(rng.integers(112, SIDE + 1))
    top, left = rng.integers(SIDE - side + 1, size=2)
    crop = np.ascontiguousarray(picture[top : top + side, left : left + side])
    if rng.random() < 0.4:
        crop = cv2.resize(crop, (int(rng.integers(48, 112)),) * 2, interpolation=cv2.INTER_AREA)
    return cv2.resize(crop, (SIDE, SIDE), interpolation=cv2.INTER_LINEAR)


def train(name: str, minutes: float, lr: float, checkpoint: Path, seed: int) -> None:
    """One process's work: two pictures of each of BATCH looks a step; for subjects, one of them plain.

    The last tenth of the looks is left for `measured`.
    """
    contents, targets = load_pool()
    judge = Judge(spatial=name == "subject").to(device())
    run = Run(judge, kernels_by_muon(judge, lr), lr=lr, minutes=minutes, checkpoint=checkpoint)
    rng = data_rng(seed, run.step)
    while run.progress < 1:
        looks = rng.choice(len(targets) * 9 // 10, BATCH, replace=False)
        pairs = np.array([rng.choice(PICTURES, 2, replace=False) for _ in looks])
        firsts = targets[looks, pairs[:, 0]]
        seconds = targets[looks, pairs[:, 1]] if name == "style" else contents[looks, pairs[:, 0]]
        views = [np.stack([view(rng, picture) for picture in pictures]) for pictures in (firsts, seconds)]
        first, second = judge(as_input(np.concatenate(views)).to(device())).chunk(2)
        loss = contrast_loss(first, second)
        run.update(loss)
        run.show(f"{name} loss {loss.item():.3f}")


def measured(name: str, judge: Judge) -> str:
    """How often a judge finds the right look or subject among those that its training did not see."""
    contents, targets = (arrays[len(arrays) * 9 // 10 :] for arrays in load_pool())
    similar = judge.embed(targets[:, 0]) @ judge.embed(targets[:, 1] if name == "style" else contents[:, 0]).T
    return f"{name}: {found(similar, top=1).mean():.1%} found first, {found(similar).mean():.1%} in the top 5"


if __name__ == "__main__":
    parser = training_options(__doc__, minutes=5)
    a = parser.parse_args()
    load_pool(a.processes or 2)
    JUDGES.mkdir(exist_ok=True)
    for judged in ("style", "subject"):
        saved = CACHE / f"judge-{judged}.pt"
        launch(train, judged, a.minutes, a.lr, saved, a.seed, processes=a.processes, seed=a.seed)
        weights = {key: value.half().contiguous() for key, value in averaged_weights(saved).items()}
        save_file(weights, JUDGES / f"{judged}.safetensors")
        print(measured(judged, load_judge(judged)))
