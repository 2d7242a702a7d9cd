"""HiDream-I1 (arXiv 2505.22705): joint attention, image tokens first; every block has its own text tokens."""

from xfuser.models.plan import ModelPlan, Tokens

HIDREAM = ModelPlan(
    blocks=("double_stream_blocks", "single_stream_blocks"),
    attention={"block.attn1": ("image", "text")},
    head="final_layer",
    text="encoder_hidden_states",
    whole=True,
    padded=True,
    carried={"single_stream_blocks": {"hidden_states": ("image", "text")}},
    per_token={"hidden_states_masks": Tokens(("image", "text")), "image_rotary_emb": Tokens(("image", "text"))},
    batch_dims={"encoder_hidden_states_llama3": 1},
    returns=("image", "text"),
    text_modules=("block.ff_t", *(f"block.attn1.to_{name}_t" for name in ("q", "k", "v", "out"))),
)
