"""CogVideoX and 1.5 (arXiv 2408.06072), and ConsisID (arXiv 2411.17440): joint attention, text tokens first."""

from dataclasses import replace

from xfuser.models.plan import ModelPlan, Tokens

COGVIDEOX = ModelPlan(
    blocks=("transformer_blocks",),
    attention={"attn1": ("text", "image")},
    text="encoder_hidden_states",
    per_token={"image_rotary_emb": Tokens(("image",), dim=0)},
    unbatched=("image_rotary_emb",),
    returns=("image", "text"),
    frames=1,
)

# Its forward normalises text and image together, then splits them by the length of the text.
CONSISID = replace(COGVIDEOX, head=None, between={"perceiver_cross_attention.*": "hidden_states"})
