"""The little world of the tiny text-to-image model: its words, its captions and its pictures.

Everything the model can be asked for is listed here. A `Scene` says what is asked for, `caption` puts it into
words, `parse` reads such words back, and `render` draws it.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

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
RELATIONS = {
    "above": ("above", "over"),
    "below": ("below", "under"),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "and": ("and",),
}
PREFIXES = ("a picture of", "a drawing of")

# Diameters and centres as fractions of the picture's side.
SINGLE_DIAMETERS = {"small": 0.28, "": 0.44, "large": 0.62}
GROUP_DIAMETERS = {"small": 0.23, "": 0.34, "large": 0.42}
NEAR, MIDDLE, FAR = 0.26, 0.5, 0.74
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
    """What a caption asks for: one group, or two single objects and how they stand to each other."""

    groups: tuple[Group, ...]
    relation: str = ""
    background: str = DEFAULT_BACKGROUND


@dataclass(frozen=True)
class Placed:
    """An object with its place in the picture, in fractions of the picture's side."""

    colour: str
    shape: str
    x: float
    y: float
    diameter: float


def vocabulary() -> list[str]:
    """Return every word a caption may hold, sorted."""
    words = {"a", "an", "one", "on", "background", "grey", *COLOURS, *BACKGROUNDS, *SIZES, *COUNTS, *SHAPES}
    words.update(shape + "s" for shape in SHAPES)
    for phrase in (*PREFIXES, *(text for texts in RELATIONS.values() for text in texts)):
        words.update(phrase.split())
    return sorted(words)


def sample_scene(rng: np.random.Generator, held_out: bool = False) -> Scene:
    """Draw a scene; pairs come from the held-out pairs or from the others, as `held_out` says."""
    background = DEFAULT_BACKGROUND if rng.random() < 0.5 else str(rng.choice(list(BACKGROUNDS)))
    kind = rng.choice(["single", "several", "pair"], p=[0.2, 0.2, 0.6])
    if kind == "single":
        return Scene((_sample_group(rng, 0.5),), background=background)
    if kind == "several":
        return Scene((_sample_group(rng, 0.25, int(rng.integers(2, 5))),), background=background)
    while True:
        groups = (_sample_group(rng, 0.15), _sample_group(rng, 0.15))
        scene = Scene(groups, str(rng.choice(list(RELATIONS))), background)
        if is_held_out(scene) == held_out:
            return scene


def _sample_group(rng: np.random.Generator, sized: float, count: int = 1) -> Group:
    size = str(rng.choice(SIZES)) if rng.random() < sized else ""
    return Group(str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)), size, count)


def is_held_out(scene: Scene) -> bool:
    """Say whether training leaves this scene out: an eighth of the pairs of objects, whatever their sizes."""
    if not scene.relation:
        return False
    first, second = scene.groups
    key = f"{first.colour} {first.shape} {scene.relation} {second.colour} {second.shape}"
    return zlib.crc32(key.encode()) % 8 == 1


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """Put a scene into words: the plainest words without `rng`, one of several phrasings with it."""
    text = _noun_phrase(scene.groups[0])
    if scene.relation:
        words = RELATIONS[scene.relation]
        joint = words[0] if rng is None or rng.random() < 0.7 else str(rng.choice(words))
        text = f"{text} {joint} {_noun_phrase(scene.groups[1])}"
    named = scene.background != DEFAULT_BACKGROUND or (rng is not None and rng.random() < 0.25)
    if named:
        grey = scene.background == "gray" and rng is not None and rng.random() < 0.2
        text += f" on a {'grey' if grey else scene.background} background"
    if rng is not None and rng.random() < 0.1:
        text = f"{rng.choice(PREFIXES)} {text}"
    return text


def _noun_phrase(group: Group) -> str:
    number = {count: word for word, count in COUNTS.items()}.get(group.count, "a")
    words = [word for word in (number, group.size, group.colour, group.shape) if word]
    if group.count > 1:
        words[-1] += "s"
    elif words[1][0] in "aeiou":
        words[0] = "an"
    return " ".join(words)


def parse(text: str) -> Scene:
    """Read a caption written by `caption` back into its scene."""
    text = text.lower().replace("grey", "gray")
    background = re.search(r" on a (\w+) background", text)
    noun = rf"(?:(\w+) )?(?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})s?\b"
    groups = tuple(
        Group(colour, shape, size, COUNTS.get(number, 1)) for number, size, colour, shape in re.findall(noun, text)
    )
    if not 1 <= len(groups) <= 2:
        raise ValueError(f"not a caption of this little world: {text!r}")
    relation = ""
    if len(groups) == 2:
        found = [name for name, texts in RELATIONS.items() if any(f" {words} " in text for words in texts)]
        if len(found) != 1:
            raise ValueError(f"two objects need one relation: {text!r}")
        relation = found[0]
    return Scene(groups, relation, background.group(1) if background else DEFAULT_BACKGROUND)


def place(scene: Scene, rng: np.random.Generator) -> list[Placed]:
    """Give every object of a scene its place and its diameter, with a little chance in both."""
    if scene.relation:
        objects = list(zip(scene.groups, PAIR_CENTRES[scene.relation], strict=True))
    else:
        group = scene.groups[0]
        objects = [(group, centre) for centre in GROUP_CENTRES.get(group.count, ((MIDDLE, MIDDLE),))]
    alone = len(objects) == 1
    diameters, jitter = (SINGLE_DIAMETERS, 0.06) if alone else (GROUP_DIAMETERS, 0.015)
    placed = []
    for group, centre in objects:
        x, y = centre + rng.uniform(-jitter, jitter, 2)
        diameter = diameters[group.size] * rng.uniform(0.96, 1.04)
        placed.append(Placed(group.colour, group.shape, float(x), float(y), float(diameter)))
    return placed


def render(scene: Scene, rng: np.random.Generator, size: int = 256) -> Image.Image:
    """Draw a scene as an antialiased RGB picture of `size` x `size` pixels."""
    return draw(place(scene, rng), scene.background, size)


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
