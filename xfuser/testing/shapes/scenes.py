"""The scenes of the tiny text-to-image models: words, captions and images.

This file lists everything that the models know. A `Scene` describes the objects, `caption` returns its text, `parse`
converts a plain caption to a scene, and `render` draws a scene.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (220, 30, 40),
    "green": (30, 160, 70),
    "blue": (40, 80, 225),
    "yellow": (250, 225, 40),
    "purple": (150, 50, 190),
    "orange": (250, 140, 20),
}
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "gray": (128, 128, 128)}
DEFAULT_BACKGROUND = "white"
SHAPES = ("circle", "square", "triangle")
SIZES = ("small", "large")
COUNTS = {"two": 2, "three": 3, "four": 4}
RELATIONS = ("above", "below", "left of", "right of", "and")
KINDS = ("single", "pair", "count")
PREFIXES = ("a picture of", "a drawing of", "an image of", "a photo of", "a painting of", "draw", "paint", "show")

# Synonyms that captions may use; the embedding of a new word starts as that of the word it stands for.
SYNONYMS = {
    "purple": ("violet",),
    "gray": ("grey",),
    "circle": ("disc", "disk"),
    "circles": ("discs", "disks"),
    "small": ("little", "tiny"),
    "large": ("big", "huge"),
    "a": ("one", "1", "the", "single"),
    "two": ("2",),
    "three": ("3",),
    "four": ("4",),
    "above": ("over", "on top of"),
    "below": ("under", "beneath", "underneath"),
    "left of": ("to the left of",),
    "right of": ("to the right of",),
    "and": ("beside", "next to", "with"),
    "background": ("backdrop",),
}

# Diameters and centres, in fractions of the image's side: multiples of the 8 pixels of one latent pixel.
# All objects of a scene may be shifted together by one token of the transformers.
UNIT = 1 / 32
SINGLE_DIAMETERS = {"small": 9 * UNIT, "": 14 * UNIT, "large": 20 * UNIT}
SHIFTS = (-2 * UNIT, 0.0, 2 * UNIT)
GROUP_DIAMETERS = {"small": 7 * UNIT, "": 11 * UNIT, "large": 13 * UNIT}
NEAR, MIDDLE, FAR = 0.25, 0.5, 0.75
GROUP_CENTRES = {
    2: ((NEAR, MIDDLE), (FAR, MIDDLE)),
    3: ((MIDDLE, NEAR), (NEAR, FAR), (FAR, FAR)),
    4: ((NEAR, NEAR), (FAR, NEAR), (NEAR, FAR), (FAR, FAR)),
}
PAIR_CENTRES = {
    "above": ((MIDDLE, NEAR), (MIDDLE, FAR)),
    "below": ((MIDDLE, FAR), (MIDDLE, NEAR)),
    "left of": ((NEAR, MIDDLE), (FAR, MIDDLE)),
    "right of": ((FAR, MIDDLE), (NEAR, MIDDLE)),
    "and": ((NEAR, MIDDLE), (FAR, MIDDLE)),
}


@dataclass(frozen=True)
class Group:
    """One noun phrase: `count` equal objects."""

    colour: str
    shape: str
    size: str = ""
    count: int = 1


@dataclass(frozen=True)
class Scene:
    """The content of a caption: one group, or two single objects and their relation."""

    groups: tuple[Group, ...]
    relation: str = ""
    background: str = DEFAULT_BACKGROUND


@dataclass(frozen=True)
class Placed:
    """An object with its position in the image, in fractions of the image's side."""

    colour: str
    shape: str
    x: float
    y: float
    diameter: float


def vocabulary() -> list[str]:
    """Return all words of captions, sorted."""
    words = {"a", "an", "on", *COLOURS, *BACKGROUNDS, *SIZES, *COUNTS, *SHAPES, *(shape + "s" for shape in SHAPES)}
    for phrase in (*PREFIXES, *RELATIONS, *SYNONYMS, *(text for texts in SYNONYMS.values() for text in texts)):
        words.update(phrase.split())
    return sorted(words)


def sample_scene(rng: np.random.Generator, held_out: bool = False, kind: str | None = None) -> Scene:
    """Sample a scene, of the given kind if there is one; `held_out` selects held-out or other pairs."""
    background = DEFAULT_BACKGROUND if rng.random() < 0.5 else str(rng.choice(list(BACKGROUNDS)))
    kind = kind or rng.choice(KINDS, p=[0.15, 0.7, 0.15])
    if kind == "single":
        return Scene((_sample_group(rng, 0.5),), background=background)
    if kind == "count":
        return Scene((_sample_group(rng, 0.25, int(rng.integers(2, 5))),), background=background)
    while True:
        groups = (_sample_group(rng, 0.15), _sample_group(rng, 0.15))
        scene = Scene(groups, str(rng.choice(RELATIONS)), background)
        if is_held_out(scene) == held_out:
            return scene


def _sample_group(rng: np.random.Generator, sized: float, count: int = 1) -> Group:
    size = str(rng.choice(SIZES)) if rng.random() < sized else ""
    return Group(str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)), size, count)


