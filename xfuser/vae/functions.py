"""Functions of torch, grouped by their effect on the rows of a feature map."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _named(names: str, *owners: Any) -> set[Any]:
    return {getattr(owner, name) for owner in owners for name in names.split()}


PADDING = (F.pad, torch.conv2d, torch.conv3d)  # handle row padding that is left to a convolution
POOLING = (F.avg_pool2d, F.avg_pool3d, F.max_pool2d, F.max_pool3d)
NOISE = {torch.rand: torch.rand, torch.rand_like: torch.rand, torch.randn: torch.randn, torch.randn_like: torch.randn}
SUMS = {torch.add} | _named("__add__ __radd__ add", Tensor)
POINTWISE = (  # treat all rows alike
    SUMS
    | _named("gelu hardswish leaky_relu relu relu6 silu", F)
    | _named("clamp div mul sigmoid sub tanh", torch, Tensor)
    | _named("__mul__ __rmul__ __sub__ __truediv__ contiguous", Tensor)
    | {torch.clone, torch.relu}
)
ABOUT = {  # query a tensor's properties, not its values
    torch.is_floating_point,
    Tensor.is_cuda.__get__,
    *_named("dim element_size is_floating_point numel size", Tensor),
    *(attribute.__get__ for attribute in _named("device dtype ndim requires_grad shape", Tensor)),
}
DEFERRING = ABOUT | POINTWISE | {F.group_norm, F.interpolate, F.pad, torch.conv2d, torch.conv3d}
MOVES = _named("movedim moveaxis permute swapaxes swapdims transpose", torch, Tensor)  # reorder dimensions
KEEPING = {  # names: keep rows as they are, or show a change by the result's shape
    *("__getitem__", "cat", "clone", "concat", "contiguous", "expand", "flatten", "permute", "repeat", "reshape"),
    *("squeeze", "to", "transpose", "unsqueeze", "view"),
}
REDUCTIONS = (  # mix rows if they reduce the dimension of rows
    _named("layer_norm rms_norm", F)
    | {torch.linalg.vector_norm, torch.std_mean, torch.var_mean}
    | _named("amax amin argmax argmin argsort cumprod logsumexp max mean median min", torch, Tensor)
    | _named("nanmean nansum norm prod sort std sum topk var", torch, Tensor)
)
REFUSED = (  # may mix rows, and have no version for bands
    _named("adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d batch_norm", F)
    | _named("conv_transpose2d conv_transpose3d fold grid_sample instance_norm softmax unfold", F)
    | _named("bmm einsum roll", torch)
    | _named("cumsum flip softmax", torch, Tensor)
    | {torch.fft.fft2, torch.fft.fftn, Tensor.__matmul__}
)


def changes_in_place(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call modifies one of its arguments."""
    name = getattr(func, "__name__", "")
    named_so = name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
    return named_so or bool(kwargs.get("inplace")) or "out" in kwargs
