"""Calls that cannot be exact are refused, and errors leave no state behind."""

from typing import ClassVar

import diffusers
import pytest
import running
import tiny
import torch
from diffusers.models._modeling_parallel import ContextParallelInput

from xfuser import parallelize, xFuserArgs
from xfuser.testing import matrix


def message_of(kind, action):
    with pytest.raises(kind) as refused:
        action()
    return str(refused.value)


def refusals(path):
    """Return the messages of all refusals of a call, and whether the pipeline works after each."""
    call = tiny.call_of("sd3")
    pipe = running.loaded(path)
    parallel = running.wrap(pipe, {"ulysses_degree": 2})
    messages = {}

    def nested():
        with parallel.active():
            parallel(**call)

    messages["nested"] = message_of(RuntimeError, nested)

    def with_gradients():
        with parallel.active():
            pipe.transformer(torch.zeros(1, 16, 10, 6), torch.zeros(1, 5, 16), torch.zeros(1, 16), torch.zeros(1))

    messages["gradients"] = message_of(ValueError, with_gradients)
    pipe.transformer.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    messages["processor"] = message_of(ValueError, lambda: parallel(**call))
    pipe.transformer.set_attn_processor(diffusers.models.attention_processor.JointAttnProcessor2_0())
    return messages, running.array(parallel(**call, generator=running.seeded()))


def test_refusals_name_the_reason_and_leave_the_pipeline_working(pool, folder_of):
    expected = running.bare(folder_of("sd3"), tiny.call_of("sd3"))
    for messages, after in pool.run(2, refusals, folder_of("sd3")):
        assert "do not nest" in messages["nested"]
        assert "torch.no_grad()" in messages["gradients"]
        assert "transformer_blocks.0.attn: AttnProcessor called" in messages["processor"]
        assert running.error(after, expected) <= running.TOLERANCE


def nested_between_stages(path):
    """Return the message of a call in a callback, and an image of the next call."""
    call, asked = tiny.call_of("sd3"), {"pipefusion_parallel_degree": 2, "num_pipeline_patch": 2, "warmup_steps": 3}
    parallel = running.wrap(running.loaded(path), asked)

    def callback(*_):
        parallel(**call)

    message = message_of(RuntimeError, lambda: parallel(**call, callback_on_step_end=callback))
    picture = running.array(parallel(**call, generator=running.seeded()))
    parallel.unwrap()
    return message, picture


def test_stages_work_after_a_nested_call(pool, folder_of):
    expected = running.bare(folder_of("sd3"), tiny.call_of("sd3"))
    for message, after in pool.run(2, nested_between_stages, folder_of("sd3")):
        assert "do not nest" in message
        assert running.error(after, expected) <= running.TOLERANCE


class Fused(torch.nn.Module):
    """One module that computes a whole block, as in packages of quantised kernels."""

    def __init__(self, block):
        super().__init__()
        self.fused = block

    def forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
        return self.fused(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)


class FusedFlux(diffusers.FluxTransformer2DModel):
    """Has the plan of its base class, but different blocks."""

    def fuse(self):
        blocks = self.transformer_blocks
        blocks[len(blocks) - 1] = Fused(blocks[len(blocks) - 1])


def of_another_layout(path, degrees):
    pipe = running.loaded(path)
    original = pipe.transformer
    pipe.transformer = FusedFlux.from_config(original.config)
    pipe.transformer.load_state_dict(original.state_dict())
    pipe.transformer.eval().fuse()
    try:
        call = {**tiny.call_of("flux"), "num_inference_steps": 2, "output_type": "latent"}
        if degrees.keys() & {"data_parallel_degree", "tensor_parallel_degree"}:
            result = running.array(running.wrap(pipe, degrees)(**call, generator=running.seeded()))
            return float(running.error(result, running.array(pipe(**call, generator=running.seeded()))))
        return message_of(ValueError, lambda: running.wrap(pipe, degrees))
    finally:
        pipe.transformer = original


