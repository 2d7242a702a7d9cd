"""Ideogram 4: one sequence of text and image, built by the pipeline, with a mask over pairs of tokens."""

from xfuser.models.plan import ModelPlan, Tokens

IDEOGRAM4 = ModelPlan(
    blocks=("layers",),
    attention={"attention": ("image",)},
    head="final_layer",
    per_token={"image_rotary_emb": Tokens(("image",)), "adaln_input": Tokens(("image",))},
    spread=("adaln_input",),
    unpiped="the latents that it gets contain text tokens, and the scheduler steps only some of them",
)
