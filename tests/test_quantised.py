"""Quantised transformers run under the methods that leave weights as they are."""

import diffusers
import running
import tiny
import torch
from diffusers import DiffusionPipeline

from xfuser import xDiTParallel, xFuserArgs
from xfuser.weights.loading import load_pipeline


def draw(path, degrees, call):
    """A picture of the wrapped pipeline, or the bare one's without degrees; or why there is none."""
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