def test_blocks_without_the_planned_attention_are_refused(pool, folder_of):
    """They would silently attend only to each rank's own tokens."""
    for degrees in ({"ulysses_degree": 2}, {"ring_degree": 2}, {"distrifusion_degree": 2}, matrix.PIPED):
        for message in pool.run(2, of_another_layout, folder_of("flux"), degrees):
            assert "transformer_blocks.1 of FusedFlux, a Fused, has no attention module attn, which the plan" in message
    assert max(pool.run(2, of_another_layout, folder_of("flux"), {"data_parallel_degree": 2})) <= running.TOLERANCE


class Merged(torch.nn.Module):
    """A transformer whose context-parallel plan does not describe that its blocks merge pairs of tokens."""

    _cp_plan: ClassVar = {"": {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3)}}

    def __init__(self):
        super().__init__()
        self.attn = diffusers.models.attention_processor.Attention(8, heads=2, dim_head=4)

    def forward(self, hidden_states):
        pairs = hidden_states.unflatten(1, (-1, 2)).mean(2)
        return self.attn(pairs)


def unexplained(ranks):
    model = Merged()
    parallel = parallelize(model, None, xFuserArgs(ulysses_degree=ranks).create_config()[0])
    with torch.no_grad(), parallel.active():
        return message_of(ValueError, lambda: model(torch.randn(1, 8 * ranks, 8)))


def test_lengths_that_diffusers_plan_does_not_explain_are_refused(pool):
    """Equal lengths on all ranks are refused as well: 4 pairs of the 8 tokens on each rank, out of 16."""
    for message in pool.run(2, unexplained, 2):
        assert "attn attends to [4, 4] tokens on the ranks, which are neither shares of the [16] tokens" in message


def fails_then_works(path):
    """Raise between the two calls of sequential guidance, catch the exception, and generate another image."""
    pipe = running.loaded(path)
    parallel = running.wrap(pipe, {"use_cfg_parallel": True})
    call = tiny.call_of("flux", 1, true_cfg_scale=2.0, negative_prompt="a cat")
    calls = []

    def fail(module, args, kwargs):
        calls.append(None)
        if len(calls) == 4:
            raise RuntimeError("in the second call of step 1")

    handle = pipe.transformer.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(RuntimeError, match="second call"):
        parallel(**call, generator=running.seeded())
    handle.remove()
    return running.array(parallel(**call, generator=running.seeded()))


def test_a_failed_call_does_not_poison_the_next(pool, folder_of):
    call = tiny.call_of("flux", 1, true_cfg_scale=2.0, negative_prompt="a cat")
    expected = running.bare(folder_of("flux"), call)
    for result in pool.run(2, fails_then_works, folder_of("flux")):
        assert running.error(result, expected) <= running.TOLERANCE


def reads_early(path, degrees):
    """Read the first call's result before the second call."""
    pipe = running.loaded(path)
    seen = []
    hook = pipe.transformer.register_forward_hook(lambda module, args, output: seen.append(output[0].double().sum()))
    try:
        call = tiny.call_of("flux", 1, true_cfg_scale=2.0, negative_prompt="a cat")
        picture = running.array(running.wrap(pipe, degrees)(**call, generator=running.seeded()))
    finally:
        hook.remove()
    return picture, [float(value) for value in seen]


def test_an_early_read_of_the_first_branch_waits_for_it(pool, folder_of):
    picture, sums = reads_early(folder_of("flux"), None)
    for result, seen in pool.run(2, reads_early, folder_of("flux"), {"use_cfg_parallel": True}):
        assert running.error(result, picture) <= running.TOLERANCE
        assert seen == pytest.approx(sums, rel=1e-4)


def replaced_transformer(path):
    pipe = running.wrap(running.loaded(path), {"ulysses_degree": 2})
    original = pipe.transformer
    try:
        torch.manual_seed(9)
        pipe.transformer = tiny.sd3_transformer()
        call = tiny.call_of("sd3")
        ours = running.array(pipe(**call, generator=running.seeded()))
        theirs = running.array(pipe.unwrap()(**call, generator=running.seeded()))
        return running.error(ours, theirs)
    finally:
        running.loaded(path).transformer = original


def test_a_replaced_transformer_is_parallel_too(pool, folder_of):
    for difference in pool.run(2, replaced_transformer, folder_of("sd3")):
        assert difference <= running.TOLERANCE
