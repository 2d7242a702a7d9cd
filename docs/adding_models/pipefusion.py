"""PipeFusion with whatever else: torchrun --nproc_per_node 4 pipefusion.py --pipefusion_parallel_degree 2 \\
--num_pipeline_patch 2 --ulysses_degree 2
"""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from toy_dit import report, seeded_inputs, seeded_model
from toy_plan import TOY

from xfuser import FlexibleArgumentParser, parallelize, xFuserArgs

STEPS = 4
parser = xFuserArgs.add_cli_args(FlexibleArgumentParser())
args = xFuserArgs.from_cli_args(parser.parse_args())


@torch.no_grad()
def draw(model, scheduler):
    latents, text = seeded_inputs()
    both = torch.cat([torch.zeros_like(text), text])
    scheduler.set_timesteps(STEPS)
    for t in scheduler.timesteps:
        without, conditioned = model(latents.repeat(2, 1, 1, 1), t.expand(2), both).chunk(2)
        noise = without + 3 * (conditioned - without)
        latents = scheduler.step(noise, t, latents, return_dict=False)[0]
    return latents


model, scheduler = seeded_model(), FlowMatchEulerDiscreteScheduler()
serial = draw(model, scheduler)

# Steps that are all synchronous give the picture of one rank ...
args.warmup_steps = STEPS
engine_config, _ = args.create_config()
parallel = parallelize(model, TOY, engine_config, scheduler)
with parallel.active():
    report(draw(model, parallel.scheduler), serial)
parallel.unwrap()

# ... and one synchronous step gives one that is a little stale.
args.warmup_steps = 1
parallel = parallelize(model, TOY, args.create_config()[0], scheduler)
with parallel.active():
    stale = draw(model, parallel.scheduler)
if torch.distributed.get_rank() == 0:
    print(f"what staleness does to it: {((stale - serial).abs().max() / serial.abs().max()).item():.1e}")
