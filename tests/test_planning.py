"""What xdit plan foresees is what runs take, and what cannot fit is refused before it is loaded."""

import gc

import pytest
import running
import torch
from test_cli import xdit

from xfuser import xDiTParallel, xFuserArgs
from xfuser.cli.plan import main, parser
from xfuser.config.args import in_bytes
from xfuser.config.config import legal_degrees
from xfuser.core.meters import LiveMemory
from xfuser.planner.rehearsal import alone_of, rehearse, weight_of
from xfuser.planner.table import COLUMNS, needs_of, plan
from xfuser.weights.loading import load_pipeline


def asked(path, degrees, **changes):
    words = {"prompt": "a red circle", "height": 80, "width": 48, "num_inference_steps": 3, "dtype": "float32"}
    return xFuserArgs(model=path, **words | {"max_sequence_length": 6, "output_type": "latent"} | degrees | changes)


def taken(path, degrees):
    """Bytes of a rank's weights, and the high-water mark of its other tensors in a call."""
    parallel = xDiTParallel(running.loaded(path), *asked(path, degrees).create_config())
    parts = [part for part in parallel.components.values() if isinstance(part, torch.nn.Module)]
    weights, call = sum(map(weight_of, parts)), parallel.call_arguments()
    peaks = []
    for _ in range(3):  # messages that threads let go of late, and cycles that await their collection, may add to one
        gc.collect()
        with LiveMemory() as meter:
            parallel(**call)
        peaks.append(meter.peak)
    parallel.unwrap()
    return weights, min(peaks)


@pytest.mark.parametrize(
    ("family", "ranks", "degrees"),
    [
        ("sd3", 1, {}),
        ("sd3", 2, {"use_cfg_parallel": True}),
        ("sd3", 2, {"ring_degree": 2}),
        ("sd3", 2, {"pipefusion_parallel_degree": 2}),
        ("sd3", 2, {"tensor_parallel_degree": 2}),
        ("sd3", 2, {"output_type": "pt", "use_parallel_vae": True, "ulysses_degree": 2}),
        ("flux", 4, {"ulysses_degree": 2, "pipefusion_parallel_degree": 2}),
        ("flux", 2, {"data_parallel_degree": 2, "prompt": ["a red circle", "the cat", "a green square"]}),
    ],
)
def test_what_is_foreseen_is_what_is_taken(pool, folder_of, family, ranks, degrees):
    """By the rank that takes most: the peak of tensors, and weights, to 10 %."""
    path = folder_of(family)
    with alone_of(ranks):
        memory = rehearse(*asked(path, degrees).checked())
    real = pool.run(ranks, taken, path, degrees)
    assert sum(memory.weights.values()) == pytest.approx(max(weights for weights, _ in real), rel=0.1)
    assert max(memory.live.values()) == pytest.approx(max(peak for _, peak in real), rel=0.1)


def held(path, degrees):
    parallel = xDiTParallel(running.loaded(path), *asked(path, degrees).create_config())
    shares = {}
    for name, part in parallel.components.items():
        if isinstance(part, torch.nn.Module):
            local = [x.to_local() if hasattr(x, "to_local") else x for x in part.parameters()]
            shares[name] = sum(x.nbytes for x in local) + sum(x.nbytes for x in part.buffers())
    parallel.unwrap()
    return shares


def test_shares_of_weights_are_reckoned(pool, folder_of):
    path, mode = folder_of("sd3"), {"text_encoder": "shard", "fully_shard_degree": 2}
    with alone_of(2):
        memory = rehearse(*asked(path, {"ulysses_degree": 2}).checked())
    told = needs_of(memory, "shard", 2, 2)
    real = pool.run(2, held, path, mode | {"ulysses_degree": 2})[0]
    assert told["transformer"] == pytest.approx(real["transformer"], rel=0.1)
    encoders = sum(share for name, share in real.items() if name.startswith("text_encoder"))
    assert told["text encoders"] == pytest.approx(encoders, rel=0.1)


def test_the_table_has_every_combination_and_why_some_cannot_be(folder_of, capsys):
    path = folder_of("dit")
    call = ["--prompt", "1", "--dtype", "fp32", "--no_do_classifier_free_guidance"]
    rows = plan(xFuserArgs.from_cli_args(_parsed(path, call)), 2)
    assert len(rows) == len(legal_degrees(2))
    refused = [row.name for row in rows if row.refusal]
    assert refused == ["cfg 2"] and all(row.needs.keys() == set(COLUMNS) for row in rows if not row.refusal)
    peak = max(row.needs["peak"] for row in rows if not row.refusal)
    enough, little = (f"{size / 1e6:.6f}MB" for size in (peak + 1, 1000))
    flags = ["--model", path, "--world_size", "2", *call]
    assert main([*flags, "--memory", enough]) == 0 and "weights" not in capsys.readouterr().out.split("peak")[1]
    assert main([*flags, "--memory", little]) == 1
    assert capsys.readouterr().out.count("no: the weights alone are above") == len(rows) - 1


def _parsed(path, flags):
    return parser().parse_args(["--model", path, "--world_size", "2", *flags])


def test_xdit_plan_is_a_command(tmp_path):
    done = xdit(tmp_path, "plan", "--world-size", "1", "--prompt", "a red circle")  # of the shipped pipeline
    assert done.returncode == 0 and "all degrees 1" in done.stdout and done.stderr == "", done.stderr
    done = xdit(tmp_path, "plan", "--world-size", "0")
    assert done.returncode == 1 and done.stderr.count("ValueError") == 1


def too_much(path, degrees, memory):
    try:
        load_pipeline(asked(path, degrees, memory=memory).create_config()[0])
    except ValueError as error:
        return str(error)
    return "loaded"


def test_what_cannot_fit_is_not_loaded(pool, folder_of):
    """The stage that is too heavy is one rank's; all of them say so. With more stages it fits."""
    path = folder_of("sd3")
    weights = sum(map(weight_of, (x for x in running.loaded(path).components.values() if hasattr(x, "parameters"))))
    memory = f"{0.95 * weights / 1e3:.3f}KB"
    told = pool.run(2, too_much, path, {"ulysses_degree": 2}, memory)
    assert all("that a rank keeps are" in text and "xdit plan" in text for text in told)
    assert pool.run(2, too_much, path, {"pipefusion_parallel_degree": 2}, memory) == ["loaded"] * 2


def test_sizes():
    assert [in_bytes(size) for size in ("24GB", "1.5 KiB", "3m")] == [24 * 10**9, 1536, 3 * 10**6]
    with pytest.raises(ValueError, match="'much' is not a size"):
        in_bytes("much")
