"""Attention over uneven shards equals attention over the whole sequence, for every kernel that returns its LSE."""

import itertools
import sys
import types
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from xfuser.core.attention import flash_attn, kernels
from xfuser.core.attention.intercept import intercepted
from xfuser.core.attention.kernels import KERNELS, attention, attention_math, attention_with_lse
from xfuser.core.attention.ring import merge
from xfuser.core.attention.usp import usp_attention
from xfuser.core.distributed import get_sp_group, init_distributed_environment, initialize_model_parallel
from xfuser.core.long_ctx_attention import AttnType, xFuserLongContextAttention

HERE = [name for name, kernel in KERNELS.items() if kernel.missing() is None]


def tensors(batch, heads, queries, keys, dim, seed=0, value_dim=None):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, queries, dim), (batch, heads, keys, dim), (batch, heads, keys, value_dim or dim))
    return [2 * torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("masked", [False, True])
def test_kernel_returns_attention_and_its_lse(name, masked):
    q, k, v = tensors(2, 3, 5, 7, 10)
    mask = torch.zeros(2, 1, 1, 7)
    mask[..., 4:] = -torch.inf if masked else 0.0
    out, lse = attention_with_lse(q, k, v, mask if masked else None, 0.3, name)
    assert torch.allclose(out, F.scaled_dot_product_attention(q, k, v, mask, scale=0.3), atol=1e-5)
    assert torch.allclose(lse, (0.3 * q @ k.mT + mask).logsumexp(-1), atol=1e-5)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("shape", [(1, 7), (5, 7), (2, 1, 1, 7), (2, 3, 5, 7)])
def test_kernel_takes_masks_of_booleans(name, shape):
    """A boolean mask hides keys, and is not added to the scores as 0 or 1; a row without visible keys gives zeros."""
    q, k, v = tensors(2, 3, 5, 7, 8)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4
    expected = F.scaled_dot_product_attention(q, k, v, mask)
    assert torch.allclose(attention(q, k, v, mask, backend=name), expected, atol=1e-5)
    assert torch.allclose(attention_with_lse(q, k, v, mask, None, name)[0], expected, atol=1e-5)


@pytest.mark.parametrize("name", HERE)
def test_the_lowest_number_is_not_minus_infinity(name):
    """Rows in which all scores are the lowest number give the mean of the values."""
    q, k, v = tensors(2, 3, 5, 7, 8)
    mask = torch.full((1, 1, 1, 7), torch.finfo(torch.float32).min)
    expected = F.scaled_dot_product_attention(q, k, v, mask)
    assert torch.allclose(attention(q, k, v, mask, backend=name), expected, atol=1e-5)


@pytest.mark.parametrize("name", HERE)
def test_kernel_computes_as_autocast_asks(name):
    q, k, v = tensors(2, 3, 5, 7, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.scaled_dot_product_attention(q, k, v.bfloat16())
        out, lse = attention_with_lse(q, k, v.bfloat16(), None, None, name)
    assert out.dtype == expected.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert torch.allclose(out, expected, atol=2e-2)


def flash_attn_2(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                 alibi_slopes=None, deterministic=False, return_attn_probs=False):  # fmt: skip
    """The signature of flash-attn 2.6 to 2.8."""
    out, lse = attention_math(*(x.transpose(1, 2) for x in (q, k, v)), None, softmax_scale, causal)
    return (out.transpose(1, 2), lse, None) if return_attn_probs else out.transpose(1, 2)


def flash_attn_3(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
                 window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None,
                 deterministic=False, sm_margin=0, return_attn_probs=False):  # fmt: skip
    """The signature of current releases of flash-attn 3."""
    return flash_attn_2(q, k, v, 0.0, softmax_scale, causal, return_attn_probs=return_attn_probs)


def flash_attn_3_beta(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), deterministic=False):
    """The signature of its first releases, which always return the LSE."""
    return flash_attn_2(q, k, v, 0.0, softmax_scale, causal, return_attn_probs=True)[:2]


def without_causal(q, k, v, softmax_scale=None):
    """An unusable signature."""
    raise AssertionError("called a kernel without causal")


@contextmanager
def installed(package, function):
    """Within the context, a package of this name is installed and runs on the CPU."""
    module = types.ModuleType(package)
    module.flash_attn_func = function
    caches = (flash_attn.absent, flash_attn.unusable, flash_attn._parameters)
    with ExitStack() as stack:
        for cached in caches:
            cached.cache_clear()
            stack.callback(cached.cache_clear)
        stack.enter_context(mock.patch.dict(sys.modules, {package: module}))
        stack.enter_context(mock.patch.object(kernels, "_needs_accelerator", lambda: None))
        stack.enter_context(mock.patch.object(kernels, "_half_on_accelerator", lambda q, k, v, mask, **_: mask is None))
        names = [("flash_attn_3", "flash_attn_interface"), ("flash_attn", "flash_attn")]
        stand_ins = {name: kernels._flash_attn(one, kernels.AMPERE) for name, one in names}
        stack.enter_context(mock.patch.dict(KERNELS, stand_ins))
        yield


@pytest.mark.parametrize(
    ("package", "function"),
    [("flash_attn", flash_attn_2), ("flash_attn_interface", flash_attn_3), ("flash_attn_interface", flash_attn_3_beta)],
)
@pytest.mark.parametrize("causal", [False, True])
def test_flash_attn_is_called_by_its_signature(package, function, causal):
    q, k, v = tensors(2, 3, 7, 7, 8)
    with installed(package, function), mock.patch.object(kernels, "_flash_takes", None):  # skip the other checks
        assert kernels._kernel_for(q, k, v, None, "auto").startswith("flash_attn")
        out, lse = attention_with_lse(q, k, v, causal=causal)
    assert torch.allclose(out, F.scaled_dot_product_attention(q, k, v, is_causal=causal), atol=1e-5)
    assert lse.shape == (2, 3, 7)


def test_a_flash_attn_that_cannot_be_used_gives_way_to_the_next_kernel(caplog):
    q, k, v = tensors(2, 3, 7, 7, 8)
    with installed("flash_attn_interface", without_causal), caplog.at_level("WARNING", logger="xfuser"):
        for _ in range(2):
            out, _ = attention_with_lse(q, k, v, causal=True)
    assert torch.allclose(out, F.scaled_dot_product_attention(q, k, v, is_causal=True), atol=1e-5)
    assert [record.message for record in caplog.records] == [
        "flash_attn_interface.flash_attn_func takes no causal: the next attention kernel runs instead"
    ]


def causal_layer():
    """Run the layer with a fake flash-attn 3, on this rank's shard of a sequence."""
    init_distributed_environment()
    initialize_model_parallel(ring_degree=2)
    q, k, v = (x.transpose(1, 2) for x in tensors(1, 2, 9, 9, 8))
    own = slice(0, 5) if get_sp_group().is_first_rank else slice(5, 9)
    with installed("flash_attn_interface", flash_attn_3):
        layer = xFuserLongContextAttention(ring_impl_type="basic", attn_type=AttnType.FA3)
        out = layer(None, q[:, own], k[:, own], v[:, own], causal=True)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)
    return (out - expected[:, own]).abs().max().item()


