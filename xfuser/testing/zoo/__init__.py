"""Tiny transformers of every known class with random weights, and the inputs of a denoising loop for each.

Sizes are awkward on purpose: 3 heads, odd text lengths, token counts that are not divisible by the degrees.
"""

from xfuser.testing.zoo import image_cross, image_joint, image_sequence, sound, video_cross, video_joint, video_unet
from xfuser.testing.zoo.family import HEAD_DIM, HEADS, TEXT, WIDTH, WORDS, Family

__all__ = ["FAMILIES", "HEADS", "HEAD_DIM", "KINDS", "TEXT", "WIDTH", "WORDS", "Family"]

# Families by the kind of their output, as in the README's tables.
KINDS: dict[str, dict[str, Family]] = {
    "image": image_cross.FAMILIES | image_joint.FAMILIES | image_sequence.FAMILIES,
    "video": video_cross.FAMILIES | video_joint.FAMILIES | video_unet.FAMILIES,
    "sound": sound.FAMILIES,
}
FAMILIES: dict[str, Family] = {name: families[name] for families in KINDS.values() for name in sorted(families)}
