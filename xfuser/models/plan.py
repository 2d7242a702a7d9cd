"""The vocabulary in which a model family is described to the engine: data.

A transformer here is a stack of blocks that pass *streams* of tokens on: ``"image"`` always (pictures or videos), and
``"text"`` where other tokens take part in the attention between tokens. A plan says which arguments of which modules
carry what.
"""

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

Streams = tuple[str, ...]
PICTURE = "picture"  # keys of an IP-adapter


class Tokens(NamedTuple):
    """Where a tensor has an entry for each token of some streams, which lie there one after the other.

    Attributes:
        dim: the dimension; one that is 1 long is the same for all tokens.
        dims: how many dimensions such a tensor has, where the argument may also hold something that has no such
            entries; None where it never does.
        within: the only list of blocks where the argument has them; None for all.
        rows: whether the dimension counts the tokens of the first row of the batch, then those of the second, ...
    """

    streams: Streams
    dim: int = 1
    dims: int | None = None
    within: str | None = None
    rows: bool = False


class Attention(NamedTuple):
    """The streams of an attention's queries, and those of its keys, each in the order of concatenation."""

    queries: Streams
    keys: Streams


@dataclass(frozen=True)
class ModelPlan:
    """How one transformer class is laid out.

    Attributes:
        blocks: names of the ModuleLists whose modules are the blocks, in the order of execution.
        attention: name of each self- or joint-attention module within a block, to the streams that it
            concatenates, in order. Cross-attention to anything but streams is not named: it needs nothing from other
            ranks.
        optional: those of ``attention`` that not all blocks have.
        embed: name of the module that makes tokens of latents, row by row; None for one that takes more than latents.
        head: name of the module behind which the image's tokens are gathered, the last one that works on tokens; None
            to gather all that the last block returns, where the forward would mix it with what is not split.
        latents: argument of the forward with the latents: a tensor, or a list with one for each row of the batch.
        image, text: arguments of the blocks that carry the streams; text is None where there is no second stream that
            is split.
        carried: lists of blocks that differ from that: arguments that carry streams, to the streams that lie there one
            after the other; none where the tokens are rows of a batch, which need nothing from each other.
        carrier_dim: dimension of what carries streams that counts tokens.
        whole: whether text takes part in the attention, but is not split, as the forward or the attention cuts it by
            its length: every rank has all of it, beside its share of the image. Under PipeFusion, blocks are given it
            with patch 0; with others, the forward has zeros in its place between the blocks.
        padded: whether the forward appends tokens to those of the image, up to a fixed number.
        needs_text: whether the blocks fail where there is no text token at all.
        per_token: arguments of the blocks with one entry per token, such as rotary tables and key masks; a tuple for
            an argument that is a tuple of different ones, with None for those that have no such entries.
        leading: arguments of the blocks that count tokens at the beginning of a stream, to that stream.
        spread: those of ``per_token`` that the forward also applies between the last block and the head.
        segments: arguments of the blocks: the parts of the sequence that see themselves and what is ahead of them
            (:mod:`xfuser.core.attention.segments`); a key mask; and a mask over pairs of tokens, which takes the place
            of both.
        length_base: argument of the blocks with a dict, and its key for a number, to whose logarithm attention compares
            that of the number of tokens.
        prompted: streams of the keys that the image's tokens attend to in all further calls of an attention module
            that has an IP-adapter; ``"picture"`` are the adapter's own keys, of which every rank has all.
        idle: arguments of attention modules that switch attention off for a call.
        many: whether attention modules call ``scaled_dot_product_attention`` more than once, each time for all tokens.
        linear: attention modules that are linear: they sum a state over the tokens by their first ``matmul``.
        gathered: modules, of the model or of blocks, that look at all tokens of the image at once, to their arguments
            with these: they run whole on every rank.
        framed: arguments of ``gathered`` modules with an entry for each frame, ``[B, frames, ...]``, at which this
            frame's tokens alone look: under PipeFusion, these modules run on a patch, of whole frames or a part of one.
        between: modules that the forward calls on the image's tokens between blocks, to their argument with these,
            which has the shape of their output: under PipeFusion, they run on the stage of the block behind.
        rows: argument of the blocks with the number of rows of tokens, where blocks convolve them and rows therefore
            stay together.
        convolutions: modules of a block that do so, ``[B, C, rows, columns]``.
        residuals: arguments of the forward with per-token residuals of a ControlNet, ``[B, image tokens, D]``; maps
            where the class has ``halvings``.
        halvings: attribute of the class that says how often its maps, ``[B, C, H, W]``, are halved and doubled again
            between ``embed`` and ``head``: a U-Net's. All of it then lies between these two, and there are no blocks.
        sound: argument of the forward with the latents of the second stream, where that is denoised, too: the forward's
            second output is of them.
        beside: arguments of the forward with pictures whose tokens come behind those of the latents.
        by_number: arguments of the forward that make blocks pick tokens by their number, which shares do not know.
        unbatched: arguments of the forward that have no batch dimension.
        batch_dims: arguments of the forward whose batch dimension is not the first.
        by_frame: arguments of the forward with a row for each frame of each row of the batch.
        row_lists: arguments of the forward that are lists with an entry for each row of the batch.
        pictures: argument of the forward with a dict from the number of a row of the batch to what it has of another
            argument's list, and that argument.
        returns: what a block returns, in order: one stream alone is returned as it is, several as a tuple.
        text_modules: submodules of the blocks that work on text tokens.
        skip: argument of the second half's blocks with the output of the block as far from the other end, for long
            skips; None where there are none.
        lent: submodules of blocks that the forward uses outside of their block.
        counts_steps: arguments of the forward that pipelines pass by the number of the step.
        least_steps: steps that a call has at least, as the class's pipeline fails with fewer (PixArt-alpha: with
            all schedulers but that of a one-step model).
        frames: dimension of video latents that counts frames, ``[B, C, F, H, W]`` or ``[B, F, C, H, W]``.
        height: dimension of video latents that counts rows.
        packed: dimension of packed latents that counts tokens, ``[B, tokens, C]``, or, of sound, ``[B, C, time]``.
        per_head: arguments of attention modules with an entry for each head, or for each channel of all heads, as
            rotary tables that are applied before heads are told apart: number of dimensions to the dimension.
        undivided: modules whose weights the forward uses without calling the layers that have them.
        unpaired: attention modules whose results leave them by another way than their output linear.
        unpaired_without: attention modules to the layer without which they are ``unpaired``.
        context: the class's own context-parallel plan of Diffusers, in place of all that is said here about blocks.
        in_patches: the plan under PipeFusion, where it is another.
        hints: lists among ``blocks``, ahead of the others, whose blocks pass tokens on to each other alone, and whose
            first outputs the forward adds behind others: to the configuration's list of the numbers of these.
        ahead: lists of blocks ahead of ``blocks``, on the first stage of PipeFusion; elsewhere they run whole.
        text_first: argument of the forward with a mask of text tokens, where the sequence of each row of the batch is
            its own number of these, its image and padding. Patches have the image first, and all else behind it.
        unsequenced: why sequence parallelism (Ulysses, ring) cannot support the class; None where it does.
        unpiped: why PipeFusion cannot support the class; None where it does.
    """

    blocks: tuple[str, ...]
    attention: dict[str, Streams | Attention]
    optional: tuple[str, ...] = ()
    embed: str | None = None
    head: str | None = "proj_out"
    latents: str = "hidden_states"
    image: str = "hidden_states"
    text: str | None = None
    carried: dict[str, dict[str, Streams]] = field(default_factory=dict)
    carrier_dim: int = 1
    whole: bool = False
    padded: bool = False
    needs_text: bool = False
    per_token: dict[str, Tokens | tuple[Tokens | None, ...]] = field(default_factory=dict)
    leading: dict[str, str] = field(default_factory=dict)
    spread: tuple[str, ...] = ()
    segments: tuple[str, str, str] | None = None
    length_base: tuple[str, str] | None = None
    prompted: Streams = ()
    idle: tuple[str, ...] = ()
    many: bool = False
    linear: tuple[str, ...] = ()
    gathered: dict[str, tuple[str, ...]] = field(default_factory=dict)
    framed: tuple[str, ...] = ()
    between: dict[str, str] = field(default_factory=dict)
    rows: str | None = None
    convolutions: tuple[str, ...] = ()
    residuals: tuple[str, ...] = ()
    halvings: str | None = None
    sound: str | None = None
    beside: tuple[str, ...] = ()
    by_number: tuple[str, ...] = ()
    unbatched: tuple[str, ...] = ()
    batch_dims: dict[str, int] = field(default_factory=dict)
    by_frame: tuple[str, ...] = ()
    row_lists: tuple[str, ...] = ()
    pictures: tuple[str, str] | None = None
    returns: Streams = ("image",)
    text_modules: tuple[str, ...] = ()
    skip: str | None = None
    lent: tuple[str, ...] = ()
    counts_steps: tuple[str, ...] = ()
    least_steps: int = 1
    frames: int = 2
    height: int = 3
    packed: int = 1
    per_head: dict[str, dict[int, int]] = field(default_factory=dict)
    undivided: tuple[str, ...] = ()
    unpaired: tuple[str, ...] = ()
    unpaired_without: dict[str, str] = field(default_factory=dict)
    context: dict[str, Any] | None = None
    in_patches: "ModelPlan | None" = None
    hints: dict[str, str] = field(default_factory=dict)
    ahead: tuple[str, ...] = ()
    text_first: str | None = None
    unsequenced: str | None = None
    unpiped: str | None = None

    @property
    def patched(self) -> bool:
        """Whether ranks can hold parts of the image: shares of its tokens, or of the rows of its maps."""
        return self.unsequenced is None or self.halvings is not None

    @property
    def piped(self) -> "ModelPlan":
        """The plan under PipeFusion."""
        return self.in_patches or self

    def carriers(self, blocks: str) -> dict[str, Streams]:
        """Arguments of the blocks of this list that carry tokens from block to block, and their streams."""
        usual = {self.image: ("image",), self.text: ("text",)} if self.text else {self.image: ("image",)}
        return self.carried.get(blocks, usual)

    def outputs(self, blocks: str) -> list[Streams]:
        """Streams of each tensor that the blocks of this list return."""
        if blocks in self.carried:
            return list(self.carried[blocks].values())
        return [(stream,) for stream in self.returns]

    def attentions(self) -> dict[str, Attention]:
        """The attention modules of a block by name."""
        return {
            name: streams if isinstance(streams, Attention) else Attention(streams, streams)
            for name, streams in self.attention.items()
        }


