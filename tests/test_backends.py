"""Attention backends of Diffusers: the chosen one computes each rank's local attention, under every method."""

import math
import types
from contextlib import contextmanager

import pytest
import running
import tiny
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.models import attention_dispatch
from torch._dynamo.utils import counters

from xfuser import xFuserArgs
from xfuser.core.attention import dispatch
from xfuser.core.attention.intercept import intercepted
from xfuser.core.attention.kernels import additive, attention, attention_with_lse
from xfuser.core.hooks import replaced
from xfuser.testing import matrix
from xfuser.testing.zoo import FAMILIES

METHODS = {
    "ulysses": {"ulysses_degree": 2},
    "ring": {"ring_degree": 2},
    "cfg": {"use_cfg_parallel": True},
    "dp": {"data_parallel_degree": 2},
    "tensor": {"tensor_parallel_degree": 2},
    "pipefusion": {"pipefusion_parallel_degree": 2, "num_pipeline_patch": 3, "warmup_steps": 1},
}
ON_ONE = {"pipefusion": {"pipefusion_parallel_degree": 1, "num_pipeline_patch": 3, "warmup_steps": 1}}
counts = {"calls": 0, "lse": 0}


def scores(query, key, attn_mask, scale):
    q, k = query.transpose(1, 2), key.transpose(1, 2)
    found = q @ k.mT * (scale or 1 / math.sqrt(q.shape[-1]))
    return found if attn_mask is None else found.masked_fill(~attn_mask, -torch.inf)


def twice(query, key, value, attn_mask=None, scale=None, return_lse=False, _parallel_config=None):
    """A kernel that tests can recognise: its outputs are doubled."""
    counts["calls"] += 1
    counts["lse"] += return_lse
    found = scores(query, key, attn_mask, scale)
    out = (found.softmax(-1) @ value.transpose(1, 2)).transpose(1, 2) * 2
    return (out, found.logsumexp(-1)) if return_lse else out


def without_lse(query, key, value, scale=None):
    counts["calls"] += 1
    return (scores(query, key, None, scale).softmax(-1) @ value.transpose(1, 2)).transpose(1, 2)


def lengths_only(query, key, value, attn_mask=None, scale=None, return_lse=False):
    """Like kernels that take lengths: attend to the first keys of each batch entry, as many as the mask shows."""
    shown = attn_mask if attn_mask.ndim == 2 else attn_mask[:, 0, 0]
    places = torch.arange(key.shape[1]) < shown.sum(-1, keepdim=True)
    return twice(query, key, value, places[:, None, None], scale)


@contextmanager
def registered(name, function):
    registry = attention_dispatch._AttentionBackendRegistry
    before = dict(registry._backends), dict(registry._supported_arg_names)
    registry.register(attention_dispatch.AttentionBackendName(name))(function)
    try:
        yield
    finally:
        registry._backends, registry._supported_arg_names = before


OWN = {"sage": twice, "xformers": without_lse, "sage_varlen": lengths_only}


def drawn(path, degrees, call, backend, compile_blocks=False):
    """Return an image, and how often the registered backend was called, in total and for an LSE."""
    torch._dynamo.reset()
    counts.update(calls=0, lse=0)
    pipe = DiffusionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    function = OWN.get(backend, attention_dispatch._AttentionBackendRegistry._backends[backend])
    with registered(backend, function):
        for module in pipe.transformer.modules():
            if hasattr(processor := getattr(module, "processor", None), "_attention_backend"):
                processor._attention_backend = attention_dispatch.AttentionBackendName(backend)
        wrapped = running.wrap(pipe, degrees and degrees | {"use_torch_compile": compile_blocks})
        picture = running.array(wrapped(**call, generator=running.seeded()))
        running.unwrap(wrapped)
    return picture, dict(counts)


