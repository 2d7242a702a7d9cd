"""Attention modules that can be divided by heads, told by the names of their layers and their sizes.

Layers are those of torch itself: weights of other classes, as of quantised ones, are not cut.
"""

from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from torch import nn

from xfuser.core.distributed.utils import split_sizes
from xfuser.core.tensor_parallel.division import Section, evenly

QUERIES = ("to_q", "add_q_proj", "to_query", "to_q_t", "q_img", "q_proj", "q")
KEYS = ("to_k", "add_k_proj", "to_key", "to_k_t", "k_img", "k_proj", "k")
VALUES = ("to_v", "add_v_proj", "to_value", "to_v_t", "v_img", "v_proj", "v")
GATES = ("to_gate", "to_gate_logits")  # of what attention returns, by channel or by head
FUSED = "to_qkv_mlp_proj"  # queries, keys, values, and an MLP's hidden channels, which go into the output linear
OUTPUTS = ("to_out.0", "to_out", "to_add_out", "to_out_t", "out_layer", "out_proj", "o_proj", "o")
QUERY_NORMS = ("norm_q", "norm_added_q", "query_norm", "q_img_norm", "q_rms_norm", "q_rms_norm_t")
KEY_NORMS = ("norm_k", "norm_added_k", "key_norm", "k_img_norm", "k_rms_norm", "k_rms_norm_t")
INPUT_NORMS = ("group_norm", "spatial_norm", "norm_cross")  # in front of the projections
BIAS_OF_HEADS = "relative_attention_bias"  # [buckets, heads]

HEADS = ("heads", "num_heads", "n_heads")
KEY_HEADS = ("num_kv_heads", "num_key_value_heads")
WIDTHS = ("inner_dim", "out_dim")  # some processors reshape by the latter, where it is as large
KEY_WIDTHS = ("inner_kv_dim", "kv_inner_dim")


@dataclass
class Pairs:
    """What of a module is divided, so that one sum over the ranks behind each of ``rows`` makes it whole again.

    Attributes:
        columns: layers by name, to the sections of their outputs, or a norm's channels, of which each rank keeps its
            own.
        rows: layers by name, to the sections of their inputs, of which each rank has its own.
        spanning: norms by name, to the channels of all heads that they work on, each rank having its own.
        numbers: attributes by name (``attn.heads``), to what they count on each rank.
        heads: attention modules by name, to the heads that each rank has.
    """

    columns: dict[str, tuple[Section, ...]] = field(default_factory=dict)
    rows: dict[str, tuple[Section, ...]] = field(default_factory=dict)
    spanning: dict[str, Section] = field(default_factory=dict)
    numbers: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    heads: dict[str, Section] = field(default_factory=dict)

    def within(self, prefix: str) -> "Pairs":
        """The same, as seen from a module that has this one by the name ``prefix``."""
        groups = (self.columns, self.rows, self.spanning, self.numbers, self.heads)
        return Pairs(*({f"{prefix}.{name}".strip("."): one for name, one in group.items()} for group in groups))


def attention_pairs(name: str, module: nn.Module, ranks: int) -> Pairs | None:
    """How to divide an attention module by heads; None for other modules, or has what is not supported.

    Raises:
        ValueError: it has fewer heads than there are ranks.
    """
    found = _heads(name, module, ranks)
    return found if found and found.rows else None


def fused_block_pairs(name: str, block: nn.Module, ranks: int) -> Pairs | None:
    """A block whose output linear takes what attention returns and, behind it, an MLP's hidden channels."""
    attention, first, last = children(block, "attn", "proj_mlp", "proj_out")
    if attention is None or not type(first) is type(last) is nn.Linear:
        return None
    if {path.partition(".")[0] for path in layers_of(block)} - {"attn", "proj_mlp", "proj_out", "norm"}:
        return None
    found = _heads(f"{name}.attn", attention, ranks)
    if found is None or found.rows or first.out_features < ranks:
        return None
    heads, hidden = found.columns["to_q"][0], evenly(first.out_features, ranks)
    if last.in_features != heads.total + hidden.total:
        return None
    found = found.within("attn")
    found.columns["proj_mlp"] = (hidden,)
    found.rows["proj_out"] = (heads, hidden)
    return found


def _heads(name: str, module: nn.Module, ranks: int) -> Pairs | None:
    """An attention module's parts by heads, with or without an output linear."""
    layers = layers_of(module)
    heads = next((one for key in HEADS if isinstance(one := getattr(module, key, None), int)), None)
    fused = layers.get(FUSED)
    query = fused or next((layers[key] for key in QUERIES if key in layers), None)
    # Some reshape by the width of the whole, which is then an attribute.
    if not heads or query is None or hasattr(module, "embed_dim") or "" in layers:
        return None
    if fused:
        if not hasattr(module, "inner_dim") or not hasattr(module, "mlp_hidden_dim"):
            return None
        head_dim, key_heads = module.inner_dim // heads, heads
    else:
        key = next((layers[key] for key in KEYS if key in layers), None)
        head_dim = query.out_features // heads if type(query) is nn.Linear else 0
        if type(key) is not nn.Linear or not head_dim or key.out_features % head_dim:
            return None
        key_heads = key.out_features // head_dim
    if heads % key_heads or heads * head_dim != (module.inner_dim if fused else query.out_features):
        return None
    if _Sorted(module, *_shares(heads, key_heads, 1), head_dim).pairs(layers) is None:
        return None
    if heads < ranks:
        raise ValueError(
            f"{name}: {heads} heads cannot be divided over {ranks} ranks: use a tensor_parallel_degree of at most"
            f" {heads}, or split_scheme='col', which divides no heads"
        )
    return _Sorted(module, *_shares(heads, key_heads, ranks), head_dim).pairs(layers)


