"""Bria FIBO: as Chroma, but half of the text features are replaced in every block. FIBO 2: one sequence of the prompt's
gist tokens and of images."""

from dataclasses import replace

from xfuser.models.chroma import CHROMA
from xfuser.models.plan import ModelPlan, Tokens

BRIA_FIBO = replace(CHROMA, whole=True, residuals=(), prompted=())

# The refiner blocks and the resampler of the text run whole on every rank.
BRIA_FIBO2 = ModelPlan(
    blocks=("layers",),
    attention={"attention": ("image",)},
    head=None,
    image="x",
    per_token={"attn_mask": Tokens(("image",)), "freqs_cis": Tokens(("image",)), "noise_mask": Tokens(("image",))},
    unpiped="text comes before or after the image in the sequence, depending on the lengths of the batch's prompts",
)