def serial(path, method, call, backend):
    return drawn(path, ON_ONE.get(method), call, backend)[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", ["native", "_native_math", "flex", "sage", "xformers"])
def test_the_chosen_backend_runs(pool, folder_of, backend, method):
    path, call = folder_of("flux"), tiny.call_of("flux", 3)
    expected = pool.run(1, serial, path, method, call, backend)[0]
    for picture, seen in pool.run(2, drawn, path, METHODS[method], call, backend):
        assert running.error(picture, expected) <= running.TOLERANCE
        if backend == "sage":
            assert seen["calls"] and (seen["lse"] > 0) == (method == "ring")
        if backend == "xformers":
            assert (seen["calls"] > 0) == (method != "ring")  # the ring requires an LSE


UNABLE = ("longcat_audio",)  # Diffusers' flex takes no key mask in cross-attention, even without a wrap


def errors_of_all_classes(backend, degrees):
    """Return the errors of all supported classes, with their masks, relative to the default backend on one rank."""
    call, found = {"num_inference_steps": 1}, {}
    for family in FAMILIES:
        if not matrix.refusal(family, "ulysses2"):
            expected = matrix.draw(family, None, call)
            with attention_dispatch.attention_backend(backend):
                if family not in UNABLE:
                    found[family] = matrix.error(matrix.draw(family, degrees, call), expected)
    return found


@pytest.mark.matrix
@pytest.mark.parametrize("method", ["ulysses", "ring"])
def test_all_classes_under_flex(pool, method):
    for errors in pool.run(2, errors_of_all_classes, "flex", METHODS[method]):
        assert not {name: e for name, e in errors.items() if e > matrix.TOLERANCES.get(name, matrix.TOLERANCE)}


def by_flag(degrees, name):
    call = {"num_inference_steps": 1}
    return matrix.draw("qwen_image", degrees | {"attention_backend": name}, call)


@pytest.mark.parametrize("degrees", [{}, {"ulysses_degree": 2}, {"ring_degree": 2}, {"use_cfg_parallel": True}])
def test_the_flag_takes_names_of_diffusers(pool, degrees):
    expected = matrix.draw("qwen_image", None, {"num_inference_steps": 1})
    for latents in pool.run(2 if degrees else 1, by_flag, degrees, "flex"):
        assert matrix.error(latents, expected) <= matrix.TOLERANCE


@pytest.mark.parametrize("name", ["flash_4_hub", "flash_varlen_hub", "_flash_3_varlen_hub", "sage"])
def test_backends_that_return_none_or_a_packed_lse_leave_the_ring_to_others(name):
    """As Diffusers' functions of these names, which call kernels that are not here; one returns a tuple without it."""

    def packed(query, key, value, attn_mask=None, scale=None, return_lse=False, _parallel_config=None):
        out = twice(query, key, value)
        return out, None if name in ("flash_4_hub", "sage") else query.new_zeros(query.shape[2], query.shape[1])

    q = torch.randn(1, 3, 5, 8)
    with registered(name, packed):
        out, lse = attention_with_lse(q, q, q, backend=name)
    assert torch.allclose(out, attention(q, q, q), atol=1e-5) and lse.shape == (1, 3, 5)


@pytest.mark.parametrize("heads", [3, 5])
def test_an_lse_of_any_layout_is_of_each_head_and_query(heads):
    """FlashAttention 3 in Diffusers returns [B, S, H], other functions [B, H, S]."""

    def transposed(query, key, value, attn_mask=None, scale=None, return_lse=False, _parallel_config=None):
        out, lse = twice(query, key, value, return_lse=True)
        return out / 2, lse.mT

    q, k = torch.randn(2, 1, heads, 5, 8)
    with registered("_flash_3", transposed):
        out, lse = attention_with_lse(q, k, k, backend="_flash_3")
    assert torch.allclose(out, attention(q, k, k), atol=1e-5)
    assert torch.allclose(lse, (q @ k.mT * 8**-0.5).logsumexp(-1), atol=1e-5)


def added(q, k, v, bias, dropout, scale):
    """As the kernel of xformers: the bias is added, and its rows are aligned to 8 elements."""
    assert not any(step % 8 for step in bias.stride()[:-1])
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), bias, scale=scale).transpose(1, 2)


