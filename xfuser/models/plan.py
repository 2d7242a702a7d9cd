"""The data that describe a model family to the engine.

A transformer is a stack of blocks that pass *streams* of tokens on: always ``"image"`` (images or videos), and
``"text"`` if other tokens take part in the attention between tokens. A plan names the blocks, their modules, and the
arguments that carry tokens.
"""

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

Streams = tuple[str, ...]
PICTURE = "picture"  # stream of an IP-adapter's keys


class Tokens(NamedTuple):
    """The dimension of a tensor that has an entry for each token of some streams, one stream after the other.

    Attributes:
        dim: the dimension; if its size is 1, the entry is the same for all tokens.
        dims: number of dimensions of such a tensor, if the argument may also hold a tensor without such entries; None
            if it never does.
        within: the only list of blocks in which the argument has such entries; None for all.
        rows: whether the dimension counts the tokens of the first batch entry, then those of the second, ...
    """

    streams: Streams
    dim: int = 1
    dims: int | None = None
    within: str | None = None
    rows: bool = False


class Attention(NamedTuple):
    """The streams of an attention's queries and of its keys, each in the order of concatenation."""

    queries: Streams
    keys: Streams


@dataclass(frozen=True)
class ModelPlan:
    """The structure of one transformer class. Fields that are dicts are described as "keys, to values".

    Attributes:
        blocks: names of the ModuleLists that contain the blocks, in the order of execution.
        attention: name of each self- or joint-attention module within a block, to the streams that it concatenates, in
            order. Cross-attention to anything but streams is left out: it needs nothing from other ranks.
        optional: modules in ``attention`` that not all blocks have.
        embed: name of the module that makes tokens of latents, row by row; None if it takes more than latents.
        head: name of the last module that works on tokens, after which the image's tokens are gathered; None to gather
            all that the last block returns, if the forward would mix it with tensors that are not split.
        latents: argument of the forward with the latents: a tensor, or a list with one per batch entry.
        image, text: arguments of the blocks that carry the streams; text is None if no second stream is split.
        carried: lists of blocks that differ from that, to their arguments that carry streams, and the streams in each,
            in order; no arguments if the tokens are entries of a batch and need nothing from each other.
        carrier_dim: the dimension that counts tokens in arguments that carry streams.
        whole: whether text takes part in the attention but is not split, as the forward or the attention cuts it by
            its length: every rank has all of it, with its share of the image. Under PipeFusion, blocks get it with
            patch 0; with other patches, the forward has zeros in its place between the blocks.
        padded: whether the forward appends tokens to those of the image, up to a fixed number.
        needs_text: whether the blocks fail if there is no text token at all.
        per_token: arguments of the blocks with one entry per token, such as rotary tables and key masks; a tuple for
            an argument that is a tuple, with None for its elements without such entries.
        leading: arguments of the blocks that count tokens at the beginning of a stream, to that stream.
        spread: arguments in ``per_token`` that the forward also applies between the last block and the head.
        segments: arguments of the blocks: the parts of the sequence, which attend to themselves and the parts before
            (``xfuser.methods.masks.Segments``); a key mask; and a mask over pairs of tokens, which replaces both.
        length_base: argument of the blocks that is a dict, and its key for a number: attention is scaled by the
            logarithm of the number of tokens to the base of this number.
        prompted: streams of the keys that the image's tokens attend to in all further calls of an attention module
            that has an IP-adapter; ``"picture"`` are the adapter's own keys, of which every rank has all.
        idle: arguments of attention modules that switch attention off for a call.
        many: whether attention modules call ``scaled_dot_product_attention`` more than once, each time for all tokens.
        linear: attention modules that are linear: their first ``matmul`` sums a state over the tokens.
        gathered: modules, of the model or of blocks, that use all tokens of the image at once, to their arguments with
            these tokens: every rank runs them on all tokens.
        framed: arguments of ``gathered`` modules with an entry for each frame, ``[B, frames, ...]``, which only tokens
            of this frame use: under PipeFusion, these modules run on a patch, of whole frames or a part of one.
        between: modules that the forward calls on the image's tokens between blocks, to their argument with these
            tokens, which has the shape of their output: under PipeFusion, they run on the stage of the next block.
        rows: argument of the blocks with the number of rows of tokens, if blocks convolve rows, which then stay whole.
        convolutions: modules of a block that convolve rows, ``[B, C, rows, columns]``.
        residuals: arguments of the forward with per-token residuals of a ControlNet, ``[B, image tokens, D]``; maps if
            the class has ``halvings``.
        halvings: attribute of a U-Net's class: how often its maps, ``[B, C, H, W]``, are halved and doubled again
            between ``embed`` and ``head``. A U-Net has no blocks: these two modules enclose all of it.
        sound: argument of the forward with the latents of the second stream, if that is denoised, too: the forward's
            second output belongs to them.
        beside: arguments of the forward with reference images, whose tokens come after those of the latents.
        by_number: arguments of the forward that make blocks select tokens by index, which fails on shares.
        unbatched: arguments of the forward that have no batch dimension.
        batch_dims: arguments of the forward whose batch dimension is not the first, to that dimension.
        by_frame: arguments of the forward with an entry for each frame of each batch entry.
        row_lists: arguments of the forward that are lists with an entry for each batch entry.
        pictures: argument of the forward with a dict from the number of a batch entry to its part of another argument's
            list, and that argument.
        returns: what a block returns, in order: a single stream is returned as it is, several as a tuple.
        text_modules: submodules of the blocks that work on text tokens.
        skip: argument of the second half's blocks for long skips: the output of the block as far from the other end;
            None if there are none.
        lent: submodules of blocks that the forward uses outside of their block.
        counts_steps: arguments of the forward that pipelines choose by the number of the step.
        least_steps: the smallest number of steps of a call; the class's pipeline fails with fewer (PixArt-alpha: with
            all schedulers except that of a one-step model).
        frames: dimension of video latents that counts frames, ``[B, C, F, H, W]`` or ``[B, F, C, H, W]``.
        height: dimension of video latents that counts rows.
        packed: dimension of packed latents that counts tokens, ``[B, tokens, C]``, or, of sound, ``[B, C, time]``.
        per_head: arguments of attention modules with an entry for each head, or for each channel of all heads, such as
            rotary tables applied before heads are split, to a dict from their number of dimensions to that dimension.
        undivided: modules whose weights the forward uses without calling the layers that have them.
        unpaired: attention modules that do not return their results through their output linear.
        unpaired_without: attention modules to the layer without which they are ``unpaired``.
        context: the class's own context-parallel plan of Diffusers, which replaces all fields about blocks.
        in_patches: the plan under PipeFusion, if it is another.
        hints: lists among ``blocks``, before the others, whose blocks pass tokens only to each other, and whose first
            outputs the forward adds after others: to the configuration's list of the numbers of these.
        ahead: lists of blocks before ``blocks``: under PipeFusion on the first stage, otherwise whole on every rank.
        text_first: argument of the forward with a mask of text tokens, if the sequence of each batch entry is its own
            number of these, its image and padding. In patches, the image comes first, and all else after it.
        unsequenced: why sequence parallelism (Ulysses, ring) cannot support the class; None if it does.
        unpiped: why PipeFusion cannot support the class; None if it does.
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
        """The arguments that carry tokens between the blocks of this list, and their streams."""
        usual = {self.image: ("image",), self.text: ("text",)} if self.text else {self.image: ("image",)}
        return self.carried.get(blocks, usual)

    def outputs(self, blocks: str) -> list[Streams]:
        """The streams of each tensor that the blocks of this list return."""
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
    """A block, the name of its ModuleList, and its index there."""

    module: nn.Module
    list_name: str
    index: int


def blocks_of(model: nn.Module, plan: ModelPlan) -> list[Block]:
    """The blocks of a transformer, in the order of execution."""
    return [Block(block, name, i) for name in plan.blocks for i, block in enumerate(model.get_submodule(name))]


def matching(model: nn.Module, pattern: str) -> list[str]:
    """Names of the modules of a model that match a name in which ``*`` stands for one part."""
    found = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))
    return [name for name, _ in model.named_modules() if found.fullmatch(name)]


def attentions_of(model: nn.Module, plan: ModelPlan) -> dict[str, Attention]:
    """The streams of each attention module in the blocks, by its name in the transformer.

    Raises:
        ValueError: a block lacks attention modules of the plan, and would attend only to a rank's own tokens.
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
