"""Flux.3: joint attention, text tokens first.

Before these blocks, text, image and reference images each have a few blocks that attend only to their own tokens. Those
run whole on every rank.
"""

from xfuser.models.plan import ModelPlan, Tokens

FLUX3 = ModelPlan(
    blocks=("single_transformer_blocks",),
    attention={"attn": ("text", "image")},
    head=None,
    text="encoder_hidden_states",
    per_token={
        "temb_mod": Tokens(("image",)),
        "temb_mod_context": Tokens(("text",)),
        "image_rotary_emb": Tokens(("text", "image"), dim=0),
    },
    beside=("image_cond_hidden_states",),
    unbatched=("img_ids", "txt_ids", "image_cond_ids"),
    counts_steps=("target_timestep",),
    returns=("text", "image"),
)
