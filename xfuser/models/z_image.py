"""Z-Image (arXiv 2511.22699): one sequence of image and text, padded to the longest of the batch.

Its refiner blocks, two on the image and two on the text, run whole on every rank.
"""

from xfuser.models.plan import ModelPlan, Tokens

Z_IMAGE = ModelPlan(
    blocks=("layers",),
    attention={"attention": ("image",)},
    head=None,
    latents="x",
    image="x",
    per_token={"attn_mask": Tokens(("image",)), "freqs_cis": Tokens(("image",)), "noise_mask": Tokens(("image",))},
    residuals=("controlnet_block_samples",),
    row_lists=("x", "cap_feats", "siglip_feats", "image_noise_mask"),
    unpiped="text and image are one sequence that each row of the batch divides elsewhere",
)
