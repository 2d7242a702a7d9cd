"""Wan 2.1 and 2.2 (arXiv 2503.20314), VACE (arXiv 2503.07598), SkyReels-V2 (arXiv 2504.13074), AnyFlow:
cross-attention to text, 3-D rotary tables; time conditioning may differ between tokens."""

from dataclasses import replace

from xfuser.models.plan import ModelPlan, Tokens

WAN = ModelPlan(
    blocks=("blocks",),
    attention={"attn1": ("image",)},
    embed="patch_embedding",
    per_token={"rotary_emb": Tokens(("image",)), "temb": Tokens(("image",), dims=4)},
    spread=("temb",),
    text_modules=("attn2.to_k", "attn2.to_v"),
)

WAN_VACE = replace(
    WAN,
    blocks=("vace_blocks", "blocks"),
    carried={"vace_blocks": {"hidden_states": ("image",), "control_hidden_states": ("image",)}},
    unbatched=("control_hidden_states_scale",),
    hints={"vace_blocks": "vace_layers"},
)

# Its mask over pairs of frames is cut in the attention.
SKYREELS_V2 = replace(WAN, per_token={"rotary_emb": Tokens(("image",)), "temb": Tokens(("image",), dim=2, dims=4)})

ANYFLOW = replace(
    WAN,
    embed=None,
    per_token={"rotary_emb": Tokens(("image",), dim=2), "temb": Tokens(("image",))},
    frames=1,
    unpiped="it takes the next step's time, which pipelines look up by the index of the step",
)

# Between blocks, each frame attends to the motion of its face.
WAN_ANIMATE = replace(
    WAN,
    gathered={"face_adapter.*": ("hidden_states",)},
    framed=("encoder_hidden_states",),
    between={"face_adapter.*": "hidden_states"},
)
