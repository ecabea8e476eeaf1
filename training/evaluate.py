"""Measure a nano model on what no training saw: `python -m training.evaluate --folder assets/nano`.

Four sets: unseen subjects in unseen looks of known families ("looks"), of families held out ("families"),
in painting manners held out ("paintings"), and unseen photographs in unseen looks ("photographs"). The model
gets a plain picture, another subject's picture in the look, and an empty prompt, through the real pipeline;
then

    style    the style judge finds the right look in its top 5 of GALLERY, each told by OTHERS other pictures
    subject  the subject judge finds the right plain picture in its top 5 of GALLERY
    joint    both
    psnr     decibels to the truth, the look's own drawing of the plain picture
    ssim     structural similarity to it

beside the truth itself, copies of the content and of the style, the style's means and deviations of colour
given to the content (Reinhard et al., 2001), and Magenta's arbitrary style network (Ghiasi et al., 2017).
Of the first set, "looks told" are those whose style picture shows the look's ground, on which the truth is.
GALLERY is such that the truth finds itself about nine times in ten and a copy hardly more often than by
chance (5 in GALLERY). A fifth set, "words", has no content picture: prompts name subjects of the training,
alone and beside a style picture of the first set, and the subject judge has to find the right one of GALLERY
subjects, told by OTHERS drawings each. Their truth is one more drawing.

Prints tables, and one line of JSON at last. `--small` measures on the pictures in assets/judges/ alone, as
the tests do; `--record` writes the scores into assets/judges/scores.json, and without `--small` its pictures.
"""

import argparse
import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from tqdm import tqdm

from training.data import CACHE, HELD_OUT, TEXTURE_PHOTOS, Pictures, photos
from training.judges import JUDGES, Judge, found, load_judges, load_pool
from training.looks import FAMILIES, HELD_OUT_FAMILIES, apply, draw_look
from training.models import NANO
from training.pool import BLANK, SIDE, Contents, contrast, random_crop
from uso.model.pipeline import USOPipeline

EXAMPLES = CACHE / "evaluation"
SEED = 31_415  # of its looks and pictures: not that of the pool or of the judges
GALLERY = 360
OTHERS = 4
SETS = {"looks": 120, "families": 120, "paintings": 60, "photographs": 24}  # pictures
SMALL = {"looks": 24, "families": 12, "paintings": 6, "photographs": 6}  # the first of each, for the tests
METHODS = ("truth", "content copy", "style copy", "colour transfer", "Magenta", "nano")
METRICS = ("joint", "style", "subject", "psnr", "ssim")
STEPS, GUIDANCE = 12, 4.0
CONTROLS: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "guidance": tuple((str(value), {"guidance": value}) for value in (1.0, 2.0, 3.0, 4.0, 5.0)),
    "steps": tuple((str(value), {"steps": value}) for value in (4, 12, 25, 50)),
    "size": tuple(
        (f"{width}x{height}", {"width": width, "height": height})
        for width, height in ((512, 512), (1024, 1024), (1536, 1536), (512, 1536))
    ),
}
CONTROL_PICTURES = 24
PROMPTS, SMALL_PROMPTS = 60, 24


@dataclass(frozen=True)
class Examples:
    """One set: `content`, `style`, `truth`, `magenta` uint8 (N, 128, 128, 3), `subjects` str (N,).

    And a gallery of M looks and plain pictures as the judges see them, whose first N are the set's own:
    `gallery_styles` and `gallery_subjects` float32 (M, E), `gallery_names` str (M,).
    """

    content: np.ndarray
    style: np.ndarray
    truth: np.ndarray
    magenta: np.ndarray
    subjects: np.ndarray
    gallery_styles: np.ndarray
    gallery_subjects: np.ndarray
    gallery_names: np.ndarray


@dataclass(frozen=True)
class Named:
    """Names of subjects, str (N,); another drawing of each as the judge sees it, float32 (N, E); and a
    gallery of M subjects, whose first N they are, float32 (M, E)."""

    names: np.ndarray
    truth: np.ndarray
    gallery: np.ndarray


# ---------------------------------------------------------------- pictures


