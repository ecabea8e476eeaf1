"""Parametric looks: picture styles drawn with NumPy and OpenCV, from which the nano model learns style.

A look is a family (halftone, papercut, ...) with parameters and a palette drawn from a seed. `apply` draws
any picture in it; the same look gives the same palette, texture and ground on every subject, so one or two
pictures tell what it is. Lengths are parts of the shorter side, so that a look is the same at 128 and at 256
px.

A family is a function of a `Scene` and of its declared parameters, registered by `@family`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np

from training.data import HELD_OUT

Array = np.ndarray

COLOUR_NAMES = {
    "black": 0x101010, "charcoal": 0x3A3A3E, "grey": 0x858585, "silver": 0xC4C4C8, "white": 0xFAFAFA,
    "maroon": 0x6B1020, "red": 0xD9262B, "salmon": 0xF08878, "pink": 0xF7B6C8, "hot pink": 0xF0489A,
    "magenta": 0xC81FB4, "plum": 0x6A2358, "purple": 0x7B35B8, "violet": 0xA678E8, "lavender": 0xD4C6F2,
    "indigo": 0x35258A, "navy": 0x14204E, "blue": 0x2458D8, "sky blue": 0x78B8F0, "pale blue": 0xCBE2F5,
    "cyan": 0x25C8E0, "teal": 0x12807E, "turquoise": 0x48CFB8, "mint": 0xBFEBD2, "dark green": 0x12432A,
    "green": 0x2E9E48, "lime": 0x98D830, "pale green": 0xD5EBB0, "olive": 0x6E7024, "yellow": 0xF5D928,
    "cream": 0xFAF0CE, "gold": 0xD0A02C, "beige": 0xE2CFA8, "tan": 0xB98F60, "brown": 0x6E4424,
    "dark brown": 0x35200F, "orange": 0xF08A24, "peach": 0xFBCFA6, "rust": 0xAE4A1C,
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    """One style.

    `palette`: float32 (5, 3) sRGB in [0, 1]: ink (dark), paper (light), three accents. `dark`: the ground is
    the ink and not the paper. `words` describe it in a prompt, such as "halftone, navy and cream".
    """

    family: str
    seed: int
    params: dict[str, Any]
    palette: Array
    dark: bool
    words: str

    @property
    def name(self) -> str:
        """What tells this look from all others."""
        return f"{self.family} {self.seed}"


# ---------------------------------------------------------------- colours


def _oklab_to_rgb(lab: Array) -> Array:
    """(..., 3) OKLab -> sRGB in [0, 1], clipped (Ottosson 2020, bottosson.github.io/posts/oklab)."""
    lab_to_lms = np.array([[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728],
                           [1, -0.0894841775, -1.2914855480]])  # fmt: skip
    lms_to_rgb = np.array([[4.0767416621, -3.3077115913, 0.2309699292],
                           [-1.2684380046, 2.6097574011, -0.3413193965],
                           [-0.0041960863, -0.7034186147, 1.7076147010]])  # fmt: skip
    linear = np.clip((lab @ lab_to_lms.T) ** 3 @ lms_to_rgb.T, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def _draw_palette(rng: np.random.Generator) -> Array:
    """float32 (5, 3) sRGB: ink, paper and three accents in one colour scheme."""
    hue = rng.uniform(0, 360)
    schemes = [
        (0, 12, -14),
        (0, 35, -35),
        (0, 180, 25),
        (0, 150, 210),
        (0, 120, 240),
        (0, 60, 190),
        (0, 90, 270),
    ]
    offsets = schemes[rng.integers(len(schemes))]
    lch = np.array(
        [
            (rng.uniform(0.1, 0.36), rng.uniform(0, 0.13), hue + rng.choice(offsets) + rng.uniform(-20, 20)),
            (rng.uniform(0.84, 0.98), rng.uniform(0, 0.11), hue + rng.choice(offsets) + rng.uniform(-20, 20)),
            *((rng.uniform(0.45, 0.82), rng.uniform(0.1, 0.25), hue + offset) for offset in offsets),
        ]
    )
    angle = np.deg2rad(lch[:, 2])
    lab = np.stack([lch[:, 0], lch[:, 1] * np.cos(angle), lch[:, 1] * np.sin(angle)], 1)
    return _oklab_to_rgb(lab).astype(np.float32)


def _to_lab(rgb: Array) -> Array:
    return cv2.cvtColor(np.asarray(rgb, np.float32).reshape(1, -1, 3), cv2.COLOR_RGB2LAB)[0]


def colour_name(rgb: Array) -> str:
    """The nearest of COLOUR_NAMES to an sRGB colour in [0, 1]."""
    named = [
        ((code >> 16) / 255, (code >> 8 & 255) / 255, (code & 255) / 255) for code in COLOUR_NAMES.values()
    ]
    distance = np.linalg.norm(_to_lab(np.array(named)) - _to_lab(rgb), axis=1)
    return list(COLOUR_NAMES)[int(distance.argmin())]


def ramp(tone: Array, colours: Array) -> Array:
    """Gradient map: tone (H, W) in [0, 1] through evenly spaced colours (N, 3) -> (H, W, 3)."""
    stops, at = np.linspace(0, 1, len(colours)), np.linspace(0, 1, 256)
    table = np.stack([np.interp(at, stops, colours[:, c]) for c in range(3)], 1).astype(np.float32)
    return table[(np.clip(tone, 0, 1) * 255).astype(np.uint8)]


def luma(rgb: Array) -> Array:
    return rgb @ np.array([0.299, 0.587, 0.114], np.float32)


# ---------------------------------------------------------------- drawing tools


def soft(x: Array, width: float) -> Array:
    """An antialiased step at 0: 0 below, 1 above, `width` wide in the unit of x."""
    return np.clip(x / max(width, 1e-6) + 0.5, 0, 1)


def mix(a: Array, b: Array, weight: Array | float) -> Array:
    """a where weight is 0, b where it is 1; a weight map (H, W) is spread over colour."""
    if isinstance(weight, np.ndarray) and weight.ndim == 2:
        weight = weight[..., None]
    return a + (b - a) * weight


def blur(x: Array, sigma: float) -> Array:
    return cv2.GaussianBlur(x, (0, 0), max(sigma, 0.3))


@lru_cache(maxsize=8)
def _grid(height: int, width: int) -> tuple[Array, Array]:
    side = min(height, width)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    return (y + 0.5) / side, (x + 0.5) / side


@lru_cache(maxsize=256)
def _motion_kernel(length: int, angle: float) -> Array:
    kernel = np.zeros((length | 1, length | 1), np.float32)
    centre = (length | 1) // 2
    dx, dy = math.cos(math.radians(angle)) * centre, math.sin(math.radians(angle)) * centre
    start, end = (round(centre - dx), round(centre - dy)), (round(centre + dx), round(centre + dy))
    cv2.line(kernel, start, end, 1.0)
    return kernel / kernel.sum()


class Scene:
    """One picture to be drawn in one look.

    `alpha` (H, W), `rgb` (H, W, 3) over the look's ground colour, `tone` (H, W) its lightness over black or
    white, all float32 in [0, 1]; `side` = shorter side in px; `x`, `y` in units of it; `px` = one pixel in
    that unit.
    """

    def __init__(self, look: Look, rgba: Array, seed: int) -> None:
        self.look = look
        self.height, self.width = rgba.shape[:2]
        self.side = min(rgba.shape[:2])
        self.px = 1 / self.side
        self.y, self.x = _grid(self.height, self.width)
        self.rng = np.random.default_rng((look.seed, seed))
        self.ink, self.paper, self.a, self.b, self.c = look.palette
        self.ground, self.mark = (self.ink, self.paper) if look.dark else (self.paper, self.ink)
        self.alpha = rgba[..., 3].astype(np.float32) / 255
        colour = rgba[..., :3].astype(np.float32) / 255
        tone = luma(colour)
        inside = self.alpha > 0.5
        if inside.any():
            if look.dark and tone[inside].mean() < 0.22:
                # a black drawing would vanish on a dark ground: turn it over
                colour = 1 - colour
                tone = 1 - tone
            # pale and dark pictures get a middle tone, or they would be near-blank in one-colour looks
            middle = float(np.clip(np.median(tone[inside]), 0.02, 0.98))
            tone = tone ** float(np.clip(math.log(0.5) / math.log(middle), 0.65, 2.0))
        self.tone = tone * self.alpha if look.dark else tone * self.alpha + 1 - self.alpha
        self.rgb = mix(np.broadcast_to(self.ground, colour.shape), colour, self.alpha)

    def noise(self, scale: float) -> Array:
        """Smooth noise (H, W), mean 0, deviation 1, in spots of `scale` of the side."""
        height, width = (max(2, int(n * self.px / scale) + 2) for n in (self.height, self.width))
        small = self.rng.standard_normal((height, width), np.float32)
        return cv2.resize(small, (self.width, self.height), interpolation=cv2.INTER_CUBIC)

    def grain(self) -> Array:
        """Fine noise (H, W), deviation 1, of about 1/128 of the side."""
        return (
            self.noise(1 / 128)
            if self.side > 160
            else self.rng.standard_normal((self.height, self.width), np.float32)
        )

    def strokes(self, length: float, angle: float) -> Array:
        """Noise (H, W) of strokes `length` of the side long, deviation about 1."""
        steps = max(3, int(length * self.side))
        return cv2.filter2D(self.grain(), -1, _motion_kernel(steps, angle)) * math.sqrt(steps)

    def flat(self, colour: Array) -> Array:
        return np.broadcast_to(colour, (self.height, self.width, 3)).astype(np.float32)

    def colours(self) -> Array:
        """The palette (5, 3) from dark to light."""
        return self.look.palette[np.argsort(luma(self.look.palette))]

    def graded(self, strength: float) -> Array:
        """The picture's own colours drawn towards the palette's ramp."""
        return mix(self.rgb, ramp(self.tone, self.colours()), strength)

    def edges(self, thickness: float, sensitivity: float = 1.0) -> Array:
        """Contour lines (H, W) in [0, 1] of the picture, `thickness` of the side wide."""
        stack = np.dstack([self.rgb, self.alpha])
        stack = blur(stack, max(0.6, thickness * self.side * 0.35))
        force = np.hypot(cv2.Sobel(stack, -1, 1, 0), cv2.Sobel(stack, -1, 0, 1)).max(axis=2)
        force *= max(1.0, thickness * self.side * 0.5) * sensitivity
        return soft(force - 0.5, 0.5)

    def cut_out(self) -> Array:
        """The picture's alpha; for a photograph, which has none, a card with a margin around it."""
        if self.alpha.min() < 0.5:
            return self.alpha
        border = np.minimum(
            np.minimum(self.x, self.x.max() - self.x), np.minimum(self.y, self.y.max() - self.y)
        )
        return soft(border - 0.11, 2 * self.px)

    def rotated(self, angle: float) -> tuple[Array, Array]:
        """Coordinates (u, v) in units of the side, turned by `angle` degrees."""
        cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        return self.x * cosine + self.y * sine, self.y * cosine - self.x * sine

    def warp(self, picture: Array, dx: Array, dy: Array) -> Array:
        """`picture` displaced by (dx, dy) in units of the side."""
        map_x = ((self.x + dx) * self.side - 0.5).astype(np.float32)
        map_y = ((self.y + dy) * self.side - 0.5).astype(np.float32)
        return cv2.remap(picture, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)

    def cells(self, cell: float) -> tuple[int, int, Array, Array]:
        """A grid of square cells of about `cell`: rows, columns, and (H, W) cell coordinates v, u (their
        integer part is the cell's row or column).
        """
        rows = max(4, round(self.height * self.px / cell))
        columns = max(4, round(self.width * self.px / cell))
        v = self.y * (rows / (self.height * self.px))
        u = self.x * (columns / (self.width * self.px))
        return rows, columns, v, u

    def per_cell(self, picture: Array, rows: int, columns: int, v: Array, u: Array) -> Array:
        """Mean of `picture` in each cell, spread over the cell."""
        small = cv2.resize(np.ascontiguousarray(picture), (columns, rows), interpolation=cv2.INTER_AREA)
        return small[np.minimum(v.astype(int), rows - 1), np.minimum(u.astype(int), columns - 1)]

    def voronoi(self, cell: float, jitter: float = 1.0) -> tuple[Array, Array, Array, int]:
        """Cells around jittered grid points: index (H, W), distance to the nearest and to the second nearest
        point in units of `cell`, and the number of cells.
        """
        rows, columns, v, u = self.cells(cell)
        points = self.rng.uniform(0.5 - jitter / 2, 0.5 + jitter / 2, (rows + 2, columns + 2, 2)).astype(
            np.float32
        )
        row, column = v.astype(int), u.astype(int)
        best = np.full(v.shape, 9.0, np.float32)
        second = best.copy()
        index = np.zeros(v.shape, int)
        for i in range(3):
            for j in range(3):
                at = points[row + i, column + j]
                distance = np.hypot(row + i - 1 + at[..., 0] - v, column + j - 1 + at[..., 1] - u)
                closer = distance < best
                second = np.where(closer, best, np.minimum(second, distance))
                index = np.where(closer, (row + i) * (columns + 2) + column + j, index)
                best = np.where(closer, distance, best)
        return index, best, second, (rows + 2) * (columns + 2)

    def mean_by(self, index: Array, count: int, picture: Array) -> Array:
        """Mean of `picture` over the pixels of equal index, spread back."""
        flat = index.ravel()
        number = np.maximum(np.bincount(flat, minlength=count), 1)
        means = [np.bincount(flat, picture[..., c].ravel(), count) / number for c in range(3)]
        return np.stack(means, 1).astype(np.float32)[index]

    def nearest(self, picture: Array, colours: Array) -> Array:
        """Every pixel's nearest of `colours` (N, 3)."""
        distance = [((picture - colour) ** 2).sum(-1) for colour in colours]
        return colours[np.argmin(distance, axis=0)]

    def relief(self, heights: Array, depth: float, angle: float) -> Array:
        """Light (H, W) from `angle` degrees over a height map: 0 in shade, 0.5 flat, 1 lit."""
        smooth = blur(heights, 0.008 * self.side)
        slope_x, slope_y = cv2.Sobel(smooth, -1, 1, 0), cv2.Sobel(smooth, -1, 0, 1)
        slope = slope_x * math.cos(math.radians(angle)) + slope_y * math.sin(math.radians(angle))
        return 0.5 + 0.5 * np.tanh(slope * depth * self.side / 128)

    def flow(self, picture: Array, length: float, angle: float, follow: float) -> Array:
        """`picture` smeared along its contours (`follow` = 1) or along `angle` degrees (0)."""
        tone = blur(self.tone, 0.03 * self.side)
        slope_x, slope_y = cv2.Sobel(tone, -1, 1, 0), cv2.Sobel(tone, -1, 0, 1)
        bend = self.noise(0.3) * 40
        vx = np.cos(np.deg2rad(angle + bend)) * (1 - follow) * 0.06 - slope_y * follow
        vy = np.sin(np.deg2rad(angle + bend)) * (1 - follow) * 0.06 + slope_x * follow
        # doubled angles average without cancelling, so that strokes of opposite sense agree
        double = blur(np.dstack([vx**2 - vy**2, 2 * vx * vy]), 0.03 * self.side)
        direction = np.arctan2(double[..., 1], double[..., 0]) / 2
        dx, dy = np.cos(direction), np.sin(direction)
        out = picture.copy()
        for step in np.linspace(-length, length, 7):
            if step:
                out += self.warp(picture, dx * step, dy * step)
        return out / 7


