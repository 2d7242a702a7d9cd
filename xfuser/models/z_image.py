"""Z-Image (arXiv 2511.22699): one sequence of image and text, padded to the longest of the batch.

The refiner blocks, two on the image and two on the text, run whole on every rank. Under PipeFusion, all tokens after
the image, including the padding between image and text, are the ``"text"`` stream.
"""

from dataclasses import replace

from xfuser.models.plan import ModelPlan, Tokens

_OF_SEQUENCE = ModelPlan(
    blocks=("layers",),
    attention={"attention": ("image",)},
    head=None,
    latents="x",
    image="x",
    per_token={"attn_mask": Tokens(("image",)), "freqs_cis": Tokens(("image",)), "noise_mask": Tokens(("image",))},
    residuals=("controlnet_block_samples",),
    row_lists=("x", "cap_feats", "siglip_feats", "image_noise_mask"),
)

_BOTH = ("image", "text")
_IN_PATCHES = replace(
    _OF_SEQUENCE,
    attention={"attention": _BOTH},
    carried={"noise_refiner": {"x": _BOTH}, "layers": {"x": _BOTH}},
    per_token={"attn_mask": Tokens(_BOTH), "freqs_cis": Tokens(_BOTH)},
    ahead=("noise_refiner",),
)

Z_IMAGE = replace(_OF_SEQUENCE, in_patches=_IN_PATCHES)
