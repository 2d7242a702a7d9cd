"""Attention layer and process groups alone, in a forward written by hand; every rank has all of the text.

torchrun --nproc_per_node 4 usp_replicated_text.py
"""

import torch
from toy_dit import report, seeded_inputs, seeded_model

from xfuser.core.distributed import (
    get_sp_group,
    get_world_group,
    init_distributed_environment,
    initialize_model_parallel,
)
from xfuser.core.long_ctx_attention import xFuserLongContextAttention

init_distributed_environment()
ranks = get_world_group().world_size
initialize_model_parallel(ulysses_degree=min(2, ranks), ring_degree=ranks // min(2, ranks))
layer = xFuserLongContextAttention()


def attend(attention, text, image, places):
    """The toy's attention, of this rank's image tokens and all text tokens."""
    q, k, v = (x.transpose(1, 2) for x in attention.heads(text, image, places))  # [B, text + image, heads, D]
    words = text.shape[1]
    out = layer(
        None,
        q[:, words:],
        k[:, words:],
        v[:, words:],
        joint_tensor_query=q[:, :words],
        joint_tensor_key=k[:, :words],
        joint_tensor_value=v[:, :words],
        joint_strategy="front",
    )
    return attention.merge(out.transpose(1, 2))


class SharedBlocks(torch.nn.Module):
    """Stands for all blocks: cuts the image's tokens, runs the blocks on this rank's, and gathers."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = torch.nn.ModuleList(blocks)

    def forward(self, image, text, time, places):
        group = get_sp_group()
        mine = torch.tensor_split(image, group.world_size, dim=1)[group.rank_in_group]
        own_places = torch.tensor_split(places, group.world_size, dim=0)[group.rank_in_group]
        for block in self.blocks:
            block.attention.forward = lambda text, image, places, a=block.attention: attend(a, text, image, places)
            mine, text = block(mine, text, time, own_places)
        return group.all_gather(mine, dim=1), text


model = seeded_model()
latents, text = seeded_inputs(rows=2)
time = torch.full((2,), 500.0)
with torch.no_grad():
    serial = model(latents, time, text)
    model.blocks = torch.nn.ModuleList([SharedBlocks(model.blocks)])
    report(model(latents, time, text), serial)