Draw = Callable[..., Array]


@dataclass(frozen=True)
class Family:
    """A registered family; the fields are those of `family`."""

    draw: Draw
    ranges: dict[str, tuple[Any, ...]]
    named: str
    dark: float


FAMILIES: dict[str, Family] = {}
HELD_OUT_FAMILIES = tuple(HELD_OUT["families"])


def family(
    name: str, named: str = "ground mark", dark: float = 0.35, **ranges: tuple[Any, ...]
) -> Callable[[Draw], Draw]:
    """Register a drawing function. A range is (low, high) floats to draw between, or a tuple of choices
    otherwise. `dark` is the share of looks on a dark ground; `named` the palette entries that its words
    tell.
    """

    def register(draw: Draw) -> Draw:
        FAMILIES[name] = Family(draw, ranges, named, dark)
        return draw

    return register


def draw_look(rng: np.random.Generator, family: str | None = None) -> Look:
    """A new look, of a family drawn evenly unless it is given (KeyError when it is not in FAMILIES)."""
    name = family or list(FAMILIES)[rng.integers(len(FAMILIES))]
    record = FAMILIES[name]
    seed = int(rng.integers(2**31))
    palette = _draw_palette(rng)
    dark = bool(rng.random() < record.dark)
    params = {}
    for key, values in record.ranges.items():
        if len(values) == 2 and all(isinstance(value, float) for value in values):
            params[key] = float(rng.uniform(*values))
        else:
            params[key] = values[rng.integers(len(values))]
    ink, paper, a, b, c = palette
    entries = {"ground": ink if dark else paper, "mark": paper if dark else ink, "ink": ink, "paper": paper}
    entries |= {"a": a, "b": b, "c": c}
    names = list(dict.fromkeys(colour_name(entries[key]) for key in record.named.split()))
    words = name if not names else f"{name}, {', '.join(names[:-1])}{' and ' if names[1:] else ''}{names[-1]}"
    return Look(name, seed, params, palette, dark, words)


