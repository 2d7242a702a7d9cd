"""OmniGen (arXiv 2409.11340): one sequence of text, reference images and the image, with a mask over pairs of tokens,
which is cut in the attention."""

from xfuser.models.plan import ModelPlan, Tokens

OMNIGEN = ModelPlan(
    blocks=("layers",),
    attention={"self_attn": ("text", "image")},
    head=None,
    carried={"layers": {"hidden_states": ("text", "image")}},
    per_token={"image_rotary_emb": Tokens(("text", "image"), dim=-2)},
    pictures=("input_image_sizes", "input_img_latents"),
)
