"""Operators of an accelerator, called on tensors without contents, to check schemas and kernel requirements.

Tensors are on a fake CUDA device (``FakeTensorMode``), so schemas, shapes and dtypes are checked by torch. The other
requirements of kernels are those that torch checks in sdp_utils.cpp to choose a kernel.
"""

import types
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from test_attention import flash_attn_2, flash_attn_3, flash_attn_3_beta, installed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from xfuser.core.attention import kernels
from xfuser.core.attention.kernels import attention_with_lse
from xfuser.core.attention.ring import ring_attention

aten = torch.ops.aten
OPERATORS = {
    aten._scaled_dot_product_flash_attention.default: "flash",
    aten._scaled_dot_product_efficient_attention.default: "efficient",
    aten._scaled_dot_product_cudnn_attention.default: "cudnn",
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEADS = (32, 33, 64, 72, 128, 160, 256, 264)
LENGTHS = ((1, 1), (5, 7), (33, 33), (4, 0), (0, 4))


METHODS = {
    torch.Tensor.copy_: aten.copy_,
    torch.Tensor.contiguous: aten.contiguous,
    torch.Tensor.__invert__: aten.bitwise_not,
}


class Unguarded(TorchFunctionMode):
    """Replaces four methods of ``torch.Tensor`` by their operators.

    Their Python bindings require the device guard, so they fail on a fake device in a build without CUDA.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.Tensor.__getitem__ or args[0].device.type == "cpu":
            return METHODS.get(func, func)(*args, **(kwargs or {}))
        x, index = args
        for dim, one in enumerate(index if isinstance(index, tuple) else (index,)):
            x = x.unsqueeze(dim) if one is None else aten.slice(x, dim, one.start, one.stop)
        return x


class Kernels(TorchDispatchMode):
    """Records the kernels that run (``ran``), and checks their requirements."""

    def __init__(self, architecture=(9, 0)):
        super().__init__()
        self.architecture, self.ran = architecture, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in OPERATORS:
            self.ran.append(name := OPERATORS[func])
            self.check(name, *args[:3], bias=args[3] if name != "flash" else None)
        return func(*args, **(kwargs or {}))

    def check(self, name, q, k, v, bias):
        alignment = 4 if q.dtype is torch.float32 else 8
        assert q.dtype is k.dtype is v.dtype and q.shape[1] == k.shape[1] == v.shape[1]
        assert q.numel() and k.numel()
        for x in (q, k, v):
            assert x.stride(-1) == 1 and x.shape[-1] % alignment == 0 and x.shape[-1] == q.shape[-1]
            assert x.storage_offset() % alignment == 0
        if name != "efficient":
            assert q.dtype in kernels.HALF and q.shape[-1] <= {"flash": 256, "cudnn": 128}[name]
        assert name != "cudnn" or k.shape[2] > 1
        assert self.architecture >= (8, 0) or (name == "efficient" and q.dtype is not torch.bfloat16)
        if bias is not None:
            assert name == "efficient" and bias.dtype is q.dtype and bias.shape == (*q.shape[:3], k.shape[2])
            assert bias.stride(-1) == 1 and not any(step % 8 for step in bias.stride()[:-1])


@contextmanager
def on_gpu(architecture=(9, 0)):
    """Within the context, torch has a fake GPU of this architecture, with tensors without contents."""
    module = types.SimpleNamespace(get_device_capability=lambda: architecture)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(kernels.devices, "device_type", lambda: "cuda"))
        stack.enter_context(mock.patch.object(torch, "get_device_module", lambda kind=None: module))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(Unguarded())
        yield stack.enter_context(Kernels(architecture))


def tensors(dtype, head, queries, keys, kv_heads=4, value_head=None):
    make = partial(torch.empty, dtype=dtype, device="cuda")
    return make(2, 4, queries, head), make(2, kv_heads, keys, head), make(2, kv_heads, keys, value_head or head)


def check(result, q, v):
    out, lse = result
    assert out.shape == (*q.shape[:3], v.shape[-1]) and out.dtype is q.dtype and out.device == q.device
    assert lse.shape == q.shape[:3] and lse.dtype is torch.float32 and lse.device == q.device


@pytest.mark.parametrize("backend", ["auto", "cudnn", "flash", "efficient", "math"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_kernel_gives_output_and_lse(backend, dtype):
    for architecture in ((7, 5), (8, 0), (9, 0), (10, 0)):
        with on_gpu(architecture):
            for head in HEADS:
                for queries, keys in LENGTHS:
                    q, k, v = tensors(dtype, head, queries, keys)
                    check(attention_with_lse(q, k, v, None, 0.3, backend), q, v)
                    if queries == keys:
                        check(attention_with_lse(q, k, v, None, None, backend, causal=True), q, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 7), (2, 1, 1, 7), (2, 4, 5, 7), (5, 7)])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_masks_are_aligned_for_the_kernel_that_takes_them(dtype, shape, kind):
    with on_gpu() as ran:
        q, k, v = tensors(dtype, 64, 5, 7)
        check(attention_with_lse(q, k, v, torch.empty(shape, dtype=kind, device="cuda")), q, v)
        assert ran.ran == ["efficient"]


def test_grouped_queries_and_strided_heads_reach_the_kernel():
    with on_gpu() as ran:
        q, k, v = tensors(torch.bfloat16, 64, 5, 7, kv_heads=2)
        check(attention_with_lse(q, k, v), q, v)
        q, k, v = (x.transpose(2, 3) for x in tensors(torch.bfloat16, 5, 64, 64))
        for backend in ("cudnn", "flash", "efficient"):
            check(attention_with_lse(q.narrow(3, 0, 64), k, v, None, None, backend), q, v)
    assert ran.ran[0] == "flash"


@pytest.mark.parametrize(
    ("backend", "head", "dtype", "masked", "architecture", "ran"),
    [
        ("cudnn", 128, torch.bfloat16, False, (9, 0), ["cudnn"]),
        ("cudnn", 136, torch.bfloat16, False, (9, 0), ["flash"]),  # larger than supported
        ("cudnn", 64, torch.float32, False, (9, 0), ["efficient"]),
        ("flash", 64, torch.bfloat16, True, (9, 0), ["efficient"]),
        ("flash", 264, torch.bfloat16, False, (9, 0), ["efficient"]),
        ("auto", 33, torch.bfloat16, False, (9, 0), []),  # the math kernel
        ("auto", 64, torch.bfloat16, False, (10, 0), ["flash"]),
        ("auto", 64, torch.bfloat16, False, (7, 5), []),
        ("auto", 64, torch.float16, False, (7, 5), ["efficient"]),
    ],
)
def test_what_a_kernel_does_not_take_goes_to_the_next(backend, head, dtype, masked, architecture, ran):
    with on_gpu(architecture) as seen:
        q, k, v = tensors(dtype, head, 9, 9)
        mask = torch.empty(1, 1, 1, 9, dtype=dtype, device="cuda") if masked else None
        check(attention_with_lse(q, k, v, mask, None, backend), q, v)
    assert seen.ran == ran


def test_flash_attn_3_is_for_hopper_alone():
    """Its kernels are not built for later architectures, and fail at their first launch."""
    kernel = kernels.KERNELS["flash_attn_3"]
    for architecture, takes in (((8, 0), False), ((9, 0), True), ((10, 0), False), ((12, 0), False)):
        with on_gpu(architecture):
            assert kernel.takes(*tensors(torch.bfloat16, 128, 9, 9), None) == takes


@pytest.mark.parametrize(
    ("package", "function"),
    [("flash_attn", flash_attn_2), ("flash_attn_interface", flash_attn_3), ("flash_attn_interface", flash_attn_3_beta)],
)
def test_the_packages_get_their_own_layout(package, function):
    """They get contiguous ``[B, S, H, D]``; the LSE ``[B, H, Sq]`` is found among their results."""
    with installed(package, function), on_gpu():
        q, k, v = tensors(torch.bfloat16, 64, 5, 7)
        backend = "flash_attn" if package == "flash_attn" else "flash_attn_3"
        check(attention_with_lse(q, k, v, None, None, backend), q, v)


@pytest.mark.parametrize(("masked", "causal"), [(False, False), (True, False), (False, True)])
def test_the_ring_calls_the_kernels(masked, causal):
    """Rank 1 of 3, with shards of different lengths, one of them empty."""
    dist.init_process_group("fake", rank=1, world_size=3, store=FakeStore())
    try:
        with on_gpu() as seen:
            lengths = [5, 4, 0]
            q, k, v = tensors(torch.bfloat16, 64, 4, 4)
            blocks = [torch.empty(2, 1, 1, length, dtype=q.dtype, device="cuda") for length in lengths]
            masks = blocks if masked else None
            check(ring_attention(q, k, v, lengths, dist.group.WORLD, masks=masks, causal=causal), q, v)
    finally:
        dist.destroy_process_group()
    assert seen.ran == ["efficient" if masked else "flash"] * 2
