"""Free pictures to train on: emoji sets from npm (Iconify), and photographs out of scikit-image and -learn.

`python -m training.data` packs every emoji drawing as a 256 px RGBA PNG into `pictures.bin`, with
`pictures.json` as its index. A drawing belongs to a subject (one emoji codepoint sequence, named in English),
so that the same subject drawn by ten sets counts as one. The sets are pinned and their licences checked;
share-alike sets are refused.
"""

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import tarfile
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import resvg_py
from tqdm import tqdm

CACHE = Path(os.environ.get("USO_TRAIN_CACHE") or Path(__file__).parent / "cache")

# Pinned npm versions of `@iconify-json/<set>`; openmoji and emojione-v1 are CC-BY-SA and stay out.
SETS = {
    "noto": "1.2.9",
    "fluent-emoji": "1.2.7",
    "fluent-emoji-flat": "1.2.6",
    "twemoji": "1.2.5",
    "noto-v1": "1.2.5",
    "emojione": "1.2.3",
    "fluent-emoji-high-contrast": "1.2.6",
    "emojione-monotone": "1.2.1",
    "fxemoji": "1.2.2",
    "streamline-emojis": "1.2.4",
}
ALLOWED_LICENCES = {"MIT", "Apache-2.0", "CC-BY-4.0"}
PICTURE_SIZE = 256

# Photographs with a free licence only (see assets/LICENSES.md): loader module, name there, our subject name.
# scikit-image's motorcycle, moon, page and face crops are left out: their licences are not stated.
PHOTOS = [
    ("skimage", "astronaut", "astronaut photo"),
    ("skimage", "chelsea", "cat photo"),
    ("skimage", "coffee", "coffee cup photo"),
    ("skimage", "rocket", "rocket launch photo"),
    ("skimage", "camera", "cameraman photo"),
    ("skimage", "hubble_deep_field", "galaxies photo"),
    ("skimage", "coins", "coins photo"),
    ("skimage", "brick", "brick wall photo"),
    ("skimage", "grass", "grass photo"),
    ("skimage", "gravel", "gravel photo"),
    ("sklearn", "china.jpg", "temple photo"),
    ("sklearn", "flower.jpg", "flower photo"),
]
TEXTURE_PHOTOS = {"brick wall photo", "grass photo", "gravel photo"}  # grounds, not subjects
# What no training may see, by name: "subjects", "photographs", "families", "paintings", "looks".
HELD_OUT: dict[str, list[str]] = json.loads(Path(__file__).with_name("held_out.json").read_text())
_UNSEEN = frozenset(HELD_OUT["subjects"] + HELD_OUT["photographs"])


class LicenceError(RuntimeError):
    """A picture set's licence is not in ALLOWED_LICENCES."""


def check_licence(info: dict[str, Any]) -> str:
    """The SPDX licence of an Iconify `info` object. Raises LicenceError when it may not be trained on."""
    spdx = str(info.get("license", {}).get("spdx"))
    if spdx not in ALLOWED_LICENCES:
        reason = (
            "is share-alike" if "-SA" in spdx or "GPL" in spdx else "is not in the list of allowed licences"
        )
        raise LicenceError(
            f"The set {info.get('name')!r} has licence {spdx!r}, which {reason} ({sorted(ALLOWED_LICENCES)})."
            " Remove it from SETS."
        )
    return spdx


