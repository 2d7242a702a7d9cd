"""A simulated device, as strict as a GPU under NCCL; the CPU computes its tensors.

It checks what a CPU does not. Tensors on the device and on the host do not mix. Each value that the host reads is
recorded (``Device.reads``), as a GPU would be idle until the value has arrived. Groups of the ``pretended`` backend
refuse what NCCL refuses, and the memory of a message must not be used before the wait. Issued operations are recorded
in order for ``nccl.replay`` (``Device.messages``).
"""

import traceback
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from os.path import dirname
from typing import NamedTuple
from unittest import mock

import diffusers
import torch
import torch.distributed as dist
from messages import Messages, mapped, tensors_in
from torch.distributed import distributed_c10d as c10d
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

import xfuser
from xfuser.core.attention.kernels import attention_math
from xfuser.methods import refusals

aten = torch.ops.aten
SOURCES = (dirname(xfuser.__file__), dirname(diffusers.__file__))
NAME = "pretended"
READS = {  # operators that make the host wait for their result, or for the size of it
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
}
OBJECTS = ("all_gather_object", "broadcast_object_list", "send_object_list", "recv_object_list")
MATHEMATICAL = 0  # torch's number of the math backend of attention


def _flash(q, k, v, dropout=0.0, causal=False, scale=None):
    return *attention_math(q, k, v, None, scale, causal), None, None, 0, 0, None, None, None


def _efficient(q, k, v, bias, with_lse, dropout=0.0, causal=False, scale=None):
    out, lse = attention_math(q, k, v, bias, scale, causal)
    return out, torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=torch.inf), None, None


def _cudnn(q, k, v, bias, with_lse, dropout=0.0, causal=False, scale=None):
    out, lse = attention_math(q, k, v, bias, scale, causal)
    return out, lse.unsqueeze(-1), None, None, 0, 0, None, None, None


ATTENTION = {  # operators that the CPU lacks, and functions that return their results
    aten._scaled_dot_product_flash_attention.default: _flash,
    aten._scaled_dot_product_efficient_attention.default: _efficient,
    aten._scaled_dot_product_cudnn_attention.default: _cudnn,
}


class Noted(NamedTuple):
    """A recorded event, the line of the library or of Diffusers that caused it, and its time."""

    what: str
    line: str
    step: int  # -1 before a loop
    in_block: bool

    @property
    def is_ours(self):
        return self.line.startswith(SOURCES[0])


class OnDevice(torch.Tensor):
    """A tensor on the device; ``inner`` has its values."""

    @staticmethod
    def __new__(cls, inner):
        place = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "device": torch.device(NAME, 0)}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, **place)

    def __init__(self, inner):
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of the device")

    def __repr__(self):
        return f"OnDevice({self.inner!r})"

    def tolist(self):
        return self.cpu().tolist()


def _inner(x):
    return x.inner