def families_of(name: str, count: int) -> list[str]:
    """Of the first `count` pictures of a set, other than the paintings."""
    families = [family for family in FAMILIES if (family in HELD_OUT_FAMILIES) == (name == "families")]
    return [families[i % len(families)] for i in range(count)]


def draw_set(name: str) -> dict[str, np.ndarray]:
    """Draw a set: its arrays, `others` (N, OTHERS, 128, 128, 3) in place of the gallery; bool `told` (N,).

    `told`: truth and style picture are on the look's ground, and neither on one of its own.
    """
    from training.painterly import Painter, draw_painting  # needs onnxruntime, which the small part does not

    cv2.setNumThreads(1)
    painter = Painter()
    contents = Contents(sorted(set(Pictures().subjects) | set(photos()) - TEXTURE_PHOTOS), unseen=True)
    stream = list(SETS).index(name)
    subjects = np.random.default_rng((SEED, stream)).permutation(contents.names)[: SETS[name]]
    if name == "photographs":
        subjects = np.resize(contents.subject_photos, SETS[name])
    families = families_of(name, len(subjects))
    rows, told = [], []
    for i, subject in enumerate(tqdm(subjects, desc=name)):
        rng = np.random.default_rng((SEED, stream, i))
        pictures: list[tuple[np.ndarray, np.ndarray]] = []
        while min((contrast(part) for pair in pictures for part in pair), default=0) < BLANK:
            if name == "paintings":
                draw = partial(painter.draw, draw_painting(rng, unseen=True))
            else:
                look = draw_look(rng, families[i])
                draw = partial(apply, look)
                if name != "families" and look.name not in HELD_OUT["looks"]:
                    raise ValueError(f"the look {look.name!r} is not in held_out.json: add it")
            if name == "photographs":  # most of it, for a part may be bare sky; and its look told by drawings
                crop = random_crop(rng, contents.photos[subject], least=0.7)
                drawings = [np.dstack([crop, np.full((SIDE, SIDE), 255, np.uint8)])]
                names = rng.choice(contents.names, OTHERS + 1)
                drawings += [contents.draw_subject(rng, other) for other in names]
            else:
                drawings = [contents.draw_subject(rng, subject)]
                drawings += [contents.draw(rng)[1] for _ in range(OTHERS + 1)]
            grounds = [contents.ground(rng, rgba) for rgba in drawings]
            pictures = [(content, draw(seen, seed=int(rng.integers(2**31)))) for content, seen in grounds]
        rows.append((pictures[0][0], *(target for _, target in pictures)))
        told.append(all(seen[..., 3].min() < 255 for _, seen in grounds[:2]))
    arrays = np.array(rows)  # (N, 3 + OTHERS, H, W, 3)
    magenta = [painter.imitate(row[0], row[2]) for row in arrays]
    return {
        "content": arrays[:, 0], "truth": arrays[:, 1], "style": arrays[:, 2], "others": arrays[:, 3:],
        "magenta": np.stack(magenta), "subjects": subjects, "told": np.array(told),
    }  # fmt: skip


def distractors(count: int) -> np.ndarray:
    """Crops of the photographs that are not held out, uint8 (count, 128, 128, 3)."""
    rng = np.random.default_rng(SEED)
    seen = [photo for name, photo in sorted(photos().items()) if name not in HELD_OUT["photographs"]]
    return np.stack([random_crop(rng, seen[i % len(seen)]) for i in range(count)])


def load_set(name: str) -> dict[str, np.ndarray]:
    """A set, or the "named" subjects, out of the cache, drawn first if need be."""
    path = EXAMPLES / f"{name}.npz"
    if not path.exists():
        EXAMPLES.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npz")
        np.savez(part, allow_pickle=False, **(draw_named() if name == "named" else draw_set(name)))
        part.rename(path)
    return dict(np.load(path))


def draw_named() -> dict[str, np.ndarray]:
    """GALLERY subjects of the training, `names` (GALLERY,) and `plain` (GALLERY, OTHERS + 1, 128, 128, 3)."""
    contents = Contents(sorted(set(Pictures().subjects)), unseen=False)
    rng = np.random.default_rng((SEED, len(SETS)))
    known = [name for name in contents.names if len(contents.drawings[name]) > OTHERS]
    names = rng.permutation(known)[:GALLERY]
    drawings = ((contents.draw_subject(rng, name) for _ in range(OTHERS + 1)) for name in names)
    plain = [[contents.ground(rng, drawing)[0] for drawing in row] for row in drawings]
    return {"names": names, "plain": np.array(plain)}