def test_a_causal_layer_stays_causal_with_flash_attn_3(pool):
    assert max(pool.run(2, causal_layer)) < 1e-5


@pytest.mark.parametrize(
    ("architecture", "dtype", "kernel"),
    [
        ((7, 0), torch.float16, "efficient"),  # Volta
        ((7, 5), torch.float16, "efficient"),  # Turing
        ((7, 5), torch.bfloat16, "math"),
        ((8, 0), torch.bfloat16, "flash"),
        ((9, 0), torch.float16, "flash"),
    ],
)
def test_kernels_are_those_of_the_architecture(architecture, dtype, kernel):
    assert chosen(architecture, dtype) == kernel


def chosen(architecture, dtype):
    """The choice of kernel depends only on the architecture and the dtype, so it is tested without an accelerator."""
    x = types.SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(1, 2, 9, 64))
    capability = mock.Mock(get_device_capability=lambda: architecture)
    with (
        mock.patch.object(kernels.devices, "device_type", lambda: "cuda"),
        mock.patch.object(torch, "get_device_module", lambda kind: capability),
    ):
        return kernels._kernel_for(x, x, x, None, "auto")


def test_no_kernel_of_an_accelerator_is_given_float64():
    assert chosen((9, 0), torch.float32) == "efficient" and chosen((9, 0), torch.float64) == "math"


@pytest.mark.parametrize("name", HERE)
def test_causal_kernel_sees_no_later_keys(name, monkeypatch):
    monkeypatch.setattr("xfuser.core.attention.kernels.MATH_SCORES", 64)  # so that the math kernel works in chunks
    q, k, v = tensors(2, 3, 7, 7, 8)
    out, lse = attention_with_lse(q, k, v, backend=name, causal=True)
    assert torch.allclose(out, F.scaled_dot_product_attention(q, k, v, is_causal=True), atol=1e-5)
    scores = (q @ k.mT * 8**-0.5).masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
    assert torch.allclose(lse, scores.logsumexp(-1), atol=1e-5)


def test_rows_without_keys_weigh_nothing():
    q, k, v = tensors(1, 2, 3, 4, 8)
    for name in HERE:
        out, lse = attention_with_lse(q, k, v, torch.full((1, 1, 1, 4), -torch.inf), None, name)
        assert out.abs().max() == 0 and (lse == -torch.inf).all()
    merged, _ = merge(*merge(None, None, out, lse), *attention_with_lse(q, k, v))
    assert torch.allclose(merged, F.scaled_dot_product_attention(q, k, v), atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, 3), st.sampled_from([3, 8]), st.booleans())
