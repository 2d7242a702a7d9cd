"""Sound: Stable Audio Open (arXiv 2407.14358), Stable Audio 3, MiniMax Music 3, ACE-Step 1.5, LongCat-AudioDiT.

Some have other tokens before those of the sound: tokens of global conditions or of the time, or learned ones. These are
the ``"text"`` stream of the plan; the text itself takes part by cross-attention.
"""

from xfuser.models.plan import ModelPlan, Tokens

_BOTH = ("text", "image")

STABLE_AUDIO = ModelPlan(
    blocks=("transformer_blocks",),
    attention={"attn1": _BOTH},
    head=None,
    carried={"transformer_blocks": {"hidden_states": _BOTH}},
    per_token={"attention_mask": Tokens(_BOTH, dim=-1), "rotary_embedding": Tokens(_BOTH, dim=0)},
    unbatched=("rotary_embedding",),
    text_modules=("attn2.to_k", "attn2.to_v"),
    packed=2,
)

STABLE_AUDIO3 = ModelPlan(
    blocks=("transformer_blocks",),
    attention={"self_attn": _BOTH},
    head=None,
    carried={"transformer_blocks": {"hidden_states": _BOTH}},
    per_token={"rope": Tokens(_BOTH, dim=0), "local_seq": Tokens(("image",))},
    leading={"num_memory_tokens": "text"},
    many=True,
    text_modules=("cross_attn.to_kv",),
    packed=2,
)

MINIMAX_MUSIC3 = ModelPlan(
    blocks=("transformer_blocks",),
    attention={"attn": _BOTH},
    head=None,
    carried={"transformer_blocks": {"hidden_states": _BOTH}},
    per_token={"rotary_emb": Tokens(_BOTH, dim=0)},
    packed=2,
)

# Its mask of a sliding window is cut in the attention.
ACE_STEP = ModelPlan(
    blocks=("layers",),
    attention={"self_attn": ("image",)},
    head=None,
    per_token={"position_embeddings": Tokens(("image",), dim=0)},
    unpiped="a token covers two entries of the latents, and the last token may have only one",
)

LONGCAT_AUDIO = ModelPlan(
    blocks=("blocks",),
    attention={"self_attn": ("image",)},
    head=None,
    per_token={"mask": Tokens(("image",)), "rope": Tokens(("image",), dim=0)},
)