def _shares(heads: int, key_heads: int, ranks: int) -> tuple[Section, Section]:
    """Heads of queries, and of keys and values, of each rank; ranks share a head of keys where there are fewer."""
    each = heads // key_heads
    if key_heads >= ranks:
        keys = evenly(key_heads, ranks)
        return keys.times(each), keys
    sharing = split_sizes(ranks, key_heads)
    sizes = [size for count in sharing for size in split_sizes(each, count)]
    starts = [0, *accumulate(sizes)]
    queries = Section(tuple(range(a, a + n) for a, n in zip(starts, sizes, strict=False)), heads)
    owners = [head for head, count in enumerate(sharing) for _ in range(count)]
    return queries, Section(tuple(range(head, head + 1) for head in owners), key_heads)


class _Sorted:
    """Sorts the layers of an attention module by what they are."""

    def __init__(self, module: nn.Module, queries: Section, keys: Section, head_dim: int) -> None:
        self._module, self._queries, self._keys, self._head_dim = module, queries, keys, head_dim
        self._width, self._key_width = queries.times(head_dim), keys.times(head_dim)

    def pairs(self, layers: dict[str, nn.Module]) -> Pairs | None:
        """None where there is a layer that is not known."""
        pairs = Pairs(heads={"": self._queries})
        for name, layer in layers.items():
            if not self._sort(name, layer, pairs):
                return None
        for keys, section in (
            (HEADS, self._queries), (KEY_HEADS, self._keys), (WIDTHS, self._width), (KEY_WIDTHS, self._key_width),
        ):  # fmt: skip
            for key in keys:
                if getattr(self._module, key, None) == section.total:
                    pairs.numbers[key] = tuple(map(len, section.parts))
        return pairs

    def _sort(self, name: str, layer: nn.Module, pairs: Pairs) -> bool:
        if name in INPUT_NORMS:
            return True
        if name in (*QUERY_NORMS, *KEY_NORMS):
            return self._norm(name, layer, pairs)
        if name == BIAS_OF_HEADS and isinstance(layer, nn.Embedding):
            pairs.columns[name] = (self._queries,)
            return layer.embedding_dim == self._queries.total
        if type(layer) is not nn.Linear:
            return False
        if name == FUSED:
            return self._fused(layer, pairs)
        if name in OUTPUTS:
            hidden = pairs.columns.get(FUSED, ())[3:4]
            values = self._queries.times((layer.in_features - sum(one.total for one in hidden)) // self._queries.total)
            pairs.rows[name] = (values, *hidden)
            return layer.in_features == sum(one.total for one in pairs.rows[name])
        by = self._queries if name in (*QUERIES, *GATES) else self._keys if name in (*KEYS, *VALUES) else None
        if by is None or layer.out_features % by.total:
            return False
        pairs.columns[name] = (by.times(layer.out_features // by.total),)
        return True

    def _fused(self, layer: nn.Linear, pairs: Pairs) -> bool:
        ranks, hidden = len(self._queries.parts), self._module.mlp_hidden_dim
        if hidden < ranks:
            return False
        mlp = evenly(hidden, ranks)
        times, rest = divmod(layer.out_features - 3 * self._width.total, hidden)
        pairs.columns[FUSED] = (*[self._width] * 3, *[mlp] * times)
        pairs.numbers["mlp_hidden_dim"] = tuple(map(len, mlp.parts))
        return not rest

    def _norm(self, name: str, norm: nn.Module, pairs: Pairs) -> bool:
        size = channels_of(norm)
        width = self._width if name in QUERY_NORMS else self._key_width
        if size == width.total:
            pairs.spanning[name] = width
        return size in (self._head_dim, width.total)


def children(module: nn.Module, *names: str) -> list[nn.Module | None]:
    """Modules that are registered in one by these names; None for those that are not there."""
    return [module._modules.get(name) for name in names]


def channels_of(norm: nn.Module) -> int | None:
    """On how many channels a norm works; None if it does not say."""
    shape = getattr(norm, "normalized_shape", None) or getattr(getattr(norm, "weight", None), "shape", None)
    shape = shape or getattr(norm, "dim", None)
    return shape[0] if isinstance(shape, tuple) and len(shape) == 1 else None


def layers_of(module: nn.Module) -> dict[str, nn.Module]:
    """All modules within one, and itself as ``""``, that have parameters of their own, and norms without, by name."""
    return {
        name: one
        for name, one in module.named_modules()
        if any(x is not None for x in one._parameters.values()) or (name and "norm" in name.rpartition(".")[2])
    }
