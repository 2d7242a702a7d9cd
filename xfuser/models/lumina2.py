"""Lumina Image 2.0 (arXiv 2503.21758): one sequence of text and image, padded to the longest of the batch.

The refiner blocks, two on the image and two on the text, run whole on every rank.
"""

from dataclasses import replace

from xfuser.models.plan import ModelPlan, Tokens

_OF_SEQUENCE = ModelPlan(
    blocks=("layers",),
    attention={"attn": ("image",)},
    head=None,
    per_token={"attention_mask": Tokens(("image",)), "image_rotary_emb": Tokens(("image",))},
)

_BOTH = ("image", "text")
_IN_PATCHES = replace(
    _OF_SEQUENCE,
    attention={"attn": _BOTH},
    carried={"noise_refiner": {"hidden_states": _BOTH}, "layers": {"hidden_states": _BOTH}},
    per_token={"attention_mask": Tokens(_BOTH), "image_rotary_emb": Tokens(_BOTH)},
    ahead=("noise_refiner",),
    text_first="encoder_attention_mask",
)

LUMINA2 = replace(_OF_SEQUENCE, in_patches=_IN_PATCHES)