class Block(NamedTuple):
    """A block, the ModuleList that it is in, and its place there."""

    module: nn.Module
    list_name: str
    index: int


def blocks_of(model: nn.Module, plan: ModelPlan) -> list[Block]:
    """The blocks of a transformer, in the order of execution."""
    return [Block(block, name, i) for name in plan.blocks for i, block in enumerate(model.get_submodule(name))]


def matching(model: nn.Module, pattern: str) -> list[str]:
    """Names of the modules of a model that fit a name in which ``*`` stands for one part."""
    found = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))
    return [name for name, _ in model.named_modules() if found.fullmatch(name)]


def attentions_of(model: nn.Module, plan: ModelPlan) -> dict[str, Attention]:
    """The streams of each attention module in the blocks, by its name in the transformer.

    Raises:
        ValueError: a block has not the attention modules of the plan, and would attend to a rank's own tokens alone.
    """
    found: dict[str, Attention] = {}
    for block in blocks_of(model, plan):
        attentions = plan.attentions() if plan.carriers(block.list_name) else {}
        lacking = [name for name in (*attentions, *plan.linear) if not _has(block.module, name)]
        if required := [name for name in lacking if name not in plan.optional]:
            raise ValueError(
                f"{block.list_name}.{block.index} of {type(model).__name__}, a {type(block.module).__name__}, has no"
                f" attention module {' and '.join(required)}, which the plan of its class requires: use CFG or data"
                " parallelism, or register_plan() a plan for this class (docs/adding_models/README.md)"
            )
        kept = {name: streams for name, streams in attentions.items() if name not in lacking}
        found |= {f"{block.list_name}.{block.index}.{name}": streams for name, streams in kept.items()}
    return found


def _has(block: nn.Module, name: str) -> bool:
    owner: Any = block
    for part in name.split("."):
        owner = getattr(owner, part, None)
    return owner is not None
