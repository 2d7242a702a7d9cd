"""HunyuanDiT on several ranks.

    torchrun --nproc_per_node 2 examples/hunyuandit_example.py --model Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers \\
        --prompt "a small cactus" --ring_degree 2
"""

from diffusers import HunyuanDiTPipeline

from xfuser import FlexibleArgumentParser, load_pipeline, xDiTParallel, xFuserArgs

parser = xFuserArgs.add_cli_args(FlexibleArgumentParser(description="HunyuanDiT on several ranks"))
engine_config, input_config = xFuserArgs.from_cli_args(parser.parse_args()).create_config()

pipe = load_pipeline(engine_config, input_config, HunyuanDiTPipeline)
pipe = xDiTParallel(pipe, engine_config, input_config)

pipe(**pipe.call_arguments())
for path in pipe.save("results", "hunyuan_dit"):
    print(path)
