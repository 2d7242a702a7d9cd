"""Finds attention modules that can be divided by heads, by the names and sizes of their layers.

Only torch's own layer classes are supported: weights of other classes, such as quantised ones, are not cut.
"""

from itertools import accumulate

from torch import nn

from xfuser.core.distributed.utils import split_sizes
from xfuser.core.tensor_parallel.division import Division
from xfuser.core.tensor_parallel.shards import Shards, evenly, joined

QUERIES = ("to_q", "add_q_proj", "to_query", "to_q_t", "q_img", "q_proj", "q")
KEYS = ("to_k", "add_k_proj", "to_key", "to_k_t", "k_img", "k_proj", "k")
VALUES = ("to_v", "add_v_proj", "to_value", "to_v_t", "v_img", "v_proj", "v")
GATES = ("to_gate", "to_gate_logits")  # of the attention output, per channel or per head
FUSED = "to_qkv_mlp_proj"  # outputs queries, keys, values, and an MLP's hidden channels, for the output linear
OUTPUTS = ("to_out.0", "to_out", "to_add_out", "to_out_t", "out_layer", "out_proj", "o_proj", "o")
QUERY_NORMS = ("norm_q", "norm_added_q", "query_norm", "q_img_norm", "q_rms_norm", "q_rms_norm_t")
KEY_NORMS = ("norm_k", "norm_added_k", "key_norm", "k_img_norm", "k_rms_norm", "k_rms_norm_t")
INPUT_NORMS = ("group_norm", "spatial_norm", "norm_cross")  # before the projections
BIAS_OF_HEADS = "relative_attention_bias"  # [buckets, heads]

HEADS = ("heads", "num_heads", "n_heads")
KEY_HEADS = ("num_kv_heads", "num_key_value_heads", "kv_heads")
WIDTHS = ("inner_dim", "out_dim")  # some processors reshape by out_dim, if it is as large
KEY_WIDTHS = ("inner_kv_dim", "kv_inner_dim")


def attention_division(name: str, module: nn.Module, ranks: int, has_output: bool = True) -> Division | None:
    """How to divide an attention module, with or without an output linear, by heads; None for other modules, or if a
    layer is unknown.

    Raises:
        ValueError: the module has fewer heads than there are ranks.
    """
    layers = layers_of(module)
    # Modules that reshape by their full width have it as an attribute.
    if hasattr(module, "embed_dim") or "" in layers or has_output != any(one in OUTPUTS for one in layers):
        return None
    sizes = _head_sizes(module, layers)
    if sizes is None:
        return None
    heads, key_heads, head_dim = sizes
    found = _Heads(module, *_shards(heads, key_heads, ranks), head_dim).division(layers)
    if found and heads < ranks:
        raise ValueError(
            f"{name}: {heads} heads cannot be divided over {ranks} ranks: use a tensor_parallel_degree of at most"
            f" {heads}, or split_scheme='col', which divides no heads"
        )
    return found


def fused_block_division(name: str, block: nn.Module, ranks: int) -> Division | None:
    """How to divide a block whose output linear takes the attention output followed by an MLP's hidden channels."""
    attention, first, last = children(block, "attn", "proj_mlp", "proj_out")
    if attention is None or not type(first) is type(last) is nn.Linear or first.out_features < ranks:
        return None
    if {path.partition(".")[0] for path in layers_of(block)} - {"attn", "proj_mlp", "proj_out", "norm"}:
        return None
    found = attention_division(f"{name}.attn", attention, ranks, has_output=False)
    if found is None:
        return None
    division, hidden = Division(), evenly(first.out_features, ranks)
    both = joined(found.cuts["to_q.weight"][1], hidden)
    division.add("attn", found)
    division.outputs("proj_mlp", first, hidden)
    division.inputs("proj_out", last, both)
    return division if last.in_features == both.total else None