def test_merging_blocks_of_any_size_gives_the_whole(blocks, heads, dim, other_value_dim):
    q, k, v = tensors(2, heads, 5, sum(blocks), dim, value_dim=dim + 2 if other_value_dim else None)
    out, lse, parts = None, None, []
    for keys, values in zip(k.split(blocks, 2), v.split(blocks, 2), strict=True):
        parts += attention_with_lse(q, keys, values)
        out, lse = merge(out, lse, *parts[-2:])
    whole, whole_lse = attention_with_lse(q, k, v)
    for found, found_lse in ((out, lse), merge(*parts)):
        assert torch.allclose(found, whole, atol=1e-5) and torch.allclose(found_lse, whole_lse, atol=1e-5)


def test_plain_kernel_works_in_chunks(monkeypatch):
    monkeypatch.setattr("xfuser.core.attention.kernels.MATH_SCORES", 64)
    q, k, v = tensors(2, 3, 50, 11, 8)
    out, lse = attention_with_lse(q, k, v, backend="math")
    assert torch.allclose(out, F.scaled_dot_product_attention(q, k, v), atol=1e-5)
    assert lse.shape == (2, 3, 50)


def shares(lengths, heads, kv_heads, degrees, masked, dtype, value_dim):
    """Compute this rank's part of the attention in parallel and in serial; return the largest difference."""
    init_distributed_environment()
    initialize_model_parallel(**degrees)
    group = get_sp_group()
    tokens = sum(lengths)
    q, k, v = tensors(2, heads, tokens, tokens, 8, seed=3, value_dim=value_dim)
    if dtype is torch.float64:
        q, k, v = q.double(), k.double(), v.double()
    k, v = k[:, :kv_heads], v[:, :kv_heads]
    mask = None
    if masked:
        mask = q.new_zeros(2, 1, 1, tokens).masked_fill(torch.arange(tokens) >= tokens - 2, -torch.inf)
    expected = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=heads != kv_heads)
    rank = group.rank_in_group
    local = [x.split(lengths, dim=2)[rank].to(dtype) for x in (q, k, v)]
    local_mask = None if mask is None else mask.split(lengths, dim=3)[rank].to(dtype)
    out = usp_attention(*local, lengths, group, mask=local_mask)
    expected = expected.split(lengths, dim=2)[rank]
    assert out.shape == expected.shape and out.dtype == dtype
    return (out.to(expected.dtype) - expected).abs().max().item() if out.numel() else 0.0


DEGREES = {
    "ulysses": {"ulysses_degree": 4},
    "ring": {"ring_degree": 4},
    "both": {"ulysses_degree": 2, "ring_degree": 2},
}


@pytest.mark.parametrize("kind", DEGREES)
@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "masked", "dtype", "value_dim"),
    [
        ([5, 4, 4, 4], 8, 8, False, torch.float32, None),
        ([1, 9, 0, 3], 3, 3, False, torch.float32, None),
        ([2, 2, 3, 3], 1, 1, True, torch.float32, None),
        ([4, 3, 3, 3], 5, 5, True, torch.float32, None),
        ([0, 0, 7, 0], 6, 2, False, torch.float32, None),
        ([3, 3, 2, 2], 4, 1, False, torch.float32, None),
        ([3, 3, 2, 2], 4, 4, False, torch.float32, 12),
        ([5, 4, 4, 4], 3, 3, False, torch.bfloat16, None),
        ([1, 9, 0, 3], 3, 3, True, torch.float64, None),
    ],
)
def test_uneven_shares(pool, kind, lengths, heads, kv_heads, masked, dtype, value_dim):
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.1)
    for worst in pool.run(4, shares, lengths, heads, kv_heads, DEGREES[kind], masked, dtype, value_dim):
        assert worst <= tolerance


class Attention(torch.nn.Module):
    """Calls SDPA ``calls`` times."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def forward(self, x):
        for _ in range(self.calls):
            x = F.scaled_dot_product_attention(x, x, x)
        return x


def test_interception_is_confined_to_the_chosen_modules():
    chosen, other = Attention(1), Attention(1)
    x = tensors(1, 2, 3, 3, 4)[0]
    plain = other(x)
    seen = []

    def attend(name, q, k, v, mask, scale):
        seen.append(name)
        return F.scaled_dot_product_attention(q, k, v) + 1  # this call is not intercepted

    with intercepted({"chosen": chosen}, lambda name: partial(attend, name)):
        assert torch.equal(other(x), plain)
        assert torch.equal(chosen(x), plain + 1)
    assert torch.equal(chosen(x), plain) and seen == ["chosen"]


@pytest.mark.parametrize("calls", [0, 2])
def test_any_other_number_of_calls_is_refused(calls):
    module = Attention(calls)
    x = tensors(1, 2, 3, 3, 4)[0]
    with (
        intercepted(
            {"blocks.0.attn": module}, lambda name: lambda q, k, v, mask, scale: F.scaled_dot_product_attention(q, k, v)
        ),
        pytest.raises(ValueError, match=rf"blocks.0.attn: Attention called scaled_dot_product_attention {calls} times"),
    ):
        module(x)
    assert torch.equal(F.scaled_dot_product_attention(x, x, x), Attention(1)(x))  # no mode is left active


def test_preference_names_known_kernels():
    from xfuser.core.attention.kernels import AUTO

    assert set(AUTO) <= set(KERNELS)
    assert all(a != b for a, b in itertools.pairwise(AUTO))
