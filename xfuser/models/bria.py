"""Bria FIBO: joint attention, text tokens first, half of whose features are other ones in every block; FIBO 2: one
sequence of the prompt's gist and pictures."""

from xfuser.models.plan import ModelPlan, Tokens

BRIA_FIBO = ModelPlan(
    blocks=("transformer_blocks", "single_transformer_blocks"),
    attention={"attn": ("text", "image")},
    embed="x_embedder",
    whole=True,
    carried={"single_transformer_blocks": {"hidden_states": ("text", "image")}},
    per_token={"image_rotary_emb": Tokens(("text", "image"), dim=0)},
    unbatched=("img_ids", "txt_ids"),
    returns=("text", "image"),
    unpiped="every block takes text tokens of its own, so that they are no stream",
)

# Refiner blocks and the resampler of the text run whole on every rank.
BRIA_FIBO2 = ModelPlan(
    blocks=("layers",),
    attention={"attention": ("image",)},
    head=None,
    image="x",
    per_token={"attn_mask": Tokens(("image",)), "freqs_cis": Tokens(("image",)), "noise_mask": Tokens(("image",))},
    unpiped="text comes ahead of the image in its sequence or behind it, as the lengths of a batch's prompts are",
)
