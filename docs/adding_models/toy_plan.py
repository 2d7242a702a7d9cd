"""What xfuser must know of the toy transformer."""

from toy_dit import seeded_inputs, seeded_model

from xfuser import ModelPlan, check_plan
from xfuser.models.plan import Tokens

TOY = ModelPlan(
    blocks=("blocks",),  # the ModuleLists of blocks, in the order of execution
    attention={"attention": ("text", "image")},  # the attention modules of a block, and what they concatenate
    embed="embed",  # the module that makes tokens of latents, row by row
    head="head",  # the last module that works on tokens
    latents="latents",  # the argument of the forward with the latents
    image="image",  # the arguments of the blocks that carry tokens ...
    text="text",
    per_token={"places": Tokens(("image",), dim=0)},  # ... or one entry for each
    returns=("image", "text"),  # what a block returns
)

if __name__ == "__main__":
    model = seeded_model()
    latents, text = seeded_inputs(rows=2)
    inputs = {"latents": latents, "time": latents.new_tensor([500.0, 500.0]), "text": text}
    print(check_plan(model, inputs, plan=TOY))
    without = ModelPlan(**{**vars(TOY), "attention": {}})  # as if attention had been forgotten
    print(check_plan(model, inputs, plan=without))
