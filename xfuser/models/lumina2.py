"""Lumina Image 2.0 (arXiv 2503.21758): one sequence of text and image, padded to the longest of the batch.

Its refiner blocks, two on the image and two on the text, run whole on every rank.
"""

from xfuser.models.plan import ModelPlan, Tokens

LUMINA2 = ModelPlan(
    blocks=("layers",),
    attention={"attn": ("image",)},
    head=None,
    per_token={"attention_mask": Tokens(("image",)), "image_rotary_emb": Tokens(("image",))},
    unpiped="text and image are one sequence that each row of the batch divides elsewhere",
)
