"""Stable Diffusion XL on several ranks.

    torchrun --nproc_per_node 4 examples/sdxl_example.py --model stabilityai/stable-diffusion-xl-base-1.0 \\
        --prompt "a small cactus" --use_cfg_parallel --distrifusion_degree 2 --warmup_steps 4
"""

from diffusers import StableDiffusionXLPipeline

from xfuser import FlexibleArgumentParser, load_pipeline, xDiTParallel, xFuserArgs

parser = xFuserArgs.add_cli_args(FlexibleArgumentParser(description="Stable Diffusion XL on several ranks"))
engine_config, input_config = xFuserArgs.from_cli_args(parser.parse_args()).create_config()

pipe = load_pipeline(engine_config, input_config, StableDiffusionXLPipeline)
pipe = xDiTParallel(pipe, engine_config, input_config)

pipe(**pipe.call_arguments())
for path in pipe.save("results", "sdxl"):
    print(path)
