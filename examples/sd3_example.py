"""Stable Diffusion 3 and 3.5 on several ranks.

    torchrun --nproc_per_node 2 examples/sd3_example.py --model stabilityai/stable-diffusion-3.5-medium \\
        --prompt "a small cactus" --use_cfg_parallel
"""

from diffusers import StableDiffusion3Pipeline

from xfuser import FlexibleArgumentParser, load_pipeline, xDiTParallel, xFuserArgs

parser = xFuserArgs.add_cli_args(FlexibleArgumentParser(description="Stable Diffusion 3 and 3.5 on several ranks"))
engine_config, input_config = xFuserArgs.from_cli_args(parser.parse_args()).create_config()

pipe = load_pipeline(engine_config, input_config, StableDiffusion3Pipeline)
pipe = xDiTParallel(pipe, engine_config, input_config)

pipe(**pipe.call_arguments())
for path in pipe.save("results", "sd3"):
    print(path)
