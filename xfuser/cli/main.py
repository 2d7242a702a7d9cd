"""``xdit`` generates images from a prompt on the ranks that the degrees require; ``xdit COMMAND`` runs a command."""

import importlib
import os
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from xfuser.cli.words import check_words, known_words
from xfuser.config import FlexibleArgumentParser, xFuserArgs
from xfuser.config.args import SHIPPED_PIPELINE
from xfuser.core import device as devices
from xfuser.core.distributed import destroy_distributed_environment, get_world_group
from xfuser.pipeline_io.media import check_writable

COMMANDS = {
    "bench": "xfuser.bench.command:main",
    "doctor": "xfuser.cli.doctor:main",
    "plan": "xfuser.cli.plan:main",
    "quality": "xfuser.bench.quality_command:main",
    "serve": "xfuser.serve.command:main",
}  # functions that take the remaining arguments and return the exit code


def main() -> int:
    """Entry point of the console script; returns the exit code."""
    arguments, is_rank = sys.argv[1:], "RANK" in os.environ
    try:
        if arguments and arguments[0] in COMMANDS:
            return named(COMMANDS[arguments[0]])(arguments[1:])
        options = parser().parse_args(arguments)
        args = xFuserArgs.from_cli_args(options)
        args.model = args.model or SHIPPED_PIPELINE
        if not any(args.prompt):
            raise ValueError('there is nothing to draw: give --prompt "..."')
        args = replace(args, model=args.model or SHIPPED_PIPELINE) if args.auto else args
        engine_config, _ = args.checked()
        check_words(engine_config.model_config.model, args.prompt, args.negative_prompt)
        check_writable(options.output_dir)
        ranks = devices.device_count() if args.auto else engine_config.world_size
        if ranks > 1 and not is_rank:
            return launch(ranks, arguments)
        pipe, call = prepare(args)
    except ValueError as error:
        if is_rank:
            raise
        print(f"xdit: ValueError: {error}", file=sys.stderr)
        return 1
    draw(pipe, call, options.output_dir)
    return 0


def parser() -> FlexibleArgumentParser:
    """A parser with all flags of the library, and ``--output_dir``."""
    flags = FlexibleArgumentParser(
        prog="xdit",
        description="Generate images from prompts. The number of processes is the product of the degrees.",
        epilog='Example: xdit --prompt "a red circle above a blue square" --ulysses_degree 2.'
        f" Other commands, each with its own --help: {', '.join(f'xdit {name}' for name in COMMANDS)}."
        " Without --model, the pipeline shipped with the package is used; its prompts may contain the words:"
        f" {', '.join(known_words())}.",
    )
    flags.add_argument("--output_dir", default="results", help="Folder for the images (default: results).")
    return xFuserArgs.add_cli_args(flags)


def named(path: str) -> Callable[..., Any]:
    """Import the function named by ``module:function``."""
    module, _, function = path.partition(":")
    return getattr(importlib.import_module(module), function)


def launch(ranks: int, arguments: list[str]) -> int:
    """Start this command once per rank; returns the exit code."""
    devices.check_ranks(ranks)
    devices.preload("xfuser.parallel", "xfuser.weights.loading")
    return start(ranks, "xfuser.cli.main:run", arguments)


def run(arguments: list[str]) -> None:
    """Run this command on a rank."""
    sys.argv[1:] = arguments
    sys.exit(main())


def start(ranks: int, function: str, *arguments: Any) -> int:
    """Call ``module:function`` in one process per rank with torchrun's launcher; returns the exit code."""
    import logging

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks print their own errors
    nodes = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": ranks, "run_id": uuid.uuid4().hex}
    rendezvous = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    options = {"max_restarts": 0, "monitor_interval": 0.1, "start_method": "forkserver"}
    with tempfile.TemporaryDirectory() as folder:  # the launcher leaves log folders behind
        config = LaunchConfig(**nodes, **rendezvous, **options, logs_specs=DefaultLogsSpecs(log_dir=folder))
        try:
            elastic_launch(config, call)(function, *arguments)
        except ChildFailedError:
            return 1
    return 0


def call(path: str, *arguments: Any) -> Any:
    """Call ``module:function`` on a rank, and print the traceback of an exception."""
    try:
        return named(path)(*arguments)
    except Exception:
        traceback.print_exc()
        raise


def prepare(args: xFuserArgs) -> tuple[Any, dict[str, Any]]:
    """The wrapped pipeline on this rank, and the arguments for its call."""
    from xfuser.parallel import xDiTParallel
    from xfuser.weights.loading import load_pipeline  # these import Diffusers, which the launcher does not need

    engine_config, input_config = args.create_config()
    pipe = xDiTParallel(load_pipeline(engine_config, input_config), engine_config, input_config)
    return pipe, pipe.call_arguments()


def draw(pipe: Any, call: dict[str, Any], directory: str) -> None:
    """Call the pipeline and save the images on this rank; rank 0 prints paths, time and memory."""
    devices.synchronize()
    start = time.perf_counter()
    pipe(**call)
    devices.synchronize()
    seconds = time.perf_counter() - start
    world = get_world_group()
    use = pipe.cache_use
    saved = world.all_gather_object((pipe.save(directory, "xdit"), devices.peak_memory(), use.computed, use.skipped))
    if world.is_first_rank:
        paths, memory, computed, skipped = zip(*saved, strict=True)
        print("\n".join(path for of_rank in paths for path in of_rank))
        if total := sum(computed) + sum(skipped):
            print(f"caching skipped {sum(skipped) / total:.0%} of {total} block computations")
        peak = max(memory) / 2**20
        print(
            f"{seconds:.2f} s for {call['num_inference_steps']} steps on {world.world_size}"
            f" rank{'s' * (world.world_size > 1)} ({devices.device_type()}), peak memory {peak:.0f} MiB a rank"
        )
    destroy_distributed_environment()