class _FromData(TorchFunctionMode):
    """Creates tensors from numbers on the CPU, then moves them: torch would not dispatch this to the device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func not in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor):
            return func(*args, **kwargs)
        device = kwargs.pop("device", None) or (args[0].device if func is torch.Tensor.new_tensor else None)
        if func is torch.Tensor.new_tensor:
            func, args, kwargs = torch.tensor, args[1:], {"dtype": args[0].dtype} | kwargs
        x = func(*args, **kwargs)
        return x if device is None else x.to(device)


class Device(TorchDispatchMode):
    """The device, while ranks compute on it."""

    def __init__(self):
        super().__init__()
        self.messages = Messages(NAME, OnDevice, self._note)
        self.restart()

    def restart(self):
        """Clear the records."""
        self.messages.restart()
        self.reads = []
        self.step, self.in_block = -1, False  # position in a denoising loop, set by :meth:`following`

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return self.messages.communicate(func, args, kwargs)
        leaves = tensors_in((*args, *kwargs.values()))
        here = [x for x in leaves if isinstance(x, OnDevice)]
        asked = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
        if not here and asked != NAME:
            return func(*args, **kwargs)
        self._check(func, args, leaves, here)
        if func in READS or (here and asked == "cpu") or self._reads_by_copy(func, args) or self._by_mask(func, args):
            self._note(self.reads, func)
        if func is aten._fused_sdp_choice.default:
            return MATHEMATICAL
        if asked == NAME:
            kwargs = kwargs | {"device": torch.device("cpu")}
        inner = {name: mapped(OnDevice, _inner, x) for name, x in kwargs.items()}
        out = ATTENTION.get(func, func)(*mapped(OnDevice, _inner, args), **inner)
        if asked not in (None, NAME) or (func is aten.copy_.default and not isinstance(args[0], OnDevice)):
            return out
        wrapped = mapped(torch.Tensor, OnDevice, out)
        return return_and_correct_aliasing(func, args, kwargs, wrapped) if here else wrapped

    def _check(self, func, args, leaves, here):
        mixes = {aten.copy_.default, aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}
        if here and func not in mixes and any(x.dim() and not isinstance(x, OnDevice) for x in leaves):
            raise RuntimeError(f"{func}: tensors on the device and on the CPU")
        if not func.is_view:
            aliases = zip(args, (one.alias_info for one in func._schema.arguments), strict=False)
            written = [x for x, alias in aliases if alias and alias.is_write and isinstance(x, OnDevice)]
            self.messages.check(func, here, written)

    def _reads_by_copy(self, func, args):
        return func is aten.copy_.default and isinstance(args[1], OnDevice) and not isinstance(args[0], OnDevice)

    def _by_mask(self, func, args):
        return func is aten.index.Tensor and any(x is not None and x.dtype is torch.bool for x in args[1])

    def _note(self, where, what):
        frames = [one for one in traceback.extract_stack() if one.filename.startswith(SOURCES) and one.name[:2] != "__"]
        line = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        where.append(Noted(str(what), line, self.step, self.in_block))

    @contextmanager
    def following(self, scheduler, blocks):
        """Within the context, records have the step of this scheduler, and whether a block runs."""
        kind = type(scheduler)

        def moved(name, change):
            original = getattr(kind, name)

            @wraps(original)
            def method(*args, **kwargs):
                result = original(*args, **kwargs)
                self.step = change()
                return result

            return mock.patch.object(kind, name, method)

        def inside(value):
            def hook(*_):
                self.in_block = value

            return hook

        with ExitStack() as stack:
            for block in blocks:
                stack.callback(block.register_forward_pre_hook(inside(True)).remove)
                stack.callback(block.register_forward_hook(inside(False)).remove)
            stack.enter_context(moved("set_timesteps", lambda: 0))
            stack.enter_context(moved("step", lambda: self.step + 1))
            yield


class _Hook(torch._C._acc.PrivateUse1Hooks):
    """Reports the device as available to torch only while it is in use."""

    there = False

    def is_available(self):
        return _Hook.there

    def has_primary_context(self, index):
        return True

    def is_built(self):
        return _Hook.there


class _Module(backend_registration._DummyBackendModule):
    def is_available(self):
        return _Hook.there

    def device_count(self):
        return int(_Hook.there)

    def get_rng_state(self):
        return torch.get_rng_state()

    def set_rng_state(self, state):
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16, torch.float32]


_library = torch.library.Library("_", "IMPL")


def _register():
    if not hasattr(torch, NAME):
        backend_registration._setup_privateuseone_for_python_backend(NAME, _Module(), _Hook())
        dist.Backend.register_backend(NAME, dist.ProcessGroupGloo, devices=["cpu", NAME])
        _library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")


@contextmanager
def pretended(backend=NAME):
    """Within the context, this rank uses the simulated device, and a default group of its backend."""
    _register()
    rank, ranks, store = dist.get_rank(), dist.get_world_size(), c10d._get_default_store()
    dist.destroy_process_group()
    dist.init_process_group(backend, store=dist.PrefixStore(NAME, store), rank=rank, world_size=ranks)
    dist.all_reduce(torch.zeros(1))  # otherwise a rank with little work may leave before others connect to it
    device = Device()
    messages = device.messages
    replaced = {name: partial(messages.started, getattr(dist, name)) for name in ("isend", "irecv")}
    replaced |= {name: partial(messages.waited, getattr(dist, name)) for name in ("send", "recv")}
    replaced |= {name: partial(messages.counted, name, getattr(dist, name)) for name in OBJECTS}
    replaced["batch_isend_irecv"] = partial(messages.together, dist.batch_isend_irecv)
    with ExitStack() as stack:
        for name, value in replaced.items():
            for module in (dist, c10d):
                stack.enter_context(mock.patch.object(module, name, value))
        stack.enter_context(mock.patch.object(refusals, "_is_packed", lambda weight: False))
        stack.enter_context(mock.patch.object(_Hook, "there", True))
        stack.enter_context(mock.patch.object(torch.accelerator, "set_device_index", lambda index: None))
        stack.enter_context(mock.patch.object(torch.accelerator, "synchronize", lambda: None))
        stack.enter_context(_FromData())
        yield stack.enter_context(device)
