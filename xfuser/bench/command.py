"""``xdit bench``: compare configurations of a pipeline with a serial run, on this machine."""

import argparse
import json
import os
import tempfile
from dataclasses import fields
from typing import Any

from xfuser.bench.configurations import GROUPS, PRESETS, Configuration, configurations
from xfuser.bench.files import write_json
from xfuser.config import FlexibleArgumentParser, xFuserArgs
from xfuser.core import device as devices
from xfuser.core.distributed.failure import fail_together
from xfuser.pipeline_io.media import check_writable

PROMPT = "a red circle above a blue square"
SIZES = ("height", "width", "num_inference_steps")  # flags that also apply to a case
STEPS = 20
KINDS = ("costs", "slow_links", "vae_memory", "host_overhead", "predict")  # flags of measurements of their own
FIXED = ("vae_memory", "host_overhead")  # those whose model and configurations cannot be chosen


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code.

    Raises:
        ValueError: the options cannot be run; raised before any rank starts.
    """
    options = parser().parse_args(arguments)
    check_kind(options)
    if options.slow_links and not is_rank():
        from xfuser.bench import slow_links

        return slow_links.main(options, arguments)
    if options.vae_memory:
        from xfuser.bench import vae_memory

        return vae_memory.run_memory()
    if options.host_overhead:
        from xfuser.bench import host_overhead

        return host_overhead.run(options.rounds)
    if options.predict and not (options.case or options.model or is_rank()):
        from xfuser.bench.predict import run_cases

        return run_cases(options, arguments)
    chosen = chosen_configurations(options)
    if is_rank():
        fail_together()
        return _run_rank(options, chosen)
    check_outputs(options)
    if options.predict:
        from xfuser.bench.predict import machine_here, prediction_table, predictions

        machine_here()  # raises before anything is measured
    told = compare(options, arguments, chosen)
    if told is None:
        return 1
    if options.predict:
        print(prediction_table(predictions(options, chosen, told)))
    return 0


def check_kind(options: argparse.Namespace) -> None:
    """Raise a ValueError for flags of several measurements, of which only one would run."""
    kinds = [f"--{name}" for name in KINDS if getattr(options, name)]
    if len(kinds) > 1:
        raise ValueError(f"{' and '.join(kinds)} are different measurements: choose one")
    for name in ("case", "model", "configs", "ranks"):
        if getattr(options, name) and (kind := next((kind for kind in FIXED if getattr(options, kind)), None)):
            raise ValueError(f"{name}={getattr(options, name)!r} changes nothing about {kind}: remove it")
    for name in ("rates", "delay"):
        if getattr(options, name) and not options.slow_links:
            raise ValueError(f"{name}={getattr(options, name)!r} requires slow_links: add it")


def parser() -> FlexibleArgumentParser:
    """The flags of the bench, and the library's flags for the pipeline and its inputs."""
    flags = FlexibleArgumentParser(
        prog="xdit bench",
        description="Compare configurations of a pipeline with a serial run: time, memory, traffic, error.",
        epilog='Example: xdit bench --configs "ulysses_degree=2" "pipefusion_parallel_degree=2 num_pipeline_patch=4"',
    )
    presets = "; ".join(f"{name}: {text}" for name, text in PRESETS.items())
    flags.add_argument(
        "--configs", nargs="+", metavar="FLAGS", help=f"Flags of each one, or a preset ({presets}; default: both)."
    )
    flags.add_argument("--ranks", nargs="+", type=int, help="Numbers of ranks for presets (default: 2).")
    flags.add_argument("--case", metavar="NAME", help="A pipeline with random weights, instead of --model.")
    flags.add_argument("--costs", action="store_true", help="Every method on 2 and 4 ranks, next to its formula.")
    flags.add_argument("--slow_links", action="store_true", help="Run on two network namespaces, over slow links.")
    flags.add_argument("--rates", nargs="+", metavar="RATE", help="For --slow_links (default: 100mbit 1gbit 10gbit).")
    flags.add_argument("--delay", metavar="TIME", help="For --slow_links, such as 1ms; requires the kernel's netem.")
    flags.add_argument("--vae_memory", action="store_true", help="Find the largest image for the parallel VAE.")
    flags.add_argument("--host_overhead", action="store_true", help="Host cost of a wrapped block, without a GPU.")
    flags.add_argument("--compile", action="store_true", help="Also measure compiled blocks: gains and costs.")
    flags.add_argument("--against", choices=["diffusers"], help="Also run Diffusers' own context parallelism.")
    flags.add_argument("--rounds", type=int, default=5, help="Interleaved rounds; medians are shown (default: 5).")
    flags.add_argument("--warm_up", type=int, default=1, help="Short calls before each timed call (default: 1).")
    flags.add_argument(
        "--predict",
        action="store_true",
        help="Also show the predictions of xdit plan for this machine; for four models if no model is given.",
    )
    flags.add_argument("--timeline", metavar="FILE", help="PNG file for a timeline of PipeFusion's stages.")
    flags.add_argument("--output_dir", default="results/bench", help="Folder for the report (default: results/bench).")
    flags.add_argument("--part", help=argparse.SUPPRESS)  # file for rank 0's results, read by the parent process
    xFuserArgs.add_cli_args(flags).set_defaults(num_inference_steps=None)  # a case has its own number of steps
    return flags


def is_rank() -> bool:
    """Whether this process is a rank, not the process that starts the ranks."""
    return "RANK" in os.environ