def pick(examples: Examples, rows: np.ndarray) -> Examples:
    """Some rows of a set, in the whole gallery."""
    gallery = np.concatenate([rows, np.setdiff1d(np.arange(GALLERY), rows)])
    return Examples(
        **{name: array[gallery if "gallery" in name else rows] for name, array in vars(examples).items()}
    )


def describe(judge: Judge, others: np.ndarray) -> np.ndarray:
    """Looks or subjects (N, E) from pictures of each, (N, OTHERS, 128, 128, 3)."""
    vectors = judge.embed(others.reshape(-1, *others.shape[2:]))
    vectors = vectors.reshape(*others.shape[:2], -1).mean(1)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def load_examples(judges: dict[str, Judge]) -> dict[str, Examples]:
    """All sets, each with its gallery filled up to GALLERY: with looks and plain pictures of the judges'
    pool, or photographs for photographs.
    """
    contents, targets = load_pool(looks=GALLERY)
    fill_styles = describe(judges["style"], targets[:, :OTHERS])
    examples = {}
    for name in SETS:
        arrays = load_set(name)
        del arrays["told"]
        missing = GALLERY - len(arrays["content"])
        plain = distractors(missing) if name == "photographs" else contents[:missing, 0]
        styles = describe(judges["style"], arrays.pop("others"))
        examples[name] = Examples(
            **arrays,
            gallery_styles=np.concatenate([styles, fill_styles[:missing]]),
            gallery_subjects=judges["subject"].embed(np.concatenate([arrays["content"], plain])),
            gallery_names=np.concatenate([arrays["subjects"], np.full(missing, "another")]),
        )
    return examples


def load_named(judge: Judge) -> Named:
    """PROMPTS subjects in a gallery of GALLERY, as the subject judge sees them."""
    arrays = load_set("named")
    truth = judge.embed(arrays["plain"][:PROMPTS, OTHERS])
    return Named(arrays["names"][:PROMPTS], truth, describe(judge, arrays["plain"][:, :OTHERS]))


def save_small(examples: dict[str, Examples], named: Named, folder: Path = JUDGES) -> None:
    """Write the first pictures of each set, the first names, and all galleries, for the tests."""
    np.savez_compressed(
        folder / "words.npz",
        names=named.names[:SMALL_PROMPTS],
        truth=named.truth[:SMALL_PROMPTS].astype(np.float16),
        gallery=named.gallery.astype(np.float16),
    )
    for name, one in examples.items():
        count = SMALL[name]
        columns = [one.content, one.style, one.truth, one.magenta]
        sheet = np.concatenate([column[:count].reshape(-1, SIDE, 3) for column in columns], axis=1)
        Image.fromarray(sheet).save(folder / f"{name}.webp", quality=95, method=4)
        np.savez_compressed(
            folder / f"{name}.npz",
            gallery_styles=one.gallery_styles.astype(np.float16),
            gallery_subjects=one.gallery_subjects.astype(np.float16),
            gallery_names=one.gallery_names,
        )


def load_small(folder: Path = JUDGES) -> dict[str, Examples]:
    """What `save_small` wrote."""
    examples = {}
    for name, count in SMALL.items():
        sheet = np.asarray(Image.open(folder / f"{name}.webp").convert("RGB"))
        content, style, truth, magenta = (
            sheet[:, i * SIDE : (i + 1) * SIDE].reshape(count, SIDE, SIDE, 3) for i in range(4)
        )
        gallery = dict(np.load(folder / f"{name}.npz"))
        subjects = gallery["gallery_names"][:count]
        examples[name] = Examples(content, style, truth, magenta, subjects, **gallery)
    return examples


def load_small_named(folder: Path = JUDGES) -> Named:
    """The names that `save_small` wrote."""
    return Named(**np.load(folder / "words.npz"))


# ---------------------------------------------------------------- methods


