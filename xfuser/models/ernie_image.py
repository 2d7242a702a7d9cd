"""ERNIE-Image: one sequence, image tokens first, with a key mask; its blocks carry ``[tokens, B, D]``."""

from xfuser.models.plan import ModelPlan, Tokens

_BOTH = ("image", "text")
ERNIE_IMAGE = ModelPlan(
    blocks=("layers",),
    attention={"self_attention": _BOTH},
    head=None,
    image="x",
    carried={"layers": {"x": _BOTH}},
    carrier_dim=0,
    per_token={
        "rotary_pos_emb": Tokens(_BOTH), "temb": Tokens(_BOTH, dim=0), "attention_mask": Tokens(_BOTH, dim=-1),
    },
)  # fmt: skip
