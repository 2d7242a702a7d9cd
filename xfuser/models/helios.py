"""Helios: tokens of past frames, the ``"text"`` stream of the plan, come before the video's tokens; cross-attention to
the text itself."""

from xfuser.models.plan import ModelPlan, Tokens

_BOTH = ("text", "image")
HELIOS = ModelPlan(
    blocks=("blocks",),
    attention={"attn1": _BOTH},
    head=None,
    carried={"blocks": {"hidden_states": _BOTH}},
    per_token={"rotary_emb": Tokens(_BOTH), "temb": Tokens(_BOTH)},
    leading={"original_context_length": "image"},
    text_modules=("attn2.to_k", "attn2.to_v"),
)
