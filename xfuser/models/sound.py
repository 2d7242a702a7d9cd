"""Stable Audio Open (arXiv 2407.14358), ACE-Step 1.5, LongCat-AudioDiT: sound; text by cross-attention."""

from xfuser.models.plan import ModelPlan, Tokens

STABLE_AUDIO = ModelPlan(
    blocks=("transformer_blocks",),
    attention={"attn1": ("image",)},
    per_token={"attention_mask": Tokens(("image",), dim=-1), "rotary_embedding": Tokens(("image",), dim=0)},
    unbatched=("rotary_embedding",),
    unpiped="what is said of the whole sound is a token of the sequence, ahead of the sound's own",
)

# Its mask of a sliding window is cut where attention needs it.
ACE_STEP = ModelPlan(
    blocks=("layers",),
    attention={"self_attn": ("image",)},
    head=None,
    per_token={"position_embeddings": Tokens(("image",), dim=0)},
    unpiped="a token is two entries of the latents, of which the last one may lack the second",
)

LONGCAT_AUDIO = ModelPlan(
    blocks=("blocks",),
    attention={"self_attn": ("image",)},
    head=None,
    per_token={"mask": Tokens(("image",)), "rope": Tokens(("image",), dim=0)},
)
