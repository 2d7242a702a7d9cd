"""Bria FIBO: joint attention, text tokens first; half of the text features are replaced in every block. FIBO 2: one
sequence of the prompt's gist tokens and of images."""

from xfuser.models.plan import ModelPlan, Tokens

BRIA_FIBO = ModelPlan(
    blocks=("transformer_blocks", "single_transformer_blocks"),
    attention={"attn": ("text", "image")},
    embed="x_embedder",
    text="encoder_hidden_states",
    whole=True,
    carried={"single_transformer_blocks": {"hidden_states": ("text", "image")}},
    per_token={"image_rotary_emb": Tokens(("text", "image"), dim=0)},
    unbatched=("img_ids", "txt_ids"),
    returns=("text", "image"),
    text_modules=("ff_context", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)

# The refiner blocks and the resampler of the text run whole on every rank.
BRIA_FIBO2 = ModelPlan(
    blocks=("layers",),
    attention={"attention": ("image",)},
    head=None,
    image="x",
    per_token={"attn_mask": Tokens(("image",)), "freqs_cis": Tokens(("image",)), "noise_mask": Tokens(("image",))},
    unpiped="text comes before or after the image in the sequence, depending on the lengths of the batch's prompts",
)
