"""MiniMax-H3: one sequence of text, video and sound."""

from xfuser.models.plan import ModelPlan, Tokens

MINIMAX_H3 = ModelPlan(
    blocks=("transformer_blocks",),
    attention={"attn": ("image",)},
    head=None,
    per_token={"adaln_indices": Tokens(("image",), dim=0), "rotary_emb": Tokens(("image",), dim=0)},
    unbatched=(
        "timestep", "timestep_indices", "token_tags", "position_ids", "video_indices", "audio_indices", "text_indices",
    ),
    unpiped="it returns two outputs, and the pipeline may arrange text, video and sound in any order",
)  # fmt: skip
