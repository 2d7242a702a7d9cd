"""HiDream-I1 (arXiv 2505.22705): joint attention, image tokens first, with other text tokens in every block."""

from xfuser.models.plan import ModelPlan, Tokens

HIDREAM = ModelPlan(
    blocks=("double_stream_blocks", "single_stream_blocks"),
    attention={"block.attn1": ("image", "text")},
    head="final_layer",
    whole=True,
    carried={"single_stream_blocks": {"hidden_states": ("image", "text")}},
    per_token={"hidden_states_masks": Tokens(("image", "text")), "image_rotary_emb": Tokens(("image", "text"))},
    batch_dims={"encoder_hidden_states_llama3": 1},
    returns=("image", "text"),
    unpiped="every block takes text tokens of its own, so that they are no stream",
)