def transfer_colour(content: np.ndarray, style: np.ndarray) -> np.ndarray:
    """`content` with the means and deviations of `style` in CIELAB, uint8 (H, W, 3)."""
    source, other = (
        cv2.cvtColor(picture.astype(np.float32) / 255, cv2.COLOR_RGB2LAB) for picture in (content, style)
    )
    normal = (source - source.mean((0, 1))) / (source.std((0, 1)) + 1e-3)
    moved = cv2.cvtColor(normal * other.std((0, 1)) + other.mean((0, 1)), cv2.COLOR_LAB2RGB)
    return (np.clip(moved, 0, 1) * 255 + 0.5).astype(np.uint8)


def load_pipeline(folder: Path) -> USOPipeline:
    pipeline = USOPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    pipeline: USOPipeline,
    content: np.ndarray | None,
    style: np.ndarray | None,
    prompt: str = "",
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    width: int = 512,
    height: int = 512,
) -> np.ndarray:
    """The pipeline's picture from seed 0, its middle square shrunk to uint8 (128, 128, 3)."""
    image: Image.Image = pipeline(
        prompt,
        content_image=None if content is None else Image.fromarray(content),
        style_images=[] if style is None else [Image.fromarray(style)],
        width=width,
        height=height,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BOX))


def draw_all(pipeline: USOPipeline, examples: Examples, count: int, label: str, **options: Any) -> np.ndarray:
    """The first `count` pictures of a set, uint8 (count, 128, 128, 3)."""
    pairs = list(zip(examples.content[:count], examples.style[:count], strict=True))
    return np.stack([draw(pipeline, *pair, **options) for pair in tqdm(pairs, desc=label)])


def score(judges: dict[str, Judge], pictures: np.ndarray, examples: Examples) -> dict[str, float]:
    """METRICS of uint8 (n, 128, 128, 3) pictures, made for the first n of a set."""
    count = len(pictures)
    looks = judges["style"].embed(pictures) @ examples.gallery_styles.T
    subjects = judges["subject"].embed(pictures) @ examples.gallery_subjects.T
    same = examples.subjects[:count, None] == examples.gallery_names[None]
    # another picture of the same subject is no wrong answer
    same[np.arange(count), np.arange(count)] = False
    subjects[same] = -1
    style, subject = found(looks), found(subjects)
    pairs = list(zip(examples.truth[:count], pictures, strict=True))
    # 60 dB stand for equal pictures, whose ratio is infinite
    psnr = [min(peak_signal_noise_ratio(*pair), 60) if (pair[0] != pair[1]).any() else 60 for pair in pairs]
    ssim = [structural_similarity(*pair, channel_axis=2) for pair in pairs]
    values = ((style & subject).mean(), style.mean(), subject.mean(), np.mean(psnr), np.mean(ssim))
    return {metric: round(float(value), 3) for metric, value in zip(METRICS, values, strict=True)}


def score_words(
    pipeline: USOPipeline, judges: dict[str, Judge], named: Named, looks: Examples
) -> dict[str, dict[str, float]]:
    """Prompts of named subjects, alone and beside the first style pictures of a set."""
    count = len(named.names)
    scores = {"truth": {"subject": round(float(found(named.truth @ named.gallery.T).mean()), 3)}}
    for kind, styles in (("prompt", [None] * count), ("prompt and style", looks.style[:count])):
        pairs = zip(tqdm(named.names, desc=kind), styles, strict=True)
        pictures = np.stack([draw(pipeline, None, style, f"a {name}") for name, style in pairs])
        right = {"subject": found(judges["subject"].embed(pictures) @ named.gallery.T)}
        if "style" in kind:
            right["style"] = found(judges["style"].embed(pictures) @ looks.gallery_styles.T)
            right["joint"] = right["subject"] & right["style"]
        scores[kind] = {metric: round(float(each.mean()), 3) for metric, each in right.items()}
    return scores


def baselines(examples: Examples, count: int) -> dict[str, np.ndarray]:
    """Pictures of all METHODS but the last, uint8 (count, 128, 128, 3)."""
    content, style = examples.content[:count], examples.style[:count]
    transferred = np.stack([transfer_colour(*pair) for pair in zip(content, style, strict=True)])
    pictures = (examples.truth[:count], content, style, transferred, examples.magenta[:count])
    return dict(zip(METHODS, pictures, strict=False))


# ---------------------------------------------------------------- tables


