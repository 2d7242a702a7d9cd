"""Krea 2: one sequence, text tokens first, with a key mask."""

from xfuser.models.plan import ModelPlan, Tokens

KREA2 = ModelPlan(
    blocks=("transformer_blocks",),
    attention={"attn": ("text", "image")},
    head=None,
    carried={"transformer_blocks": {"hidden_states": ("text", "image")}},
    per_token={
        "attention_mask": Tokens(("text", "image"), dim=-1),
        "image_rotary_emb": Tokens(("text", "image"), dim=0),
    },
    unbatched=("position_ids",),
)