def _head_sizes(module: nn.Module, layers: dict[str, nn.Module]) -> tuple[int, int, int] | None:
    """Number of query heads, number of key/value heads, and channels per head; None if they are unknown."""
    heads = next((one for key in HEADS if isinstance(one := getattr(module, key, None), int)), 0)
    if not heads:
        return None
    if FUSED in layers:
        if not hasattr(module, "inner_dim") or not hasattr(module, "mlp_hidden_dim"):
            return None
        width = key_width = module.inner_dim
    else:
        query, key = (next((layers[one] for one in names if one in layers), None) for names in (QUERIES, KEYS))
        if not type(query) is type(key) is nn.Linear:
            return None
        width, key_width = query.out_features, key.out_features
    head_dim = width // heads
    if not head_dim or width % heads or key_width % head_dim or heads % (key_width // head_dim):
        return None
    return heads, key_width // head_dim, head_dim


def _shards(heads: int, key_heads: int, ranks: int) -> tuple[Shards, Shards]:
    """The query heads and the key/value heads of each rank; ranks share a key/value head if there are fewer of them
    than ranks."""
    each = heads // key_heads
    if key_heads >= ranks:
        keys = evenly(key_heads, ranks)
        return keys.times(each), keys
    in_common = split_sizes(ranks, key_heads)
    sizes = [size for count in in_common for size in split_sizes(each, count)]
    starts = [0, *accumulate(sizes)]
    queries = tuple((range(start, start + size),) for start, size in zip(starts, sizes, strict=False))
    keys = tuple((range(head, head + 1),) for head, count in enumerate(in_common) for _ in range(count))
    return Shards(queries, heads), Shards(keys, key_heads)


class _Heads:
    """Divides the layers of an attention module by the heads that each rank keeps."""

    def __init__(self, module: nn.Module, queries: Shards, keys: Shards, head_dim: int) -> None:
        self._module, self._queries, self._keys, self._head_dim = module, queries, keys, head_dim
        self._width, self._key_width = queries.times(head_dim), keys.times(head_dim)

    def division(self, layers: dict[str, nn.Module]) -> Division | None:
        """The division; None if a layer is unknown or does not fit the heads."""
        division = Division(heads={"": self._queries})
        hidden = []
        if FUSED in layers:
            hidden = [evenly(self._module.mlp_hidden_dim, len(self._queries.kept))]
            division.numbers["mlp_hidden_dim"] = hidden[0].sizes
        if not all(self._divide(name, layer, hidden, division) for name, layer in layers.items()):
            return None
        counted = ((HEADS, self._queries), (KEY_HEADS, self._keys), (WIDTHS, self._width))
        for keys, shards in (*counted, (KEY_WIDTHS, self._key_width)):
            for key in keys:
                if getattr(self._module, key, None) == shards.total:
                    division.numbers[key] = shards.sizes
        return division

    def _divide(self, name: str, layer: nn.Module, hidden: list[Shards], division: Division) -> bool:
        """Divide a layer; False if it is unknown or does not fit. ``hidden`` are the MLP channels of a fused linear."""
        if name in INPUT_NORMS:
            return True
        if name in (*QUERY_NORMS, *KEY_NORMS):
            size, width = channels_of(layer), self._width if name in QUERY_NORMS else self._key_width
            if size == width.total:
                division.spanning(name, layer, width)
            return size in (self._head_dim, width.total)
        if name == BIAS_OF_HEADS and isinstance(layer, nn.Embedding):
            division.outputs(name, layer, self._queries)
            return layer.embedding_dim == self._queries.total
        if type(layer) is not nn.Linear:
            return False
        if name == FUSED:
            times, rest = divmod(layer.out_features - 3 * self._width.total, hidden[0].total)
            division.outputs(name, layer, joined(*[self._width] * 3, *hidden * times))
            return not rest and hidden[0].total >= len(self._queries.kept)
        if name in OUTPUTS:
            of_head, rest = divmod(layer.in_features - sum(one.total for one in hidden), self._queries.total)
            division.inputs(name, layer, joined(self._queries.times(of_head), *hidden))
            return not rest
        by = self._queries if name in (*QUERIES, *GATES) else self._keys if name in (*KEYS, *VALUES) else None
        if by is None or layer.out_features % by.total:
            return False
        division.outputs(name, layer, by.times(layer.out_features // by.total))
        return True


def children(module: nn.Module, *names: str) -> list[nn.Module | None]:
    """Direct submodules with these names; None for names that do not exist."""
    return [module._modules.get(name) for name in names]


def channels_of(norm: nn.Module) -> int | None:
    """The number of channels of a norm; None if it is unknown."""
    shape = getattr(norm, "normalized_shape", None) or getattr(getattr(norm, "weight", None), "shape", None)
    shape = shape or getattr(norm, "dim", None)
    return shape[0] if isinstance(shape, tuple) and len(shape) == 1 else None


def layers_of(module: nn.Module) -> dict[str, nn.Module]:
    """By name, a module (``""``) and its submodules that have parameters of their own, and norms without parameters."""
    return {
        name: one
        for name, one in module.named_modules()
        if any(x is not None for x in one._parameters.values()) or (name and "norm" in name.rpartition(".")[2])
    }
