"""The vocabulary in which a model family is described to the engine: data, no code.

A transformer here is a stack of blocks that pass *streams* of tokens on: ``"image"`` always, and ``"text"`` where
text tokens take part in the self-attention. A plan says which arguments of which modules carry what.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Tokens:
    """Streams that lie one after the other along a dimension of a tensor."""

    streams: tuple[str, ...]
    dim: int = 1


@dataclass(frozen=True)
class ModelPlan:
    """How one transformer class is laid out.

    Attributes:
        blocks: names of the ModuleLists whose modules are the blocks, in the order of execution.
        attention: name of each self- or joint-attention module within a block, to the streams that it
            concatenates, in order. Cross-attention is not named: it needs nothing from other ranks.
        head: name of the last module that works on tokens; tokens are gathered behind it.
        image: argument of the forward and of the blocks that carries the image stream.
        text: argument of the blocks that carries the text stream, for joint attention; None otherwise.
        per_token: arguments of the blocks that hold one entry per token, such as rotary tables and key masks.
        residuals: arguments of the forward with per-token residuals of a ControlNet, ``[B, image tokens, D]``.
        unbatched: arguments of the forward that have no batch dimension.
    """

    blocks: tuple[str, ...]
    attention: dict[str, tuple[str, ...]]
    head: str = "proj_out"
    image: str = "hidden_states"
    text: str | None = None
    per_token: dict[str, Tokens] = field(default_factory=dict)
    residuals: tuple[str, ...] = ()
    unbatched: tuple[str, ...] = ()
