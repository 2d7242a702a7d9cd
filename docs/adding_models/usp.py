"""One sequence on several ranks: torchrun --nproc_per_node 4 usp.py --ulysses_degree 2 --ring_degree 2"""

import torch
from toy_dit import report, seeded_inputs, seeded_model
from toy_plan import TOY

from xfuser import FlexibleArgumentParser, parallelize, xFuserArgs

parser = xFuserArgs.add_cli_args(FlexibleArgumentParser())
engine_config, _ = xFuserArgs.from_cli_args(parser.parse_args()).create_config()

model = seeded_model()
latents, text = seeded_inputs(rows=3)
time = torch.full((3,), 500.0)
with torch.no_grad():
    serial = model(latents, time, text)
    with parallelize(model, TOY, engine_config).active():
        report(model(latents, time, text), serial)