@pytest.mark.parametrize("shape", [(2, 1, 1, 5), (1, 1, 1, 5), (2, 1, 8, 8), (8, 8)])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_xformers_gets_masks_that_hide_keys(monkeypatch, shape, kind):
    xops = types.SimpleNamespace(memory_efficient_attention=added)
    monkeypatch.setattr(attention_dispatch, "xops", xops, raising=False)
    q, k, shown = torch.randn(2, 3, 8, 8), torch.randn(2, 3, shape[-1], 8), torch.rand(shape) > 0.3
    shown[..., 0] = True
    mask = additive(shown, kind) if kind.is_floating_point else shown
    assert torch.allclose(attention(q, k, k, mask, backend="xformers"), attention(q, k, k, shown), atol=1e-5)


def test_unknown_and_missing_backends_are_refused():
    with pytest.raises(ValueError, match="attention_backend='fast': unknown; here there are auto, sdpa, flash"):
        xFuserArgs(attention_backend="fast").checked(1)
    with pytest.raises(ValueError, match=r"attention_backend='sage': .*sageattention"):
        xFuserArgs(attention_backend="sage").checked(1)


def by_backend(name, degrees):
    with registered(name, OWN[name]), running_backend(name):
        return matrix.draw("qwen_image", degrees, {"num_inference_steps": 1})


def running_backend(name):
    """Like Diffusers' context manager, for a backend without its package."""
    registry = attention_dispatch._AttentionBackendRegistry
    return replaced(registry, "_active_backend", attention_dispatch.AttentionBackendName(name))


def test_kernels_that_take_lengths(pool):
    """The padding of text shards is not at the end of the keys that a rank attends to."""
    expected = pool.run(1, by_backend, "sage", None)[0]
    for latents in pool.run(2, by_backend, "sage_varlen", {"ulysses_degree": 2}):
        assert matrix.error(latents, expected) <= matrix.TOLERANCE


def graphs_of_flex(path, call):
    """Return the number of graphs after each of two calls, and of compiled functions that are cached."""
    torch._dynamo.reset()
    counters.clear()
    pipe, found = DiffusionPipeline.from_pretrained(path), []
    wrapped = running.wrap(pipe, METHODS["ulysses"] | {"attention_backend": "flex", "use_torch_compile": True})
    for _ in range(2):
        wrapped(**call)
        found.append((counters["stats"]["unique_graphs"], dispatch._compiled.cache_info().currsize))
    running.unwrap(wrapped)
    return found


@pytest.mark.matrix
def test_a_second_call_with_flex_compiles_and_keeps_nothing_more(pool, folder_of):
    for first, second in pool.run(2, graphs_of_flex, folder_of("flux"), tiny.call_of("flux", 1)):
        assert first == second


def test_flex_in_compiled_blocks_is_compiled(pool, folder_of):
    path, call = folder_of("flux"), tiny.call_of("flux", 1)
    expected = pool.run(1, serial, path, "ulysses", call, "flex")[0]
    for picture, _ in pool.run(2, drawn, path, METHODS["ulysses"], call, "flex", True):
        assert running.error(picture, expected) <= running.TOLERANCE


def given_windows():
    """Pass a backend argument that cannot be split over ranks."""
    q = torch.zeros(1, 4, 2, 8)
    module = torch.nn.Identity()
    module.forward = lambda x: attention_dispatch.dispatch_attention_fn(
        x, x, x, attention_kwargs={"window_size": (2, 2)}, backend="flash"
    )
    with intercepted({"attn": module}, lambda name: lambda q, k, v, mask, scale: q):
        return module(q)


def test_arguments_that_cannot_be_sharded_are_refused():
    with pytest.raises(ValueError, match="'flash' was given window_size, which cannot be split over ranks"):
        given_windows()