def table(title: str, rows: dict[str, dict[str, float]]) -> str:
    """Rows of METRICS as a Markdown table."""
    lines = [f"| {title} | {' | '.join(METRICS)} |", "|---" * (1 + len(METRICS)) + "|"]
    for name, scores in rows.items():
        shown = [
            ("{:.1f} dB" if metric == "psnr" else "{:.2f}").format(scores[metric]) if metric in scores else ""
            for metric in METRICS
        ]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def in_grid(count: int) -> np.ndarray:
    """Which of so many pictures of a set a grid shows."""
    return np.linspace(0, count - 1, 10).astype(int)


def draw_grid(examples: dict[str, Examples], results: dict[str, np.ndarray]) -> Image.Image:
    """Ten rows of each set, two sets side by side: content, style, nano, truth, Magenta."""
    blocks = []
    for name, one in examples.items():
        chosen = in_grid(len(results[name]))
        columns = [one.content, one.style, results[name], one.truth, one.magenta]
        block = np.concatenate([column[chosen].reshape(-1, SIDE, 3) for column in columns], axis=1)
        blocks.append(np.pad(block, ((0, 16), (0, 16), (0, 0)), constant_values=255))
    return Image.fromarray(np.vstack([np.hstack(blocks[i : i + 2]) for i in range(0, len(blocks), 2)]))


def evaluate(
    pipeline: USOPipeline, judges: dict[str, Judge], examples: dict[str, Examples]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """{set: {method: {metric: value}}} over all pictures of `examples`, and nano's pictures by set."""
    scores, results = {}, {}
    for name, one in examples.items():
        count = len(one.content)
        results[name] = draw_all(pipeline, one, count, name)
        pictures = baselines(one, count) | {"nano": results[name]}
        scores[name] = {method: score(judges, pictures[method], one) for method in METHODS}
    return scores, results


def overall(scores: dict[str, Any], counts: dict[str, int]) -> dict[str, dict[str, float]]:
    """{method: {metric: value}} over the sets in `counts` together, which have so many pictures each."""
    weights = list(counts.values())
    return {
        method: {
            metric: round(
                float(np.average([scores[name][method][metric] for name in counts], weights=weights)), 3
            )
            for metric in METRICS
        }
        for method in scores[next(iter(counts))]
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=NANO, help="the model (default assets/nano)")
    parser.add_argument("--small", action="store_true", help="the committed pictures alone")
    parser.add_argument("--controls", action="store_true", help="also by guidance, steps and size")
    parser.add_argument("--grid", type=Path, help="file to write a sheet of pictures to")
    parser.add_argument("--record", action="store_true", help="write the scores beside the judges")
    a = parser.parse_args()
    start = time.monotonic()
    judges, pipeline = load_judges(), load_pipeline(a.folder)
    examples = load_small() if a.small else load_examples(judges)
    scores, results = evaluate(pipeline, judges, examples)
    if a.small:
        scores["all"] = overall(scores, SMALL)
    else:
        rows = np.flatnonzero(load_set("looks")["told"])
        told = pick(examples["looks"], rows)
        pictures = baselines(told, len(rows)) | {"nano": results["looks"][rows]}
        scores["looks told"] = {method: score(judges, pictures[method], told) for method in METHODS}
    named = load_small_named() if a.small else load_named(judges["subject"])
    if a.controls:
        looks = examples["looks"]
        for control, values in CONTROLS.items():
            scores[control] = {}
            for value, options in values:
                drawn = draw_all(pipeline, looks, CONTROL_PICTURES, f"{control} {value}", **options)
                scores[control][value] = score(judges, drawn, looks)
    scores["words"] = score_words(pipeline, judges, named, examples["looks"])
    for title, rows in scores.items():
        print(table(title, rows))
    if a.grid:
        draw_grid(examples, results).save(a.grid)
    if a.record:
        if not a.small:
            save_small(examples, named)
        path = JUDGES / "scores.json"
        recorded = json.loads(path.read_text()) if path.exists() else {}
        recorded["small" if a.small else "full"] = scores
        path.write_text(json.dumps(recorded, indent=1) + "\n")
    print(json.dumps(scores | {"seconds": round(time.monotonic() - start)}))


if __name__ == "__main__":
    main()
