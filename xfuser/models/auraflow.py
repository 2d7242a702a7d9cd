"""AuraFlow: joint attention, text tokens first; single-stream blocks carry both in one argument."""

from xfuser.models.plan import ModelPlan

AURAFLOW = ModelPlan(
    blocks=("joint_transformer_blocks", "single_transformer_blocks"),
    attention={"attn": ("text", "image")},
    text="encoder_hidden_states",
    carried={"single_transformer_blocks": {"hidden_states": ("text", "image")}},
    returns=("text", "image"),
    text_modules=("ff_context", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)