def base_arguments(options: argparse.Namespace) -> xFuserArgs:
    """The arguments common to all configurations."""
    args = xFuserArgs.from_cli_args(options)
    for spec in fields(xFuserArgs):
        given = getattr(args, spec.name)
        if spec.metadata["group"] == GROUPS[0] and given != spec.default and spec.name != "do_classifier_free_guidance":
            raise ValueError(f"{spec.name}={given!r} belongs to one configuration: give it within --configs")
    args.prompt = args.prompt or [PROMPT]
    args.num_inference_steps = STEPS if args.num_inference_steps is None else args.num_inference_steps
    args.checked()
    return args


def chosen_configurations(options: argparse.Namespace) -> list[Configuration]:
    """Check the options, and return the configurations to compare."""
    if not options.case and not options.model:
        options.case = "costs" if options.costs else "links" if options.slow_links else None
    options.ranks = options.ranks or ([2, 4] if options.costs else [2])
    for name, least in (("rounds", 1), ("warm_up", 0)):
        if getattr(options, name) < least:
            raise ValueError(f"{name}={getattr(options, name)} must be a whole number of {least} or more")
    if options.use_teacache or (options.use_fbcache and (options.compile or options.against)):
        raise ValueError(
            "the serial run can have use_fbcache alone, without compile and against: give the cache within --configs"
        )
    texts = options.configs
    if options.case:
        from xfuser.bench.cases import CASES

        if options.case not in CASES or options.model:
            raise ValueError(f"case={options.case!r} must be one of {', '.join(CASES)}, without a model")
        texts = texts or (list(CASES[options.case].configs) if CASES[options.case].configs else None)
    chosen = configurations(texts, options.ranks, base_arguments(options))
    if not chosen:
        raise ValueError(f"there is nothing to compare on {options.ranks} ranks: give --configs")
    return chosen


def compare(
    options: argparse.Namespace, arguments: list[str], chosen: list[Configuration]
) -> list[dict[str, Any]] | None:
    """Measure on ranks that are started for this, and write the report; returns the result of :func:`run_ranks`."""
    told = run_ranks("bench", arguments, chosen)
    if told is not None:
        _report(options, told)
    return told


def run_ranks(command: str, arguments: list[str], chosen: list[Configuration]) -> list[dict[str, Any]] | None:
    """Run ``xdit COMMAND`` on each configured number of ranks; returns the results, or None if a run failed."""
    from xfuser.cli.main import launch

    worlds = sorted({configuration.ranks for configuration in chosen})
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // worlds[-1])))  # the same for all
    told = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault(
            "TORCHINDUCTOR_CACHE_DIR", os.path.join(folder, "inductor")
        )  # so that a first call compiles
        for ranks in worlds:
            part = os.path.join(folder, f"{ranks}.json")
            if launch(ranks, [command, *arguments, "--part", part]):
                return None
            with open(part, encoding="utf-8") as file:
                told.append(json.load(file))
    return told


def of_this_world(chosen: list[Configuration]) -> list[Configuration]:
    """The configurations for the running number of ranks."""
    ranks = int(os.environ["WORLD_SIZE"])
    mine = [configuration for configuration in chosen if configuration.ranks == ranks]
    if not mine:
        raise ValueError(f"{ranks} ranks run, and the configurations are for {sorted({one.ranks for one in chosen})}")
    return mine


def check_outputs(options: argparse.Namespace) -> None:
    """Raise a ValueError if the report cannot be written, or would be incomplete."""
    from xfuser.core.extras import extra

    check_writable(options.output_dir)
    check_writable(os.path.dirname(options.timeline or "") or ".")
    if options.timeline and devices.device_type() != "cpu":
        raise ValueError(
            "timeline shows when ranks compute on CPUs: an accelerator computes later than the host issues"
        )
    extra("matplotlib", "a plot")
    if options.against:
        from xfuser.bench.workload import check_peer

        check_peer()


def _run_rank(options: argparse.Namespace, chosen: list[Configuration]) -> int:
    """Run one rank; rank 0 writes the report, or its results for the process that started the ranks."""
    from xfuser.bench import compiled
    from xfuser.bench.measure import measure
    from xfuser.bench.workload import Workload, diffusers_own, ours
    from xfuser.core.distributed import get_world_group, init_distributed_environment

    mine = of_this_world(chosen)
    init_distributed_environment()
    if not options.part and get_world_group().is_first_rank:
        check_outputs(options)
    sizes = {name: value for name in SIZES if (value := getattr(options, name)) is not None}
    workload = Workload(base_arguments(options), options.case, sizes)
    if options.compile:
        return _finish(options, compiled.measure(workload, mine, options.rounds))
    contenders = [ours(workload, configuration) for configuration in mine]
    if options.against:
        contenders.append(diffusers_own(workload, mine[0].ranks))
    return _finish(options, measure(workload, contenders, options.rounds, options.warm_up))


def _finish(options: argparse.Namespace, told: dict[str, Any]) -> int:
    """Write the results on rank 0, and end the rank."""
    from xfuser.core.distributed import destroy_distributed_environment, get_world_group

    if get_world_group().is_first_rank and options.part:
        write_json(options.part, told)
    elif get_world_group().is_first_rank:
        _report(options, [told])
    destroy_distributed_environment()
    return 0


def _report(options: argparse.Namespace, told: list[dict[str, Any]]) -> None:
    from xfuser.bench import compiled
    from xfuser.bench.report import write_report

    write = compiled.write_report if options.compile else write_report
    print(write(options.output_dir, title_of(options), vars(options), told))


def title_of(options: argparse.Namespace) -> str:
    """The title of a report: the pipeline or case."""
    if options.case:
        from xfuser.bench.cases import CASES

        return f"{CASES[options.case].title} (case {options.case})"
    return options.model or "The shipped pipeline"