def apply(look: Look, rgba: Array, *, seed: int) -> Array:
    """Draw a picture in a look: uint8 (H, W, 4), straight alpha -> uint8 (H, W, 3). `seed` moves only
    details.
    """
    scene = Scene(look, rgba, seed)
    drawn = FAMILIES[look.family].draw(scene, **look.params)
    return (np.clip(drawn, 0, 1) * 255 + 0.5).astype(np.uint8)


def plain(rgba: Array, ground: Array) -> Array:
    """A picture as it is, on `ground`: a colour (3,) or a picture (H, W, 3), uint8 -> uint8 (H, W, 3)."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    return (rgba[..., :3] * alpha + ground * (1 - alpha) + 0.5).astype(np.uint8)


# ---------------------------------------------------------------- print


@family("duotone", "ink paper", dark=0.0, gamma=(0.6, 1.5), grain=(0.02, 0.09))
def duotone(s: Scene, gamma: float, grain: float) -> Array:
    return ramp(s.tone**gamma + s.grain() * grain, np.stack([s.ink, s.paper]))


@family("gradient map", "a b c", levels=(0.0, 0.1))
def gradient_map(s: Scene, levels: float) -> Array:
    return ramp(s.tone + s.noise(0.4) * levels, np.stack([s.ink, s.a, s.b, s.c, s.paper]))


@family("poster", "a b ground", levels=(4, 5))
def poster(s: Scene, levels: int) -> Array:
    tone = blur(s.tone, 0.012 * s.side)
    out = s.flat(s.ink)
    colours = s.colours()[np.linspace(0, 4, levels).round().astype(int)]
    for i in range(1, levels):
        out = mix(out, colours[i], soft(tone - i / levels, 0.04))
    return mix(s.flat(s.ground), out, soft(s.alpha - 0.5, 0.3))


@family("halftone", "ground mark", cell=(0.022, 0.05), angle=(0.0, 90.0), bleed=(0.9, 1.2))
def halftone(s: Scene, cell: float, angle: float, bleed: float) -> Array:
    u, v = s.rotated(angle)
    tone = blur(s.tone, cell * s.side * 0.35)
    wave = (np.cos(2 * np.pi * u / cell) + np.cos(2 * np.pi * v / cell)) / 4 + 0.5
    cover = tone if s.look.dark else 1 - tone
    # the wave's values are not even: this threshold makes the covered area about equal to the wanted tone
    return mix(
        s.flat(s.ground), s.mark, soft(wave - (1 - cover * bleed * 0.9 - 0.02), 4 * s.px / cell * 0.45)
    )


@family("pop art", "a b ground", dark=0.0, cell=(0.03, 0.055), line=(0.012, 0.025), angle=(20.0, 70.0))
def pop_art(s: Scene, cell: float, line: float, angle: float) -> Array:
    u, v = s.rotated(angle)
    dots = soft((np.cos(2 * np.pi * u / cell) + np.cos(2 * np.pi * v / cell)) / 4 + 0.5 - 0.55, 0.25)
    out = s.nearest(blur(s.graded(0.45), 0.01 * s.side), np.stack([s.a, s.b, s.c, s.paper, s.ink]))
    middle = (s.tone > 0.35) & (s.tone < 0.8)
    out = mix(out, s.paper, dots * middle * 0.9)
    out = mix(mix(s.flat(s.paper), s.c, dots), out, soft(s.alpha - 0.5, 0.3))
    return mix(out, np.full(3, 0.05, np.float32), s.edges(line))


@family("risograph", "a b paper", dark=0.0, shift=(0.012, 0.035), angle=(0.0, 360.0), grain=(0.12, 0.3))
def risograph(s: Scene, shift: float, angle: float, grain: float) -> Array:
    dx, dy = shift * math.cos(math.radians(angle)), shift * math.sin(math.radians(angle))
    red = s.warp(s.rgb[..., 0] * s.alpha + 1 - s.alpha, s.x * 0 + dx, s.y * 0 + dy)
    first = 1 - red
    second = 1 - (s.rgb[..., 2] * s.alpha + 1 - s.alpha)
    out = s.flat(s.paper)
    for cover, colour in ((first, s.a), (second, s.b)):
        cover = soft(cover + s.grain() * grain - 0.4, 0.9)
        out = out * mix(np.ones(3, np.float32), colour, cover * 0.92)
    return out


@family("newsprint", "paper ink", dark=0.0, cell=(0.02, 0.035), angle=(30.0, 60.0), shift=(0.006, 0.02))
def newsprint(s: Scene, cell: float, angle: float, shift: float) -> Array:
    out = s.flat(s.paper) * (1 + 0.03 * s.noise(0.02)[..., None])
    picture = s.graded(0.25) * s.alpha[..., None] + 1 - s.alpha[..., None]
    for channel, turn in ((0, 15), (1, 75), (2, 0)):
        u, v = s.rotated(angle + turn)
        u = u + shift * channel
        wave = (np.cos(2 * np.pi * u / cell) + np.cos(2 * np.pi * v / cell)) / 4 + 0.5
        cover = 1 - blur(picture[..., channel], cell * s.side * 0.3)
        dot = soft(wave - (1 - cover * 0.9), 1.8 * s.px / cell)
        colour = np.ones(3, np.float32)
        colour[channel] = 0.15
        out = out * mix(np.ones(3, np.float32), colour, dot)
    return mix(out, s.ink, s.edges(0.012) * 0.8)


# ---------------------------------------------------------------- drawing


@family("pencil sketch", "paper ink", dark=0.0, radius=(0.02, 0.06), angle=(20.0, 160.0), colour=(0.0, 0.5))
def pencil_sketch(s: Scene, radius: float, angle: float, colour: float) -> Array:
    dodge = np.clip(s.tone / (blur(s.tone, radius * s.side) + 0.02), 0, 1) ** 2.5
    stroke = s.strokes(0.06, angle)
    shade = soft(0.75 - s.tone + 0.35 * stroke, 0.8) * 0.75
    dark = np.maximum(1 - dodge, shade * s.alpha)
    mark = mix(s.flat(s.ink), s.rgb, colour)
    return mix(s.flat(s.paper) * (1 + 0.02 * s.grain()[..., None]), mark, dark)


@family("crosshatch", "ground mark", spacing=(0.022, 0.04), angle=(0.0, 180.0), wobble=(0.0, 0.01))
def crosshatch(s: Scene, spacing: float, angle: float, wobble: float) -> Array:
    tone = s.tone if not s.look.dark else 1 - s.tone
    lines = np.zeros_like(tone)
    bend = s.noise(0.15) * wobble
    for turn, level in ((0, 0.85), (90, 0.6), (45, 0.4), (135, 0.22)):
        _, v = s.rotated(angle + turn)
        phase = np.abs(((v + bend) / spacing) % 1 - 0.5) * spacing
        thickness = np.clip((level - tone) * 1.2, 0, 0.4) * spacing * 0.55 + 0.0025
        lines = np.maximum(lines, soft(thickness - phase, 1.2 * s.px) * soft(level - tone, 0.12))
    return mix(s.flat(s.ground), s.mark, np.maximum(lines, s.edges(0.012) * 0.8))


@family("engraving", "ground mark", spacing=(0.022, 0.042), angle=(0.0, 180.0), wave=(0.0, 0.03))
def engraving(s: Scene, spacing: float, angle: float, wave: float) -> Array:
    u, v = s.rotated(angle)
    tone = blur(s.tone, 0.006 * s.side)
    phase = np.abs(((v + wave * np.sin(u * 14) + 0.05 * tone) / spacing) % 1 - 0.5) * 2
    cover = tone if s.look.dark else 1 - tone
    return mix(s.flat(s.ground), s.mark, soft(cover * 0.95 + 0.03 - phase, 3 * s.px / spacing))


@family("concentric rings", "ground mark", spacing=(0.024, 0.04), cx=(0.2, 0.8), cy=(0.2, 0.8))
def concentric_rings(s: Scene, spacing: float, cx: float, cy: float) -> Array:
    radius = np.hypot(s.x - cx, s.y - cy)
    phase = np.abs((radius / spacing) % 1 - 0.5) * 2
    tone = blur(s.tone, 0.008 * s.side)
    cover = tone if s.look.dark else 1 - tone
    return mix(s.flat(s.ground), s.mark, soft(cover * 0.85 + 0.1 - phase, 3 * s.px / spacing))


@family("line art", "ground mark", thickness=(0.012, 0.04), fill=(0.0, 0.35))
def line_art(s: Scene, thickness: float, fill: float) -> Array:
    body = mix(s.flat(s.ground), s.a, fill * s.alpha)
    return mix(body, s.mark, s.edges(thickness, 1.5))


@family("crayon", "a ground", dark=0.2, angle=(0.0, 180.0), rough=(0.5, 1.0), strength=(0.3, 0.8))
def crayon(s: Scene, angle: float, rough: float, strength: float) -> Array:
    tooth = s.strokes(0.07, angle) * 0.6 + s.grain() * 0.5
    wobble = s.noise(0.06) * 0.006, s.noise(0.06) * 0.006
    picture, alpha = s.warp(s.graded(strength), *wobble), s.warp(s.alpha, *wobble)
    wax = soft(alpha - 0.45 + rough * 0.35 * tooth - 0.1, 0.5) * alpha
    picture = mix(picture, mix(picture, s.mark, 0.5), s.warp(s.edges(0.03), *wobble))
    return mix(s.flat(s.ground), picture, wax)


@family("chalkboard", "ground a paper", dark=1.0, line=(0.012, 0.03), fill=(0.15, 0.5), colour=(0.0, 0.7))
def chalkboard(s: Scene, line: float, fill: float, colour: float) -> Array:
    board = s.flat(s.ink) * (1 + 0.12 * s.noise(0.25) + 0.05 * s.noise(0.05))[..., None]
    stroke = s.strokes(0.05, 35.0)
    chalk = mix(mix(s.flat(s.paper), s.a, 0.5), s.rgb, colour)
    dust = soft(s.tone * s.alpha * fill * 1.6 + 0.25 * stroke - 0.35, 0.8) * s.alpha
    contour = s.edges(line, 1.3) * soft(0.75 + s.grain() * 0.35, 0.6)
    return mix(mix(board, chalk, dust), s.paper, contour)


@family("contour map", "a b ground", levels=(7.0, 14.0), line=(0.004, 0.009), fill=(0.3, 1.0))
def contour_map(s: Scene, levels: float, line: float, fill: float) -> Array:
    heights = blur(s.tone, 0.035 * s.side) + 0.06 * s.noise(0.5)
    step = heights * levels
    slope = np.hypot(cv2.Sobel(step, -1, 1, 0), cv2.Sobel(step, -1, 0, 1)) / 8 * s.side + 1e-3
    near = np.abs(step - np.round(step)) / slope
    base = ramp(np.round(step + 0.5) / levels, np.stack([s.ink, s.a, s.b, s.paper]))
    out = mix(s.flat(s.ground), base, fill)
    return mix(out, s.mark, soft(line - near, 1.5 * s.px))


@family("ink wash", "paper ink", dark=0.0, bleed=(0.008, 0.018), levels=(2.0, 4.0))
def ink_wash(s: Scene, bleed: float, levels: float) -> Array:
    dx, dy = s.noise(0.05) * bleed, s.noise(0.05) * bleed
    tone = s.warp(blur(s.tone, bleed * s.side * 0.6), dx, dy)
    step = np.floor(tone * levels) / levels + soft(tone * levels % 1 - 0.5, 0.6) / levels
    edge = np.clip(blur(tone, bleed * s.side) - tone, 0, 1) * 2.5
    dark = np.clip((1 - step) * 0.85 + edge, 0, 1) * (1 + 0.12 * s.noise(0.03))
    rice = s.flat(s.paper) * (1 + 0.025 * s.noise(0.012)[..., None])
    return mix(rice, s.ink, np.clip(dark, 0, 1))


@family("blueprint", "ground mark", dark=1.0, grid=(0.06, 0.13), line=(0.01, 0.018))
def blueprint(s: Scene, grid: float, line: float) -> Array:
    base = mix(s.flat(s.ink), s.a, 0.45) * (1 + 0.04 * s.noise(0.2)[..., None])
    near = np.minimum(np.abs((s.x / grid) % 1 - 0.5), np.abs((s.y / grid) % 1 - 0.5)) * grid
    out = mix(base, s.paper, soft(0.003 - near, 1.5 * s.px) * 0.35)
    _, v = s.rotated(45)
    hatch = soft(0.004 - np.abs((v / 0.035) % 1 - 0.5) * 0.035, 1.5 * s.px) * s.alpha * (s.tone < 0.5)
    return mix(out, s.paper, np.maximum(s.edges(line, 1.6), hatch * 0.6))


# ---------------------------------------------------------------- paint


def kuwahara(picture: Array, radius: int) -> Array:
    """The mean of the calmest of the four quadrants around each pixel, (H, W, 3) -> (H, W, 3)."""
    size = radius + 1
    mean = cv2.blur(picture, (size, size))
    grey = luma(picture)
    variance = cv2.blur(grey**2, (size, size)) - cv2.blur(grey, (size, size)) ** 2
    half = size / 2
    best, out = np.full_like(variance, np.inf), mean
    for dy in (-half, half):
        for dx in (-half, half):
            move = np.array([[1, 0, -dx], [0, 1, -dy]], np.float32)
            shape = picture.shape[1::-1]
            moved = cv2.warpAffine(variance, move, shape, borderMode=cv2.BORDER_REFLECT)
            colour = cv2.warpAffine(mean, move, shape, borderMode=cv2.BORDER_REFLECT)
            closer = moved < best
            best, out = np.where(closer, moved, best), np.where(closer[..., None], colour, out)
    return out


@family(
    "oil painting",
    "ground a b",
    radius=(0.025, 0.055),
    strength=(0.3, 0.75),
    depth=(1.0, 4.0),
    angle=(0.0, 180.0),
)
def oil_painting(s: Scene, radius: float, strength: float, depth: float, angle: float) -> Array:
    ground = ramp(0.5 + 0.3 * s.noise(0.25), np.stack([s.ground, mix(s.ground, s.a, 0.35)]))
    picture = mix(ground, s.graded(strength), s.alpha)
    picture = kuwahara(picture + 0.05 * s.noise(0.03)[..., None], max(2, round(radius * s.side)))
    bristle = s.flow(s.grain(), radius * 0.8, angle, 0.6)
    light = s.relief(luma(picture) * 0.6 + bristle * 0.35, depth, angle) - 0.5
    return picture + 0.35 * light[..., None]


@family(
    "swirling brush",
    "ground a b",
    length=(0.03, 0.06),
    strength=(0.35, 0.8),
    angle=(0.0, 180.0),
    stroke=(0.012, 0.03),
)
def swirling_brush(s: Scene, length: float, strength: float, angle: float, stroke: float) -> Array:
    sky = ramp(0.5 + 0.35 * s.noise(0.2), np.stack([s.ground, s.a, s.ground, s.b]))
    picture = mix(sky, s.graded(strength), s.alpha)
    bristles = s.flow(s.noise(stroke), length, angle, 0.5)
    smeared = s.flow(picture, length * 0.5, angle, 0.5)
    return smeared * (1 + 0.32 * bristles[..., None])


@family(
    "watercolour",
    "a paper",
    dark=0.0,
    wet=(0.006, 0.018),
    strength=(0.2, 0.7),
    edge=(0.5, 1.4),
    grain=(0.02, 0.06),
)
def watercolour(s: Scene, wet: float, strength: float, edge: float, grain: float) -> Array:
    dx, dy = s.noise(0.07) * wet * 0.7, s.noise(0.07) * wet * 0.7
    wash = mix(s.flat(s.paper), s.graded(strength), s.alpha * 0.85)
    picture = s.warp(kuwahara(wash, max(2, round(0.03 * s.side))), dx, dy)
    soaked = blur(picture, wet * s.side)
    rim = np.clip(luma(soaked) - luma(picture), -0.02, 0.3) * edge
    pools = 1 + 0.09 * s.noise(0.12) + grain * s.noise(0.01)
    return mix(picture, s.paper, 0.12) * (pools - rim)[..., None]


@family("pointillism", "ground a b", cell=(0.022, 0.04), strength=(0.25, 0.7), jitter=(0.04, 0.12))
def pointillism(s: Scene, cell: float, strength: float, jitter: float) -> Array:
    index, near, _, count = s.voronoi(cell, 0.9)
    ground = ramp(0.5 + 0.25 * s.noise(0.3), np.stack([s.ground, mix(s.ground, s.c, 0.6)]))
    colour = s.mean_by(index, count, mix(ground, s.graded(strength), s.alpha))
    shift = s.rng.standard_normal((count, 3)).astype(np.float32) * jitter
    spot = np.clip(colour + shift[index], 0, 1)
    return mix(s.flat(s.ground), spot, soft(0.52 - near, 2 * s.px / cell))


@family("spray stencil", "a ground mark", spray=(0.02, 0.06), brick=(0.0, 1.0))
def spray_stencil(s: Scene, spray: float, brick: float) -> Array:
    wall = s.flat(s.ground) * (1 + 0.06 * s.noise(0.02) + 0.05 * s.noise(0.3))[..., None]
    row = np.floor(s.y / 0.11)
    joint = np.minimum(
        np.abs((s.y / 0.11) % 1 - 0.5) * 0.11, np.abs((s.x / 0.24 + 0.5 * (row % 2)) % 1 - 0.5) * 0.24
    )
    wall = wall * (1 - 0.35 * (brick > 0.4) * soft(0.006 - joint, 2 * s.px))[..., None]
    mist = blur(s.alpha, spray * s.side)
    wall = mix(wall, s.a, soft(mist - 0.35 + 0.25 * s.grain(), 0.8) * 0.8)
    cut = s.tone if s.look.dark else 1 - s.tone
    body = soft(blur(cut, 0.008 * s.side) - 0.42 + 0.06 * s.noise(0.015), 0.12)
    return mix(wall, s.mark, body * (s.alpha > 0.5) * soft(0.9 + 0.3 * s.grain(), 0.8))


# ---------------------------------------------------------------- tiles and materials


@family("pixel art", "ground a b", cell=(0.024, 0.055), strength=(0.3, 0.8), line=(0.0, 0.0, 0.25, 0.5))
def pixel_art(s: Scene, cell: float, strength: float, line: float) -> Array:
    rows, columns, v, u = s.cells(cell)
    small = cv2.resize(s.graded(strength), (columns, rows), interpolation=cv2.INTER_AREA)
    alpha = cv2.resize(s.alpha, (columns, rows), interpolation=cv2.INTER_AREA)
    colours = np.concatenate([s.look.palette, (s.look.palette + np.roll(s.look.palette, 1, 0)) / 2])
    small = np.where(alpha[..., None] > 0.5, s.nearest(small, colours), s.ground)
    out = small[np.minimum(v.astype(int), rows - 1), np.minimum(u.astype(int), columns - 1)]
    border = np.minimum(np.minimum(v % 1, 1 - v % 1), np.minimum(u % 1, 1 - u % 1))
    return mix(out, s.ink, soft(0.08 - border, 2 * s.px / cell) * line)


@family(
    "mosaic", "ground a b", cell=(0.04, 0.075), strength=(0.2, 0.65), grout=(0.06, 0.14), jitter=(0.03, 0.1)
)
def mosaic(s: Scene, cell: float, strength: float, grout: float, jitter: float) -> Array:
    rows, columns, v, u = s.cells(cell)
    tile = s.per_cell(mix(s.flat(s.ground), s.graded(strength), s.alpha), rows, columns, v, u)
    shift = s.rng.standard_normal((rows, columns)).astype(np.float32) * jitter
    tile = (
        tile + shift[np.minimum(v.astype(int), rows - 1), np.minimum(u.astype(int), columns - 1)][..., None]
    )
    inner_v, inner_u = v % 1 - 0.5, u % 1 - 0.5
    border = 0.5 - np.maximum(np.abs(inner_v), np.abs(inner_u))
    bevel = -(inner_u + inner_v) * soft(0.25 - border, 0.2) * 0.35
    return mix(s.flat(s.mark), tile + bevel[..., None], soft(border - grout, 2 * s.px / cell))


@family("stained glass", "a b c", dark=1.0, cell=(0.07, 0.13), lead=(0.06, 0.12), strength=(0.4, 0.85))
def stained_glass(s: Scene, cell: float, lead: float, strength: float) -> Array:
    index, near, second, count = s.voronoi(cell, 1.0)
    ground = ramp(0.5 + 0.5 * s.noise(0.25), np.stack([s.a, s.b]))
    colour = s.mean_by(index, count, mix(mix(ground, s.c, 0.2), s.graded(strength), s.alpha))
    grey = luma(colour)[..., None]
    glass = (grey + (colour - grey) * 1.7) * (1.15 - 0.35 * near[..., None])
    return mix(
        s.flat(s.ink * 0.5),
        glass,
        soft(second - near - lead * 1.5, 3 * s.px / cell) * (1 - s.edges(0.02) * 0.9),
    )


@family("low poly", "ground a b", cell=(0.055, 0.1), strength=(0.25, 0.7), shade=(0.04, 0.12))
def low_poly(s: Scene, cell: float, strength: float, shade: float) -> Array:
    rows, columns, _, _ = s.cells(cell)
    picture = mix(s.flat(s.ground), s.graded(strength), s.alpha)
    v = np.arange(rows + 1) / rows * s.height
    u = np.arange(columns + 1) / columns * s.width
    points = np.stack(np.meshgrid(u, v), -1)
    step = cell * s.side * 0.4
    points[1:-1, 1:-1] += s.rng.uniform(-step, step, points[1:-1, 1:-1].shape)
    soft_picture = blur(picture, cell * s.side * 0.12)
    out = np.zeros_like(picture)
    for i in range(rows):
        for j in range(columns):
            p, q, r, t = points[i, j], points[i, j + 1], points[i + 1, j], points[i + 1, j + 1]
            pairs = ((p, q, r), (q, t, r)) if (i + j) % 2 else ((p, q, t), (p, t, r))
            for k, triangle in enumerate(pairs):
                corners = np.array(triangle)
                x, y = corners.mean(0).astype(int)
                colour = soft_picture[min(y, s.height - 1), min(x, s.width - 1)] + shade * (
                    k - 0.5 + s.rng.uniform(-0.5, 0.5)
                )
                cv2.fillConvexPoly(
                    out, np.round(corners * 16).astype(np.int32), colour.tolist(), cv2.LINE_8, 4
                )
    return out


@family("perler beads", "ground a b", cell=(0.035, 0.06), strength=(0.2, 0.7), hole=(0.1, 0.22))
def perler_beads(s: Scene, cell: float, strength: float, hole: float) -> Array:
    rows, columns, v, u = s.cells(cell)
    u = u + 0.5 * (v.astype(int) % 2)
    u = np.minimum(u, columns - 1e-3)
    colour = s.per_cell(
        mix(s.flat(mix(s.ground, s.c, 0.25)), s.graded(strength), s.alpha), rows, columns, v, u
    )
    dv, du = v % 1 - 0.5, u % 1 - 0.5
    radius = np.hypot(dv, du)
    width = 2 * s.px / cell
    bead = colour * (1 - 0.35 * soft(0.1 - np.abs(radius - 0.44), 0.1))[..., None]
    bead = mix(bead, np.ones(3, np.float32), soft(0.11 - np.hypot(dv + 0.22, du + 0.22), width) * 0.6)
    bead = mix(bead, s.ink, soft(hole - radius, width) * 0.8)
    return mix(s.flat(s.ground * 0.8), bead, soft(0.47 - radius, width))


@family("cross stitch", "ground a b", cell=(0.032, 0.05), strength=(0.25, 0.7), cloth=(0.05, 0.15))
def cross_stitch(s: Scene, cell: float, strength: float, cloth: float) -> Array:
    rows, columns, v, u = s.cells(cell)
    colour = s.per_cell(s.graded(strength), rows, columns, v, u)
    alpha = s.per_cell(s.alpha, rows, columns, v, u)
    dv, du = v % 1 - 0.5, u % 1 - 0.5
    over, under = np.abs(dv - du), np.abs(dv + du)
    width = 3 * s.px / cell
    weave = 1 - cloth * (soft(0.38 - np.maximum(np.abs(dv), np.abs(du)), 0.2) < 0.5)
    out = s.flat(s.ground) * weave[..., None]
    thread = colour * 0.72
    out = mix(out, thread, soft(0.24 - under, width) * (alpha > 0.4))
    return mix(out, colour * (1.08 - 0.3 * over / 0.24)[..., None], soft(0.24 - over, width) * (alpha > 0.4))


@family("knitted", "ground a b", cell=(0.04, 0.065), strength=(0.25, 0.7), depth=(0.25, 0.5))
def knitted(s: Scene, cell: float, strength: float, depth: float) -> Array:
    rows, columns, v, u = s.cells(cell)
    picture = mix(s.flat(s.ground), s.graded(strength), s.alpha)
    side = np.abs(u % 1 - 0.5)
    v = np.clip(v * 1.3 + side * 1.1, 0, None)
    high = rows * 1.3
    colour = s.per_cell(picture, int(high) + 1, columns, np.clip(v - 0.3, 0, None), u)
    ridge = np.abs(v % 1 - 0.5) * 2
    yarn = 1 - depth * (ridge**2 + soft(0.08 - side, 0.12) + soft(side - 0.42, 0.12))
    fibre = 1 + 0.08 * s.grain()
    return colour * (yarn * fibre)[..., None] * 1.22


@family("patchwork quilt", "a b c", cell=(0.1, 0.17), strength=(0.35, 0.75), pattern=(0.15, 0.4))
def patchwork_quilt(s: Scene, cell: float, strength: float, pattern: float) -> Array:
    rows, columns, v, u = s.cells(cell)
    row, column = np.minimum(v.astype(int), rows - 1), np.minimum(u.astype(int), columns - 1)
    ground = np.stack([s.a, s.b, s.c])[(row + column) % 3]
    picture = mix(mix(ground, s.ground, 0.45), s.graded(strength), s.alpha)
    kind = s.rng.integers(0, 4, (rows, columns))[row, column]
    dv, du = v % 1 - 0.5, u % 1 - 0.5
    waves = np.stack([np.cos(u * 2 * np.pi * 4), np.cos(v * 2 * np.pi * 4), np.cos((u + v) * 2 * np.pi * 3),
                      np.cos(u * 2 * np.pi * 3) * np.cos(v * 2 * np.pi * 3) * 2 - 0.6])  # fmt: skip
    wave = np.take_along_axis(waves, kind[None], 0)[0]
    tint = s.rng.uniform(-0.12, 0.12, (rows, columns)).astype(np.float32)[row, column]
    cloth = picture + (pattern * 0.5 * soft(wave, 0.8) - pattern * 0.25 + tint)[..., None]
    border = 0.5 - np.maximum(np.abs(dv), np.abs(du))
    puff = 1 - 0.4 * np.exp(-border / 0.07)
    dash = soft(0.012 - np.abs(border - 0.1), 1.5 * s.px / cell) * (np.cos((u + v) * 2 * np.pi * 5) > -0.2)
    return mix(cloth * puff[..., None], s.paper, dash * 0.9)


@family("metal relief", "a ground", depth=(3.0, 7.0), angle=(0.0, 360.0), texture=(0.0, 0.06))
def metal_relief(s: Scene, depth: float, angle: float, texture: float) -> Array:
    heights = s.tone * 0.5 + blur(s.alpha, 0.015 * s.side) * 0.8 + texture * s.noise(0.02)
    light = s.relief(heights, depth, angle)
    sheen = 0.12 * np.sin(s.x * 5 + s.y * 4 + light * 5)
    return ramp(
        light * 0.85 + 0.08 + sheen,
        np.stack([s.ink, mix(s.ink, s.a, 0.6), s.a, mix(s.a, s.paper, 0.6), s.paper]),
    )


@family("clay", "a ground", dark=0.2, depth=(2.0, 4.0), strength=(0.35, 0.8), angle=(180.0, 270.0))
def clay(s: Scene, depth: float, strength: float, angle: float) -> Array:
    picture = blur(s.graded(strength), 0.012 * s.side)
    picture = mix(mix(s.flat(s.ground), s.a, 0.25), picture, soft(blur(s.alpha, 0.015 * s.side) - 0.45, 0.25))
    distance = blur(s.alpha, 0.05 * s.side) * s.alpha
    prints = s.noise(0.035) * 0.05
    light = s.relief(distance * 0.9 + blur(luma(picture), 0.02 * s.side) * 0.5 + prints, depth, angle) - 0.5
    shadow = s.warp(blur(s.alpha, 0.025 * s.side), s.x * 0 - 0.03, s.y * 0 - 0.04) * (1 - s.alpha)
    return (picture + 0.5 * light[..., None]) * (1 - 0.4 * shadow[..., None])


@family("papercut", "a b ground", levels=(4, 5, 6), shadow=(0.012, 0.03), angle=(0.0, 360.0))
def papercut(s: Scene, levels: int, shadow: float, angle: float) -> Array:
    dx, dy = (-shadow * part for part in (math.cos(math.radians(angle)), math.sin(math.radians(angle))))
    tone = blur(s.tone, 0.025 * s.side)
    tone = tone if s.look.dark else 1 - tone
    sheets = s.colours() if s.look.dark else s.colours()[::-1]
    sheets = sheets[np.linspace(0, 4, levels).round().astype(int)]
    out = s.flat(s.ground) * (1 + 0.02 * s.grain()[..., None])
    for i in range(levels - 1):
        cut = soft(tone - (i + 0.35) / levels, 0.03)
        cast = s.warp(blur(cut, shadow * s.side * 0.6), s.x * 0 + dx, s.y * 0 + dy)
        out = mix(out * (1 - 0.5 * cast[..., None]), sheets[i + 1], cut)
    return out


@family(
    "sticker",
    "a b ground",
    border=(0.03, 0.06),
    strength=(0.0, 0.5),
    pattern=("dots", "stripes", "checks", "rays"),
    scale=(0.08, 0.2),
)
def sticker(s: Scene, border: float, strength: float, pattern: str, scale: float) -> Array:
    base = mix(s.flat(s.a), s.b, _pattern(s, pattern, scale))
    wide = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * max(1, round(border * s.side)) + 1,) * 2)
    alpha = s.cut_out()
    rim = blur(cv2.dilate(alpha, wide), 0.5)
    shadow = s.warp(blur(rim, 0.02 * s.side), s.x * 0 - 0.02, s.y * 0 - 0.025)
    base = base * (1 - 0.5 * shadow[..., None])
    return mix(mix(base, np.ones(3, np.float32), rim), s.graded(strength), alpha)


def _pattern(s: Scene, pattern: str, scale: float) -> Array:
    """A ground pattern (H, W) in [0, 1] of period `scale`."""
    u, v = s.rotated(45)
    if pattern == "dots":
        wave = (np.cos(2 * np.pi * u / scale) + np.cos(2 * np.pi * v / scale)) / 2 - 0.4
    elif pattern == "stripes":
        wave = np.cos(2 * np.pi * u / scale)
    elif pattern == "checks":
        wave = np.cos(2 * np.pi * s.x / scale / 2) * np.cos(2 * np.pi * s.y / scale / 2) * 2
    else:
        wave = np.cos(np.arctan2(s.y - 0.5, s.x - 0.5) * round(2 / scale))
    return soft(wave, 8 * s.px / scale)


@family(
    "on patterned paper",
    "a b",
    strength=(0.0, 0.3),
    pattern=("dots", "stripes", "checks", "rays"),
    scale=(0.07, 0.22),
    tint=(0.2, 0.7),
)
def on_patterned_paper(s: Scene, strength: float, pattern: str, scale: float, tint: float) -> Array:
    ground = mix(s.flat(s.ground), s.a, _pattern(s, pattern, scale))
    grey = luma(s.rgb)
    screen = mix(s.rgb, ramp(grey, np.stack([s.ink, s.b, s.paper])), tint)
    return mix(ground, screen, s.cut_out())


@family("delft tile", "mark ground", dark=0.1, tile=(0.34, 0.5), brush=(0.01, 0.03), border=(0.0, 1.0))
def delft_tile(s: Scene, tile: float, brush: float, border: float) -> Array:
    tone = kuwahara(np.repeat(s.tone[..., None], 3, 2), max(2, round(brush * s.side * 2)))[..., 0]
    glaze = s.flat(s.paper) * (1 + 0.02 * s.noise(0.1)[..., None])
    wash = soft(1 - tone + 0.12 * s.noise(0.04), 1.4) * 0.85
    out = mix(glaze, mix(s.a, s.ink, 0.5), wash * s.alpha)
    out = mix(out, s.ink, s.edges(0.014) * 0.85)
    dv, du = np.abs(s.y / tile % 1 - 0.5), np.abs(s.x / tile % 1 - 0.5)
    corner = np.hypot(0.5 - dv, 0.5 - du)
    ornament = soft(0.03 - np.abs(corner - 0.14), 0.02) + soft(0.06 - corner, 0.02)
    out = mix(out, s.a, np.clip(ornament, 0, 1) * 0.8 * (1 - s.alpha * (border < 0.7)))
    return out * (1 - 0.35 * soft(0.012 - np.minimum(0.5 - dv, 0.5 - du), 0.01))[..., None]


@family("woodcut", "ground mark", spacing=(0.025, 0.045), angle=(0.0, 180.0), follow=(0.2, 0.8))
def woodcut(s: Scene, spacing: float, angle: float, follow: float) -> Array:
    grooves = s.flow(s.noise(spacing * 0.45), spacing * 1.6, angle, follow)
    tone = blur(s.tone, 0.01 * s.side)
    cover = tone if s.look.dark else 1 - tone
    cut = soft(cover - 0.5 + 0.55 * grooves, 0.12)
    return mix(
        s.flat(s.ground), s.mark, np.maximum(cut, s.edges(0.022) * 0.9) * soft(1.3 + 0.3 * s.grain(), 0.5)
    )


@family("wood burning", "ink a", dark=0.0, rings=(0.03, 0.07), line=(0.015, 0.03))
def wood_burning(s: Scene, rings: float, line: float) -> Array:
    u = s.x + 0.05 * s.noise(0.5) + 0.02 * np.sin(s.y * 5)
    grain = (
        0.5
        + 0.3 * np.sin(2 * np.pi * u / rings + 1.5 * s.noise(0.4))
        + 0.12 * cv2.blur(s.grain(), (1, max(3, s.side // 10)))
    )
    wood = ramp(grain, np.stack([mix(s.paper, s.a, 0.75), mix(s.paper, s.a, 0.4)]))
    burn = soft(1 - s.tone - 0.2, 1.1) * 0.7 * s.alpha
    lines = blur(s.edges(line, 1.3), 0.006 * s.side)
    return wood * mix(np.ones(3, np.float32), s.ink, np.maximum(burn, lines))


# ---------------------------------------------------------------- light and screen


@family("neon", "a b ink", dark=1.0, line=(0.012, 0.025), glow=(0.02, 0.05), base=(0.05, 0.2))
def neon(s: Scene, line: float, glow: float, base: float) -> Array:
    edge = s.edges(line, 1.3)
    hue = soft(s.y * s.side / s.height + 0.2 * s.noise(0.4) - 0.5, 0.7)
    colour = mix(s.flat(s.a), s.b, hue)
    light = blur(edge, glow * s.side) * 1.6 + blur(edge, glow * s.side * 2.5) * 0.8
    light *= min(1, 0.2 / (edge.mean() + 1e-3))  # busy pictures would be all light
    night = s.flat(s.ink * 0.4) + base * s.rgb * s.alpha[..., None]
    return mix(night + colour * light[..., None], colour * 0.4 + 0.65, edge)


@family("silhouette", "ink a b", dark=0.0, detail=(0.0, 0.3), angle=(60.0, 120.0), sun=(0.0, 0.25))
def silhouette(s: Scene, detail: float, angle: float, sun: float) -> Array:
    u, _ = s.rotated(angle)
    sky = ramp(u / max(u.max(), 1e-3), np.stack([s.a, s.b, s.paper]))
    sky = mix(sky, mix(s.c, s.paper, 0.5), soft(sun - np.hypot(s.x - 0.65, s.y - 0.4), 2 * s.px) * 0.9)
    tone = 0.15 + 0.85 * s.tone
    # a photograph has no shape of its own: its dark half is the silhouette
    shape = s.alpha if s.alpha.min() < 0.5 else soft(0.5 - blur(s.tone, 0.01 * s.side), 0.15)
    return mix(
        sky, mix(s.flat(s.ink), mix(s.ink, s.a, 0.6), np.clip((tone - 0.5) * detail * 4, 0, 0.8)), shape
    )


@family("terminal text", "a ink", dark=1.0, cell=(0.055, 0.085), tint=(0.0, 0.6))
def terminal_text(s: Scene, cell: float, tint: float) -> Array:
    rows, columns, v, u = s.cells(cell)
    columns = round(columns * 1.4)
    u = s.x * (columns / (s.width * s.px))
    level = s.per_cell(np.maximum(s.tone, 0.4 * s.alpha), rows, columns, v, u) ** 0.8
    glyphs = _glyphs()
    index = np.minimum((level * len(glyphs)).astype(int), len(glyphs) - 1)
    high, wide = glyphs.shape[1:]
    dot = glyphs[index, (v % 1 * high).astype(int), (u % 1 * wide).astype(int)]
    colour = mix(s.flat(mix(s.a, s.paper, 0.25)), s.per_cell(s.rgb, rows, columns, v, u), tint)
    return mix(s.flat(s.ink * 0.45), colour, dot * (0.75 + 0.4 * level))


@lru_cache
def _glyphs() -> Array:
    """Characters of growing weight, float32 (N, 16, 10)."""
    pictures = []
    for character in " -+=o*%X#@":
        glyph = np.zeros((64, 40), np.uint8)
        if character != " ":
            (w, _), _ = cv2.getTextSize(character, cv2.FONT_HERSHEY_SIMPLEX, 2.0, 9)
            cv2.putText(
                glyph, character, (20 - w // 2, 50), cv2.FONT_HERSHEY_SIMPLEX, 2.0, 255, 9, cv2.LINE_AA
            )
        pictures.append(cv2.resize(glyph, (10, 16), interpolation=cv2.INTER_AREA))
    return np.clip(np.stack(pictures) / np.float32(170), 0, 1)


@family("crt screen", "a ink", dark=1.0, pitch=(0.02, 0.04), tint=(0.3, 0.9), curve=(0.0, 0.12))
def crt_screen(s: Scene, pitch: float, tint: float, curve: float) -> Array:
    dx, dy = s.x - s.x.max() / 2, s.y - s.y.max() / 2
    far = dx**2 + dy**2
    picture = s.warp(
        mix(s.rgb, ramp(s.tone, np.stack([s.ink * 0.6, s.a, s.paper])), tint),
        dx * far * curve * 3,
        dy * far * curve * 3,
    )
    picture = picture + 0.4 * blur(picture, 0.02 * s.side)
    lines = 0.55 + 0.45 * np.cos(2 * np.pi * s.y / pitch)
    return picture * lines[..., None] * (1.1 - 1.1 * far[..., None])


@family("glitch", "a b ground", dark=0.6, shift=(0.02, 0.06), bands=(0.03, 0.1), strength=(0.0, 0.5))
def glitch(s: Scene, shift: float, bands: float, strength: float) -> Array:
    rows = max(4, int(s.height * s.px / bands))
    offset = s.rng.standard_normal(rows).astype(np.float32) * (s.rng.random(rows) < 0.45) * shift * 1.6
    dx = offset[np.minimum((s.y / (s.height * s.px) * rows).astype(int), rows - 1)]
    tone = s.warp(s.tone, dx, s.y * 0)
    left, right = s.warp(s.tone, dx - shift, s.y * 0), s.warp(s.tone, dx + shift, s.y * 0)
    middle = mix(ramp(tone, np.stack([s.ink, s.paper])), s.warp(s.graded(0.2), dx, s.y * 0), strength)
    out = middle + (left - tone)[..., None] * (s.a - 0.25) + (right - tone)[..., None] * (s.b - 0.25)
    return out * (0.9 + 0.1 * np.cos(2 * np.pi * s.y * 60))[..., None] + 0.04 * s.grain()[..., None]


@family("thermal camera", "", dark=0.7, spread=(0.01, 0.04), turn=(0.0, 0.25))
def thermal_camera(s: Scene, spread: float, turn: float) -> Array:
    heat = blur(s.tone, spread * s.side)
    heat = 0.1 + 0.85 * (heat if s.look.dark else 1 - heat) + 0.03 * s.noise(0.1)
    scale = np.array(
        [[0, 0, 0.15], [0.25, 0, 0.6], [0.7, 0.05, 0.6], [0.95, 0.3, 0.15], [1, 0.75, 0.1], [1, 1, 0.85]],
        np.float32,
    )
    return ramp(heat + turn * (s.y - 0.5), scale)


@family("old photograph", "paper ink", dark=0.0, fade=(0.1, 0.4), frame=(0.0, 0.06), scratches=(2, 4, 6))
def old_photograph(s: Scene, fade: float, frame: float, scratches: int) -> Array:
    print_ = ramp(blur(s.tone, 0.008 * s.side) * (1 - fade * 0.4) + fade * 0.25 + 0.05 * s.grain(),
                  np.stack([s.ink, mix(s.ink, s.a, 0.6), mix(s.paper, s.a, 0.25), s.paper]))  # fmt: skip
    dx, dy = s.x / s.x.max() - 0.5, s.y / s.y.max() - 0.5
    print_ = print_ * (1.1 - 1.3 * (dx**2 + dy**2) + 0.06 * s.noise(0.3))[..., None]
    scratch = np.zeros_like(s.tone)
    for x in s.rng.uniform(0, s.x.max(), scratches):
        scratch = np.maximum(
            scratch, soft(0.003 - np.abs(s.x - x - 0.01 * np.sin(s.y * 7 + x * 40)), 1.5 * s.px)
        )
    out = mix(print_, s.paper, scratch * 0.7)
    border = np.minimum(np.minimum(s.x, s.x.max() - s.x), np.minimum(s.y, s.y.max() - s.y))
    return mix(s.flat(s.paper), out, soft(border - frame, 2 * s.px))


@family("vaporwave", "a b c", dark=0.7, grid=(0.08, 0.14), horizon=(0.5, 0.7), strength=(0.5, 0.95))
def vaporwave(s: Scene, grid: float, horizon: float, strength: float) -> Array:
    y = s.y / s.y.max()
    sky = ramp(y / horizon, np.stack([mix(s.ink, s.a, 0.4), s.a, s.b]))
    stripes = soft(np.cos(2 * np.pi * s.y / 0.06) + 0.6, 0.4)
    sky = mix(
        sky,
        mix(s.c, s.paper, 0.3),
        soft(0.3 - np.hypot(s.x - s.x.max() / 2, s.y - horizon * s.y.max()), 2 * s.px) * stripes,
    )
    depth = np.maximum(y - horizon, 0.02)
    lines = np.maximum(soft(np.cos(2 * np.pi * (s.x - s.x.max() / 2) / depth / grid / 4) - 0.9, 0.2),
                       soft(np.cos(2 * np.pi / depth * grid * 3) - 0.85, 0.3))  # fmt: skip
    floor = mix(s.flat(s.ink * 0.6), s.c, lines)
    ground = np.where((y < horizon)[..., None], sky, floor)
    body = mix(s.rgb, ramp(s.tone + 0.25 * (y - 0.5), np.stack([s.ink, s.b, s.a, s.paper])), strength)
    return mix(ground, body, s.alpha)


@family(
    "reeded glass", "ground a", ribs=(0.05, 0.1), bend=(0.03, 0.07), strength=(0.3, 0.7), angle=(0.0, 90.0)
)
def reeded_glass(s: Scene, ribs: float, bend: float, strength: float, angle: float) -> Array:
    angle = round(angle / 90) * 90.0
    u, _ = s.rotated(angle)
    phase = u / ribs % 1 - 0.5
    ground = ramp(s.y / s.y.max(), np.stack([s.ground, mix(s.ground, s.a, 0.6)]))
    picture = blur(mix(ground, s.graded(strength), s.alpha), 0.008 * s.side)
    shift = phase * bend * 2
    moved = s.warp(picture, shift * math.cos(math.radians(angle)), shift * math.sin(math.radians(angle)))
    return moved * (0.92 + 0.3 * phase)[..., None] + 0.22 * soft(0.1 - np.abs(phase + 0.3), 0.08)[..., None]


@family("geometric tiles", "ground a b", cell=(0.05, 0.085), strength=(0.4, 0.85))
def geometric_tiles(s: Scene, cell: float, strength: float) -> Array:
    rows, columns, v, u = s.cells(cell)
    picture = mix(s.flat(s.ground), s.graded(strength), s.alpha)
    others = (
        s.look.palette[1:] if s.look.dark else s.look.palette[[0, 2, 3, 4]]
    )  # the ground's own is for the ground
    inside = s.per_cell(s.alpha, rows, columns, v, u)[..., None] > 0.5
    colour = np.where(inside, s.nearest(s.per_cell(picture, rows, columns, v, u), others), s.ground)
    back = mix(colour, np.where(luma(colour)[..., None] > 0.5, s.ink, s.paper), 0.3)
    row, column = np.minimum(v.astype(int), rows - 1), np.minimum(u.astype(int), columns - 1)
    kind = s.rng.integers(0, 4, (rows, columns))[row, column]
    dv, du = v % 1, u % 1
    quarter = np.hypot(np.where(kind == 1, 1 - dv, dv), np.where(kind == 2, 1 - du, du)) - 1
    shape = np.where(kind == 3, np.hypot(dv - 0.5, du - 0.5) - 0.45, quarter)
    return mix(back, colour, soft(-shape, 2 * s.px / cell))


@family("comic", "a ground", dark=0.1, line=(0.012, 0.028), strength=(0.2, 0.65), rays=(10, 14, 20))
def comic(s: Scene, line: float, strength: float, rays: int) -> Array:
    ground = mix(
        s.flat(s.ground), s.a, soft(np.cos(np.arctan2(s.y - s.y.max() / 2, s.x - s.x.max() / 2) * rays), 0.25)
    )
    picture = kuwahara(mix(s.flat(s.ground), s.graded(strength), s.alpha), max(2, round(0.03 * s.side)))
    picture = (np.floor(picture * 4) + soft(picture * 4 % 1 - 0.5, 0.4)) / 4
    _, v = s.rotated(45)
    shade = soft(0.35 - luma(picture), 0.1) * soft(np.cos(2 * np.pi * v / 0.03), 0.6)
    out = mix(ground, mix(picture * 1.08, s.ink, shade * 0.7), soft(s.alpha - 0.5, 0.3))
    return mix(out, s.ink * 0.4, s.edges(line, 1.2))