def fetch_set(name: str) -> Path:
    """Folder of the unpacked npm package of one set, fetched with `npm pack` unless it is already there."""
    version = SETS[name]
    folder = CACHE / "npm" / f"{name}-{version}"
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        package = f"@iconify-json/{name}@{version}"
        subprocess.run(["npm", "pack", "--silent", package], cwd=part, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(next(part.glob("*.tgz"))) as archive:
            archive.extractall(part, filter="data")
        part.rename(folder)
    return folder / "package"


def _read(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def wanted(codepoints: str, name: str) -> bool:
    """Whether an emoji is a subject: no skin tones, flags, keycaps, and no gendered or family variants.

    `codepoints` is hexadecimal joined by hyphens, without the variation selector FE0F.
    """
    points = [int(point, 16) for point in codepoints.split("-")]
    gendered = 0x200D in points and (0x2640 in points or 0x2642 in points)
    family = points.count(0x200D) > 1 and 0x2764 not in points
    tone = any(0x1F3FB <= point <= 0x1F3FF for point in points)
    flag = "flag" in name or any(0x1F1E6 <= point <= 0x1F1FF or point > 0xE0000 for point in points)
    return not (gendered or family or tone or flag or 0x20E3 in points or "keycap" in name)


def name_subjects(sets: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, str]]:
    """Subject of every icon: {set: {icon name: codepoints}}, from each set's `icons.json` and `chars.json`.

    Sets with `chars.json` give the codepoint. The others are matched by name, then by their own aliases,
    against the names and aliases of the first; a name that means two codepoints is not used. fxemoji writes
    names without hyphens, streamline numbers its variants (-1, -2).
    """
    by_name: dict[str, set[str]] = defaultdict(set)
    found: dict[str, dict[str, str]] = {}
    for name, files in sets.items():
        icons, aliases = files["icons"]["icons"], files["icons"].get("aliases", {})
        found[name] = {}
        for codepoints, icon in files["chars"].items():
            key = "-".join(point for point in codepoints.lower().split("-") if point != "fe0f")
            by_name[icon].add(key)
            parent = aliases.get(icon, {}).get("parent", icon)
            if parent in icons and "hFlip" not in aliases.get(icon, {}):
                found[name][parent] = key
        for alias, entry in aliases.items():
            if "hFlip" not in entry and entry["parent"] in found[name]:
                by_name[alias].add(found[name][entry["parent"]])
    unique = {name: next(iter(keys)) for name, keys in by_name.items() if len(keys) == 1}
    joined = {name.replace("-", ""): key for name, key in unique.items()}
    for name, files in sets.items():
        if files["chars"]:
            continue
        others = defaultdict(list)
        for alias, entry in files["icons"].get("aliases", {}).items():
            if "hFlip" not in entry:
                others[entry["parent"]].append(alias)
        for icon in files["icons"]["icons"]:
            for candidate in (icon, re.sub(r"-\d$", "", icon), *others[icon]):
                subject = unique.get(candidate) or joined.get(candidate.replace("-", ""))
                if subject:
                    found[name][icon] = subject
                    break
    return found


def subject_words(sets: dict[str, dict[str, dict[str, Any]]]) -> dict[str, str]:
    """{codepoints: English words}, such as "red apple", from the first set that knows the codepoint."""
    words: dict[str, str] = {}
    for files in sets.values():
        for codepoints, icon in files["chars"].items():
            key = "-".join(point for point in codepoints.lower().split("-") if point != "fe0f")
            words.setdefault(key, icon.replace("-", " "))
    return words


def held_out(subject: str) -> bool:
    """Whether a subject, drawn or photographed, is kept for evaluation."""
    return subject in _UNSEEN


def _rasterise(job: tuple[str, str, str]) -> tuple[str, str, bytes]:
    subject, name, svg = job
    try:
        return subject, name, resvg_py.svg_to_bytes(svg_string=svg, width=PICTURE_SIZE, height=PICTURE_SIZE)
    except ValueError:  # a drawing that resvg cannot read
        return subject, name, b""


def build() -> None:
    """Fetch, check, name and rasterise all sets into CACHE; a finished cache is left as it is."""
    index_path = CACHE / "pictures.json"
    if index_path.exists():
        return
    sets = {}
    for name in tqdm(SETS, desc="fetch"):
        folder = fetch_set(name)
        sets[name] = {"icons": _read(folder, "icons.json"), "chars": _read(folder, "chars.json")}
        check_licence(_read(folder, "info.json"))
    words = subject_words(sets)
    jobs = []
    for name, subjects in name_subjects(sets).items():
        icons = sets[name]["icons"]
        for icon, key in sorted(subjects.items()):
            if wanted(key, words[key]):
                entry = icons["icons"][icon]
                width, height = (entry.get(side) or icons.get(side, 16) for side in ("width", "height"))
                left, top = (entry.get(side) or 0 for side in ("left", "top"))
                svg = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                svg += f'viewBox="{left} {top} {width} {height}">{entry["body"]}</svg>'
                jobs.append((words[key], name, svg))
    index: list[list[Any]] = []
    position = 0
    with multiprocessing.Pool(2) as pool, open(CACHE / "pictures.bin", "wb") as packed:
        for subject, name, png in tqdm(pool.imap(_rasterise, jobs, 16), total=len(jobs), desc="rasterise"):
            if png:
                packed.write(png)
                index.append([subject, name, position, len(png)])
                position += len(png)
    part = index_path.with_suffix(".part")
    part.write_text(json.dumps(index))
    part.rename(index_path)


class Pictures:
    """The packed drawings: `subjects[i]`, `sets[i]` and `rgba(i)` for i < len(self)."""

    def __init__(self, folder: Path = CACHE) -> None:
        index = json.loads((folder / "pictures.json").read_text())
        self.subjects = [row[0] for row in index]
        self.sets = [row[1] for row in index]
        self._spans = [(row[2], row[3]) for row in index]
        self._bytes = np.memmap(folder / "pictures.bin", dtype=np.uint8, mode="r")

    def __len__(self) -> int:
        return len(self._spans)

    def rgba(self, i: int) -> np.ndarray:
        """Drawing i, uint8 (256, 256, 4), straight alpha."""
        start, length = self._spans[i]
        bgra = cv2.imdecode(np.asarray(self._bytes[start : start + length]), cv2.IMREAD_UNCHANGED)
        if bgra is None:
            raise ValueError(
                f"Drawing {i} of {self._bytes.filename} is not a PNG; delete the cache and build it again."
            )
        return cv2.cvtColor(bgra, cv2.COLOR_BGRA2RGBA)


@lru_cache
def photos() -> dict[str, np.ndarray]:
    """{subject: uint8 (H, W, 3)}: whole photographs, to be cropped."""
    import skimage.data
    import sklearn.datasets

    loaded = {}
    for module, name, subject in PHOTOS:
        if module == "skimage":
            picture = getattr(skimage.data, name)()
        else:
            picture = sklearn.datasets.load_sample_image(name)
        loaded[subject] = picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, axis=2)
    return loaded


if __name__ == "__main__":
    build()
    pictures = Pictures()
    subjects = set(pictures.subjects)
    print(
        f"{len(pictures)} drawings of {len(subjects)} subjects,"
        f" {sum(map(held_out, subjects))} subjects held out"
    )
