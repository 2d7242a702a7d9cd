"""Pipelines that share components with a wrapped one, and components that are replaced while it is wrapped."""

import copy
import pickle

import pytest
import running
import tiny
import torch
from diffusers import AutoPipelineForImage2Image
from diffusers.hooks import HookRegistry, ModelHook

STAGES = {"pipefusion_parallel_degree": 2, "num_pipeline_patch": 2, "warmup_steps": 3}
SHARDS = {"ulysses_degree": 2, "fully_shard_degree": 2}
TENSOR = {"tensor_parallel_degree": 2}
CALL = tiny.call_of("sd3")
FROM_IMAGE = CALL | {"image": running.picture(), "strength": 0.6, "num_inference_steps": 5}


def message(action, *args):
    with pytest.raises((ValueError, RuntimeError)) as refused:
        action(*args)
    return str(refused.value)


def shared(path, degrees):
    """Call and wrap a bare pipeline that has a wrapped one's transformer; return messages, and the images of both."""
    pipe = running.fresh(path)
    other = AutoPipelineForImage2Image.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    wrapped = running.wrap(pipe, degrees)
    told = [message(running.drawn, other, FROM_IMAGE)] if degrees != TENSOR else []
    told.append(message(running.wrap, other, degrees))
    pictures = [running.drawn(wrapped, CALL)]
    wrapped.unwrap()
    return told, [*pictures, running.drawn(other, FROM_IMAGE)]


@pytest.mark.parametrize(
    ("degrees", "called", "wrapped"),
    [
        (STAGES, "on another PipeFusion stage: call the wrapped pipeline", "an earlier wrap divided the blocks"),
        (SHARDS, "divided over the ranks of a wrapped pipeline", "divided over the ranks of a wrapped pipeline"),
        (TENSOR, None, "is divided over ranks already"),
    ],
    ids=["stages", "shards", "tensor"],
)
def test_pipelines_that_share_divided_weights_are_refused(pool, folder_of, degrees, called, wrapped):
    """Without blocks of other stages, the image would be wrong."""
    path = folder_of("sd3")
    expected = [
        running.drawn(running.fresh(path), CALL),
        running.drawn(AutoPipelineForImage2Image.from_pipe(running.fresh(path)), FROM_IMAGE),
    ]
    for told, pictures in pool.run(2, shared, path, degrees):
        assert called is None or called in told[0]
        assert wrapped in told[-1]
        assert max(map(running.error, pictures, expected)) <= running.TOLERANCE


def sharing_encoders(path, mode):
    """Wrap two pipelines that share text encoders; return images of both, also after unwrap() of the first."""
    pipe = running.fresh(path)
    other = AutoPipelineForImage2Image.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    first, second = (running.wrap(one, {"ulysses_degree": 2, "text_encoder": mode}) for one in (pipe, other))
    pictures = [running.drawn(first, CALL), running.drawn(second, FROM_IMAGE), running.drawn(first, CALL)]
    first.unwrap()
    pictures.append(running.drawn(second, FROM_IMAGE))
    pictures.append(running.drawn(second.unwrap(), FROM_IMAGE))
    assert not {"forward", "save_pretrained"} & vars(pipe.text_encoder).keys()
    return pictures


@pytest.mark.parametrize("mode", ["rank0", "offload"])
def test_wrapped_pipelines_share_text_encoders(pool, folder_of, mode):
    path = folder_of("sd3")
    text, image = (
        running.drawn(running.fresh(path), CALL),
        running.drawn(AutoPipelineForImage2Image.from_pipe(running.fresh(path)), FROM_IMAGE),
    )
    for pictures in pool.run(2, sharing_encoders, path, mode):
        assert max(map(running.error, pictures, [text, image, text, image, image])) <= running.TOLERANCE


def placing_anew(path):
    """Wrap pipelines that have the text encoders of a wrapped one, with other or shared modes; return messages.

    A wrap that refuses the transformer leaves the encoders alone.
    """
    told = []
    for modes in (("shard", "shard"), ("shard", "rank0"), ("rank0", "replicate"), ("offload", "shard")):
        first, second = ({"ulysses_degree": 2, "text_encoder": mode} for mode in modes)
        pipe = running.fresh(path)
        other = AutoPipelineForImage2Image.from_pipe(pipe)
        wrapped = running.wrap(pipe, first)
        told.append(message(running.wrap, other, second))
        told.append(message(running.wrap, AutoPipelineForImage2Image.from_pipe(pipe), second))
        wrapped.unwrap()
    HookRegistry.check_if_exists_or_initialize(pipe.transformer).register_hook(ModelHook(), "any")
    assert "hooks, which cannot be copied" in message(running.wrap, pipe, SHARDS | {"text_encoder": "rank0"})
    assert "forward" not in vars(pipe.text_encoder) and all(weight.numel() for weight in pipe.text_encoder.parameters())
    return told


def test_text_encoders_are_placed_once(pool, folder_of):
    for told in pool.run(2, placing_anew, folder_of("sd3")):
        assert all("call unwrap() on it first" in one for one in told), told


def replacing(path, degrees):
    """Replace the transformer of a wrapped pipeline; return images or messages before and after unwrap()."""
    pipe = running.fresh(path)
    wrapped = running.wrap(pipe, degrees)
    torch.manual_seed(9)
    wrapped.transformer = tiny.sd3_transformer()
    first = message(running.drawn, wrapped, CALL) if degrees == STAGES else running.drawn(wrapped, CALL)
    wrapped.unwrap()
    return first, running.drawn(pipe, CALL)


@pytest.mark.parametrize("degrees", [STAGES, SHARDS, TENSOR], ids=["stages", "shards", "tensor"])
def test_a_replaced_transformer_stays_or_is_refused(pool, folder_of, degrees):
    path = folder_of("sd3")
    pipe = running.fresh(path)
    torch.manual_seed(9)
    pipe.transformer = tiny.sd3_transformer()
    expected = running.drawn(pipe, CALL)
    for first, after in pool.run(2, replacing, path, degrees):
        if degrees == STAGES:
            assert "was replaced since the pipeline was wrapped" in first
        else:
            assert running.error(first, expected) <= running.TOLERANCE
        assert running.error(after, expected) <= running.TOLERANCE


def copied(path):
    wrapped = running.wrap(running.fresh(path), {"ulysses_degree": 2})
    return [message(make, wrapped) for make in (copy.copy, copy.deepcopy, pickle.dumps)]


def test_wrapped_pipelines_cannot_be_copied(pool, folder_of):
    for told in pool.run(2, copied, folder_of("sd3")):
        assert all("cannot be copied or pickled: copy the pipeline that unwrap() returns" in one for one in told)
