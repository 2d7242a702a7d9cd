"""Flux.1 on several ranks.

    torchrun --nproc_per_node 2 examples/flux_example.py --model black-forest-labs/FLUX.1-dev \\
        --prompt "a small cactus" --ulysses_degree 2
"""

from diffusers import FluxPipeline

from xfuser import FlexibleArgumentParser, load_pipeline, xDiTParallel, xFuserArgs

parser = xFuserArgs.add_cli_args(FlexibleArgumentParser(description="Flux.1 on several ranks"))
engine_config, input_config = xFuserArgs.from_cli_args(parser.parse_args()).create_config()

pipe = load_pipeline(engine_config, input_config, FluxPipeline)
pipe = xDiTParallel(pipe, engine_config, input_config)

pipe(**pipe.call_arguments())
for path in pipe.save("results", "flux"):
    print(path)
