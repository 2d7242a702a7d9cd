"""DiT-XL on several ranks; prompts are ImageNet classes, by name or number.

    torchrun --nproc_per_node 2 examples/dit_example.py --model facebook/DiT-XL-2-256 \\
        --prompt "golden retriever" --use_cfg_parallel
"""

from diffusers import DiTPipeline

from xfuser import FlexibleArgumentParser, load_pipeline, xDiTParallel, xFuserArgs

parser = xFuserArgs.add_cli_args(
    FlexibleArgumentParser(description="DiT-XL on several ranks; prompts are ImageNet classes, by name or number")
)
engine_config, input_config = xFuserArgs.from_cli_args(parser.parse_args()).create_config()

pipe = load_pipeline(engine_config, input_config, DiTPipeline)
pipe = xDiTParallel(pipe, engine_config, input_config)

pipe(**pipe.call_arguments())
for path in pipe.save("results", "dit"):
    print(path)
