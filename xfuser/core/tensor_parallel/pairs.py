"""Finds feed-forward and convolutional modules that can be divided in pairs, by their layers' names and sizes."""

from torch import nn

from xfuser.core.tensor_parallel.attention import children, layers_of
from xfuser.core.tensor_parallel.division import Division
from xfuser.core.tensor_parallel.shards import evenly, joined

# Linears of a feed-forward module: one or two before its activation, and the last one. If only one comes
# before it and has twice the outputs, one half of them is the gate of the other.
FEED_FORWARDS = [
    ("net.0.proj", "net.2"), ("w1", "w3", "w2"), ("w1", "w2"), ("linear_1", "linear_2", "out_projection"),
    ("linear_1", "linear_3", "linear_2"), ("gate", "up", "down"), ("gate_proj", "up_proj", "down_proj"),
    ("gate_up_proj", "down_proj"), ("in_layer", "out_layer"), ("linear_in", "linear_out"), ("wi_0", "wi_1", "wo"),
    ("wi", "wo"), ("fc1", "fc2"),
]  # fmt: skip
ELEMENTWISE = (nn.GELU, nn.SiLU, nn.ReLU)


def feed_forward_division(name: str, module: nn.Module, ranks: int) -> Division | None:
    """How to divide a feed-forward module by its hidden channels; None for other modules."""
    tables = FEED_FORWARDS
    if isinstance(module, nn.Sequential):
        kinds = [type(one) for one in module]
        in_a_row = len(kinds) == 3 and kinds[0] is kinds[2] is nn.Linear and kinds[1] in ELEMENTWISE
        tables = [("0", "2")] if in_a_row else []
    layers = layers_of(module) if tables else {}
    for *columns, row in tables:
        if layers.keys() == {*columns, row} and all(type(one) is nn.Linear for one in layers.values()):
            hidden = layers[row].in_features
            times = {layers[one].out_features / hidden for one in columns}
            if hidden >= ranks and (times == {1} or (times == {2} and len(columns) == 1)):
                division, shards = Division(), evenly(hidden, ranks)
                for column in columns:
                    division.outputs(column, layers[column], joined(*[shards] * int(max(times))))
                division.inputs(row, layers[row], shards)
                return division
    return None


def residual_division(name: str, module: nn.Module, ranks: int) -> Division | None:
    """Divide a residual block, ``conv2(act(norm2(conv1(...) + time_emb_proj(...))))``, by the groups of ``norm2``.

    ``time_emb_proj`` may have twice the channels, for scales and shifts.
    """
    first, norm, last, time = children(module, "conv1", "norm2", "conv2", "time_emb_proj")
    if not (type(first) is type(last) is nn.Conv2d and type(norm) is nn.GroupNorm and "norm1" in module._modules):
        return None
    known = {"norm1", "conv1", "norm2", "conv2", "time_emb_proj", "conv_shortcut"}
    width, groups = first.out_channels, norm.num_groups
    if not layers_of(module).keys() <= known or groups < ranks or last.in_channels != width:
        return None
    of_groups = evenly(groups, ranks)
    channels = of_groups.times(width // groups)
    division = Division(numbers={"norm2.num_groups": of_groups.sizes, "norm2.num_channels": channels.sizes})
    if time is not None:
        times, rest = divmod(time.out_features, width)
        if rest or times not in (1, 2):
            return None
        division.outputs("time_emb_proj", time, joined(*[channels] * times))
    division.outputs("conv1", first, channels)
    division.outputs("norm2", norm, channels)
    division.inputs("conv2", last, channels)
    return division


def inverted_division(name: str, module: nn.Module, ranks: int) -> Division | None:
    """How to divide pointwise, depthwise and pointwise convolutions; half of the channels in between are a gate."""
    first, depth, last = children(module, "conv_inverted", "conv_depth", "conv_point")
    if not (type(first) is type(depth) is type(last) is nn.Conv2d):
        return None
    hidden = last.in_channels
    if not layers_of(module).keys() <= {"conv_inverted", "conv_depth", "conv_point", "norm"} or hidden < ranks:
        return None
    if not first.out_channels == depth.in_channels == depth.out_channels == depth.groups == 2 * hidden:
        return None
    shards = evenly(hidden, ranks)
    both = joined(shards, shards)
    division = Division(numbers={"conv_depth.groups": both.sizes, "conv_depth.in_channels": both.sizes})
    division.outputs("conv_inverted", first, both)
    division.outputs("conv_depth", depth, both)
    division.inputs("conv_point", last, shards)
    return division
