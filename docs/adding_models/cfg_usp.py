"""Guidance and sequence together, by process groups alone: torchrun --nproc_per_node 4 cfg_usp.py"""

import torch
from toy_dit import report, seeded_inputs, seeded_model

from xfuser.core.distributed import (
    get_cfg_group,
    get_sp_group,
    get_world_group,
    init_distributed_environment,
    initialize_model_parallel,
)
from xfuser.model_executor.layers.usp import USP

init_distributed_environment()
initialize_model_parallel(
    classifier_free_guidance_degree=2, ulysses_degree=get_world_group().world_size // 2, ring_degree=1
)


def share(x, dim, group):
    return torch.tensor_split(x, group.world_size, dim=dim)[group.rank_in_group]


class SharedBlocks(torch.nn.Module):
    """Stands for all blocks: cuts text and image, runs the blocks on this rank's tokens, and gathers."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = torch.nn.ModuleList(blocks)

    def forward(self, image, text, time, places):
        group = get_sp_group()
        image, text, places = share(image, 1, group), share(text, 1, group), share(places, 0, group)
        for block in self.blocks:
            attention = block.attention
            # The order of tokens does not matter to attention: each rank's text and image lie together.
            attention.forward = lambda text, image, places, a=attention: a.merge(USP(*a.heads(text, image, places)))
            image, text = block(image, text, time, places)
        return group.all_gather(image, dim=1), group.all_gather(text, dim=1)


@torch.no_grad()
def draw(model, group=None, steps=3):
    latents, text = seeded_inputs()
    both = torch.cat([torch.zeros_like(text), text])
    for t in torch.linspace(1000, 250, steps):
        if group is None:
            without, conditioned = model(latents.repeat(2, 1, 1, 1), t.expand(2), both).chunk(2)
        else:
            noise = model(latents, t.expand(1), share(both, 0, group))  # this rank's branch
            without, conditioned = group.all_gather(noise, separate_tensors=True)
        latents = latents - (without + 3 * (conditioned - without)) / steps
    return latents


model = seeded_model()
serial = draw(model)
model.blocks = torch.nn.ModuleList([SharedBlocks(model.blocks)])
report(draw(model, get_cfg_group()), serial)
