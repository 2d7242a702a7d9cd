"""The vocabulary in which a model family is described to the engine: data.

A transformer here is a stack of blocks that pass *streams* of tokens on: ``"image"`` always, and ``"text"`` where
text tokens take part in the self-attention. A plan says which arguments of which modules carry what.
"""

from dataclasses import dataclass, field

from torch import nn


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
        embed: name of the module that makes tokens of latents, row by row.
        head: name of the last module that works on tokens, a linear; tokens are gathered behind it.
        image: argument of the forward and of the blocks that carries the image stream.
        text: argument of the blocks that carries the text stream, for joint attention; None otherwise.
        per_token: arguments of the blocks that hold one entry per token, such as rotary tables and key masks.
        residuals: arguments of the forward with per-token residuals of a ControlNet, ``[B, image tokens, D]``.
        unbatched: arguments of the forward that have no batch dimension.
        returns: what a block returns, in order: one stream alone is returned as it is, several as a tuple.
        text_modules: submodules of the blocks that work on text tokens.
        skip: argument of the second half's blocks with the output of the block as far from the other end, for long
            skips; None where there are none.
        lent: submodules of blocks that the forward uses outside of their block.
        counts_steps: arguments of the forward that pipelines pass by the number of the step.
    """

    blocks: tuple[str, ...]
    attention: dict[str, tuple[str, ...]]
    embed: str = "pos_embed.proj"
    head: str = "proj_out"
    image: str = "hidden_states"
    text: str | None = None
    per_token: dict[str, Tokens] = field(default_factory=dict)
    residuals: tuple[str, ...] = ()
    unbatched: tuple[str, ...] = ()
    returns: tuple[str, ...] = ("image",)
    text_modules: tuple[str, ...] = ()
    skip: str | None = None
    lent: tuple[str, ...] = ()
    counts_steps: tuple[str, ...] = ()


def blocks_of(model: nn.Module, plan: ModelPlan) -> list[nn.Module]:
    """The blocks of a transformer, in the order of execution."""
    return [block for name in plan.blocks for block in model.get_submodule(name)]
