"""Quantised transformers run under the methods that do not change weights."""

import json
import shutil

import diffusers
import pytest
import running
import tiny
import torch
from diffusers import DiffusionPipeline
from optimum.quanto import freeze, qint8, quantize

from xfuser import xDiTParallel, xFuserArgs
from xfuser.weights.loading import load_pipeline


def draw(path, degrees, call):
    """Return an image of the wrapped pipeline, or of the unwrapped one without degrees, or the error."""
    quantised = diffusers.QuantoConfig(weights_dtype="int8")
    options = {"subfolder": "transformer", "quantization_config": quantised, "torch_dtype": torch.float32}
    transformer = diffusers.SD3Transformer2DModel.from_pretrained(path, **options)
    if degrees is None:
        pipe = DiffusionPipeline.from_pretrained(path, transformer=transformer)
        return running.array(pipe(**call, generator=running.seeded()))
    config, _ = xFuserArgs(model=path, dtype="float32", **degrees).create_config()
    pipe = load_pipeline(config, None, transformer=transformer)
    try:
        return running.array(xDiTParallel(pipe, config)(**call, generator=running.seeded()))
    except ValueError as error:
        return str(error)


def test_quantised_transformers(pool, folder_of):
    path, call = folder_of("sd3"), tiny.call_of("sd3", 2)
    (bare,) = pool.run(1, draw, path, None, call)
    for method in ("ulysses_degree", "ring_degree", "data_parallel_degree"):
        for picture in pool.run(2, draw, path, {method: 2}, call):
            assert running.error(picture, bare) <= running.TOLERANCE
    for method in ("tensor_parallel_degree", "pipefusion_parallel_degree"):
        for told in pool.run(2, draw, path, {method: 2}, call):
            assert "is quantised" in told


def in_code(path, degrees, call):
    """Like :func:`draw`, with a transformer that is quantised after loading."""
    pipe = DiffusionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    quantize(pipe.transformer, weights=qint8)
    freeze(pipe.transformer)
    try:
        return running.array(running.wrap(pipe, degrees)(**call, generator=running.seeded()))
    except ValueError as error:
        return str(error)


def test_transformers_that_are_quantised_in_code(pool, folder_of):
    """Diffusers does not record the quantisation; only the weights show it."""
    path, call = folder_of("sd3"), tiny.call_of("sd3", 2)
    (bare,) = pool.run(1, in_code, path, None, call)
    assert running.error(bare, running.bare(path, call)) > 1e-4
    for picture in pool.run(2, in_code, path, {"ulysses_degree": 2}, call):
        assert running.error(picture, bare) <= running.TOLERANCE
    divided = ("tensor_parallel_degree", "pipefusion_parallel_degree")
    for degrees in [{method: 2} for method in divided] + [{"ulysses_degree": 2, "fully_shard_degree": 2}]:
        for told in pool.run(2, in_code, path, degrees, call):
            assert "SD3Transformer2DModel is quantised (WeightQBytesTensor)" in told and "use Ulysses" in told


@pytest.mark.parametrize("degrees", [{"tensor_parallel_degree": 2}, {"ulysses_degree": 2, "fully_shard_degree": 2}])
def test_quantised_folders_are_refused_before_groups(folder_of, tmp_path, degrees):
    path = shutil.copytree(folder_of("sd3"), tmp_path / "quantised")
    file = path / "transformer/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "torchao"}}))
    with pytest.raises(ValueError, match=r"SD3Transformer2DModel is quantised \(torchao\)"):
        xFuserArgs(model=str(path), **degrees).checked(2)
    xFuserArgs(model=str(path), ulysses_degree=2).checked(2)