def is_held_out(scene: Scene) -> bool:
    """Return whether this scene is held out of training: an eighth of the pairs, independent of object sizes."""
    if not scene.relation:
        return False
    first, second = scene.groups
    key = f"{first.colour} {first.shape} {scene.relation} {second.colour} {second.shape}"
    return zlib.crc32(key.encode()) % 8 == 1


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """Return the text of a scene: the plain caption without `rng`, a random phrasing with it."""
    text = _noun_phrase(scene.groups[0], rng)
    if scene.relation:
        text = f"{text} {_say(scene.relation, rng)} {_noun_phrase(scene.groups[1], rng)}"
    if scene.background != DEFAULT_BACKGROUND or _chance(rng, 0.25):
        colour = _say(scene.background, rng)
        text += f" on {colour}" if _chance(rng, 0.1) else f" on a {colour} {_say('background', rng, 0.1)}"
    return f"{rng.choice(PREFIXES)} {text}" if _chance(rng, 0.15) else text


def _chance(rng: np.random.Generator | None, share: float) -> bool:
    return rng is not None and rng.random() < share


def _say(word: str, rng: np.random.Generator | None, share: float = 0.3) -> str:
    """Return the word or one of its synonyms."""
    return str(rng.choice(SYNONYMS[word])) if word in SYNONYMS and _chance(rng, share) else word


def _noun_phrase(group: Group, rng: np.random.Generator | None) -> str:
    """Return the text of a group; with `rng`, the article or the colour may be missing."""
    number = {count: word for word, count in COUNTS.items()}.get(group.count, "a")
    colour = "" if _chance(rng, 0.03) else _say(group.colour, rng, 0.2)
    words = [_say(group.size, rng), colour, _say(group.shape + "s" * (group.count > 1), rng, 0.2)]
    words = [word for word in words if word]
    if group.count == 1 and _chance(rng, 0.1):
        return " ".join(words)
    article = "an" if number == "a" and words[0][0] in "aeiou" else number
    return " ".join([_say(article, rng, 0.15), *words])


def parse(text: str) -> Scene:
    """Convert a plain caption to its scene."""
    background = re.search(r" on a (\w+) background", text)
    noun = rf"(\w+) (?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})s?\b"
    groups = tuple(
        Group(colour, shape, size, COUNTS.get(number, 1)) for number, size, colour, shape in re.findall(noun, text)
    )
    if not 1 <= len(groups) <= 2:
        raise ValueError(f"not a plain caption of a scene: {text!r}")
    relation = ""
    if len(groups) == 2:
        found = [name for name in RELATIONS if f" {name} " in text]
        if len(found) != 1:
            raise ValueError(f"two objects require one relation: {text!r}")
        relation = found[0]
    return Scene(groups, relation, background.group(1) if background else DEFAULT_BACKGROUND)


def place(scene: Scene, rng: np.random.Generator | None = None) -> list[Placed]:
    """Return all objects of a scene with position and diameter; with `rng`, all may be shifted together."""
    if scene.relation:
        objects = list(zip(scene.groups, PAIR_CENTRES[scene.relation], strict=True))
    else:
        group = scene.groups[0]
        objects = [(group, centre) for centre in GROUP_CENTRES.get(group.count, ((MIDDLE, MIDDLE),))]
    diameters = SINGLE_DIAMETERS if len(objects) == 1 else GROUP_DIAMETERS
    placed = [Placed(group.colour, group.shape, *centre, diameters[group.size]) for group, centre in objects]
    return _move(placed, *(float(rng.choice(_shifts(placed, axis))) for axis in "xy")) if rng else placed


def _shifts(objects: list[Placed], axis: str) -> list[float]:
    """Return the shifts that all objects may have along an axis."""
    room = min(min(getattr(item, axis), 1 - getattr(item, axis)) - item.diameter / 2 for item in objects)
    return [shift for shift in SHIFTS if abs(shift) <= room]


def _move(objects: list[Placed], right: float, down: float) -> list[Placed]:
    return [replace(item, x=item.x + right, y=item.y + down) for item in objects]


def render(scene: Scene, size: int = 256, rng: np.random.Generator | None = None) -> Image.Image:
    """Draw a scene as an antialiased RGB image of `size` x `size` pixels; with `rng`, possibly shifted."""
    return draw(place(scene, rng), scene.background, size)


def all_renders(scene: Scene, size: int) -> list[Image.Image]:
    """Draw a scene with each possible shift."""
    placed = place(scene)
    moved = [_move(placed, right, down) for right in _shifts(placed, "x") for down in _shifts(placed, "y")]
    return [draw(objects, scene.background, size) for objects in moved]


def draw(objects: list[Placed], background: str, size: int, oversampling: int = 4) -> Image.Image:
    """Draw placed objects on a plain background."""
    scale = size * oversampling
    picture = Image.new("RGB", (scale, scale), BACKGROUNDS[background])
    pen = ImageDraw.Draw(picture)
    for item in objects:
        x, y, r = item.x * scale, item.y * scale, item.diameter * scale / 2
        if item.shape == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=COLOURS[item.colour])
        elif item.shape == "square":
            pen.rectangle((x - r, y - r, x + r, y + r), fill=COLOURS[item.colour])
        else:
            pen.polygon(((x, y - r), (x - r, y + r), (x + r, y + r)), fill=COLOURS[item.colour])
    return picture.reduce(oversampling)
