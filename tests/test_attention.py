"""Attention over uneven shares equals attention over the whole, for every kernel that returns its LSE."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from xfuser.core.attention.intercept import intercepted
from xfuser.core.attention.kernels import KERNELS, attention_with_lse
from xfuser.core.attention.ring import merge
from xfuser.core.attention.usp import usp_attention
from xfuser.core.distributed import get_sp_group, init_distributed_environment, initialize_model_parallel

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
def test_causal_kernel_sees_no_later_keys(name, monkeypatch):
    monkeypatch.setattr("xfuser.core.attention.kernels.MATH_SCORES", 64)  # so that the plain one works in chunks
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
    out, lse = None, None
    for keys, values in zip(k.split(blocks, 2), v.split(blocks, 2), strict=True):
        out, lse = merge(out, lse, *attention_with_lse(q, keys, values))
    assert torch.allclose(out, F.scaled_dot_product_attention(q, k, v), atol=1e-5)


def test_plain_kernel_works_in_chunks(monkeypatch):
    monkeypatch.setattr("xfuser.core.attention.kernels.MATH_SCORES", 64)
    q, k, v = tensors(2, 3, 50, 11, 8)
    out, lse = attention_with_lse(q, k, v, backend="math")
    assert torch.allclose(out, F.scaled_dot_product_attention(q, k, v), atol=1e-5)
    assert lse.shape == (2, 3, 50)


def shares(lengths, heads, kv_heads, degrees, masked, dtype, value_dim):
    """This rank's part of attention over the whole, computed both ways; returns the largest difference."""
    init_distributed_environment()
    initialize_model_parallel(**degrees)
    group = get_sp_group()
    tokens = sum(lengths)
    q, k, v = tensors(2, heads, tokens, tokens, 8, seed=3, value_dim=value_dim)
    k, v = k[:, :kv_heads], v[:, :kv_heads]
    mask = None
    if masked:
        mask = torch.zeros(2, 1, 1, tokens).masked_fill(torch.arange(tokens) >= tokens - 2, -torch.inf)
    expected = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=heads != kv_heads)
    rank = group.rank_in_group
    local = [x.split(lengths, dim=2)[rank].to(dtype) for x in (q, k, v)]
    local_mask = None if mask is None else mask.split(lengths, dim=3)[rank].to(dtype)
    out = usp_attention(*local, lengths, group, mask=local_mask)
    expected = expected.split(lengths, dim=2)[rank]
    assert out.shape == expected.shape and out.dtype == dtype
    return (out.float() - expected).abs().max().item() if out.numel() else 0.0


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
    ],
)
def test_uneven_shares(pool, kind, lengths, heads, kv_heads, masked, dtype, value_dim):
    tolerance = 1e-5 if dtype is torch.float32 else 0.1
    for worst in pool.run(4, shares, lengths, heads, kv_heads, DEGREES[kind], masked, dtype, value_dim):
        assert worst <= tolerance


class Attention(torch.nn.Module):
    """Calls SDPA as often as it is told."""

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
        return F.scaled_dot_product_attention(q, k, v) + 1  # not intercepted again

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
    assert torch.equal(F.scaled_dot_product_attention(x, x, x), Attention(1)(x))  # no mode is left behind


def test_preference_names_known_kernels():
    from xfuser.core.attention.kernels import AUTO

    assert set(AUTO) <= set(KERNELS)
    assert all(a != b for a, b in itertools.pairwise(AUTO))
