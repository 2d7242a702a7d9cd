"""PixArt-Sigma on several ranks.

    torchrun --nproc_per_node 2 examples/pixartsigma_example.py --model PixArt-alpha/PixArt-Sigma-XL-2-1024-MS \\
        --prompt "a small cactus" --ulysses_degree 2
"""

from diffusers import PixArtSigmaPipeline

from xfuser import FlexibleArgumentParser, load_pipeline, xDiTParallel, xFuserArgs

parser = xFuserArgs.add_cli_args(FlexibleArgumentParser(description="PixArt-Sigma on several ranks"))
engine_config, input_config = xFuserArgs.from_cli_args(parser.parse_args()).create_config()

pipe = load_pipeline(engine_config, input_config, PixArtSigmaPipeline)
pipe = xDiTParallel(pipe, engine_config, input_config)

pipe(**pipe.call_arguments())
for path in pipe.save("results", "pixart_sigma"):
    print(path)
