"""Pipelines whose transformer was compiled: the picture is right under every method, and unwrap() gives it compiled."""

import pytest
import running
import tiny
import torch
from diffusers import DiffusionPipeline

from xfuser import parallelize, xFuserArgs
from xfuser.models.registry import plan_of
from xfuser.testing.zoo import FAMILIES

PIPED = {"pipefusion_parallel_degree": 2, "warmup_steps": 3}  # exact in warm-up steps
METHODS = {
    "ulysses": {"ulysses_degree": 2},
    "cfg": {"use_cfg_parallel": True},
    "dp": {"data_parallel_degree": 2},
    "tensor": {"tensor_parallel_degree": 2},
    "pipefusion": PIPED,
    "shares": {"ulysses_degree": 2, "fully_shard_degree": 2},
}


def whole(pipe):
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


def in_place(pipe):
    pipe.transformer.compile(backend="eager")


def blocks(pipe):
    for block in pipe.transformer.transformer_blocks:
        block.compile(backend="eager")


def replaced_blocks(pipe):
    blocks = pipe.transformer.transformer_blocks
    for index, block in enumerate(blocks):
        blocks[index] = torch.compile(block, backend="eager")


WAYS = (whole, in_place, blocks, replaced_blocks)


def compiled_parts(pipe):
    """The class and the compiled call of each module."""
    return [(type(one).__name__, vars(one).get("_compiled_call_impl")) for one in pipe.transformer.modules()]


def fresh(path):
    torch._dynamo.reset()
    pipe = DiffusionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(path, degrees, call, way):
    """A picture of a pipeline that was compiled and called before the wrap; whether it is compiled after unwrap()."""
    pipe = fresh(path)
    way(pipe)
    pipe(**call, generator=running.seeded())  # compiled code is there, without hooks
    given, before = pipe.transformer, compiled_parts(pipe)
    parallel = running.wrap(pipe, degrees)
    picture = running.array(parallel(**call, generator=running.seeded()))
    parallel.unwrap()
    return picture, pipe.transformer is given and compiled_parts(pipe) == before


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_compiled_transformer_is_parallel(pool, folder_of, family, method):
    path, call = folder_of(family), tiny.call_of(family, 2)
    for picture, as_before in pool.run(2, draw, path, METHODS[method], call, whole):
        assert running.error(picture, running.bare(path, call)) <= running.TOLERANCE and as_before


@pytest.mark.parametrize("method", ["ulysses", "tensor", "pipefusion"])
@pytest.mark.parametrize("way", [in_place, blocks, replaced_blocks])
def test_modules_that_are_compiled_in_place_or_within(pool, folder_of, way, method):
    path, call = folder_of("sd3"), tiny.call_of("sd3", 2)
    for picture, as_before in pool.run(2, draw, path, METHODS[method], call, way):
        assert running.error(picture, running.bare(path, call)) <= running.TOLERANCE and as_before


def compiled_late(path, call):
    """Compiled through the wrapper: pictures of its calls, and of a loop that calls what was compiled itself."""
    pipe = fresh(path)
    parallel = running.wrap(pipe, {"ulysses_degree": 2})
    plain = pipe.transformer
    whole(parallel)
    given = parallel.transformer
    picture = running.array(parallel(**call, generator=running.seeded()))
    assert parallel.transformer is given is not plain
    torch.manual_seed(0)
    inputs = torch.randn(1, 16, 10, 6), torch.randn(1, 5, 16), torch.randn(1, 16), torch.zeros(1)
    with torch.no_grad():
        expected = plain(*inputs, return_dict=False)[0]
        seen = []
        feed_forward = plain.transformer_blocks[0].ff
        handle = feed_forward.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
        with parallel.active():
            ours = given(*inputs, return_dict=False)[0]
        handle.remove()
    parallel.unwrap()
    return picture, running.error(ours.numpy(), expected.numpy()), seen


def test_what_is_compiled_behind_the_wrap_is_parallel_too(pool, folder_of):
    path, call = folder_of("sd3"), tiny.call_of("sd3")
    for picture, difference, seen in pool.run(2, compiled_late, path, call):
        assert running.error(picture, running.bare(path, call)) <= running.TOLERANCE
        assert difference <= running.TOLERANCE and seen[0] in (7, 8)  # of 15 tokens


def bare_loop(family):
    """parallelize() of a compiled transformer with a plan: registered for the model's class, not the compiler's."""
    torch.manual_seed(0)
    model = FAMILIES[family].build()
    register = plan_of(model)
    compiled = torch.compile(model, backend="eager")
    parallel = parallelize(compiled, register, xFuserArgs(ulysses_degree=2).create_config()[0])
    inputs = FAMILIES[family].conditions(model, 2, torch.randn)
    latents, steps = torch.randn(2, 4, 10, 6), torch.tensor([5, 5])
    with torch.no_grad():
        expected = model(latents, timestep=steps, **inputs, return_dict=False)[0]
        with parallel.active():
            ours = parallel.transformer(latents, timestep=steps, **inputs, return_dict=False)[0]
    return running.error(ours.numpy(), expected.numpy())


def test_a_compiled_transformer_in_a_loop(pool):
    for difference in pool.run(2, bare_loop, "pixart"):
        assert difference <= running.TOLERANCE
