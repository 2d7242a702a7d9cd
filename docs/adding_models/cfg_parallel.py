"""Guidance on two ranks: torchrun --nproc_per_node 2 cfg_parallel.py"""

import torch
from toy_dit import report, seeded_inputs, seeded_model
from toy_plan import TOY

from xfuser import parallelize, xFuserArgs


@torch.no_grad()
def draw(model, steps=4):
    latents, text = seeded_inputs()
    both = torch.cat([torch.zeros_like(text), text])  # no prompt, and the prompt
    for t in torch.linspace(1000, 250, steps):
        noise = model(latents.repeat(2, 1, 1, 1), t.expand(2), both)
        without, conditioned = noise.chunk(2)
        latents = latents - (without + 3 * (conditioned - without)) / steps
    return latents


model = seeded_model()
serial = draw(model)
engine_config, _ = xFuserArgs(use_cfg_parallel=True).create_config()
with parallelize(model, TOY, engine_config).active():
    report(draw(model), serial)
