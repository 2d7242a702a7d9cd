"""Small examples of code with its own parallel forward, in the usual styles."""

from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import xfuser
from xfuser.core.distributed import (
    get_cfg_group,
    get_classifier_free_guidance_rank,
    get_classifier_free_guidance_world_size,
    get_runtime_state,
    get_sequence_parallel_rank,
    get_sequence_parallel_world_size,
    get_sp_group,
)
from xfuser.core.distributed.utils import RankGenerator
from xfuser.core.long_ctx_attention import AttnType, xFuserLongContextAttention

WIDTH, HEADS = 24, 3


def filled(module):
    """Fill the module with weights that are the same on every rank."""
    generator = torch.Generator().manual_seed(3)
    for weight in module.parameters():
        nn.init.normal_(weight, std=0.3, generator=generator)
    return module.eval().requires_grad_(False)


def split_heads(x):
    return x.view(*x.shape[:2], HEADS, -1)


def plain(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class VideoBlock(nn.Module):
    """Self-attention and feed-forward; clients replace the attention's forward."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.ffn = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.window_size = (-1, -1)

    def self_attn(self, x, positions):
        q, k, v = split_heads(self.q(x)) * positions, split_heads(self.k(x)) * positions, split_heads(self.v(x))
        return self.o(plain(q, k, v).flatten(2))

    def forward(self, x, positions):
        x = x + self.self_attn(x, positions)
        return x + self.ffn(x)


class VideoModel(nn.Module):
    """A model whose parallel forward splits its tokens itself, and gathers them after the head."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([VideoBlock(), VideoBlock()])
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x):
        positions = torch.linspace(0.5, 1.5, x.shape[1]).view(1, -1, 1, 1)
        for block in self.blocks:
            x = block(x, positions)
        return self.head(x)


def usp_attn_forward(block, x, positions):
    """A client's replacement of the block's attention: it creates a layer for each call."""
    q, k, v = split_heads(block.q(x)) * positions, split_heads(block.k(x)) * positions, split_heads(block.v(x))
    x = xFuserLongContextAttention()(None, query=q, key=k, value=v, window_size=block.window_size)
    return block.o(x.flatten(2))


def usp_dit_forward(model, x):
    """A client's replacement of the model's forward."""
    world, rank = get_sequence_parallel_world_size(), get_sequence_parallel_rank()
    positions = torch.linspace(0.5, 1.5, x.shape[1]).view(1, -1, 1, 1)
    x, positions = (torch.chunk(whole, world, dim=1)[rank] for whole in (x, positions))
    for block in model.blocks:
        x = x + usp_attn_forward(block, x, positions)
        x = x + block.ffn(x)
    return get_sp_group().all_gather(model.head(x), dim=1)


class JointModel(nn.Module):
    """Image and text in one attention; the parallel forward keeps the text whole on every rank."""

    def __init__(self, strategy):
        super().__init__()
        self.qkv, self.text_qkv = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.hybrid_seq_parallel_attn = None
        self.strategy = strategy

    def forward(self, image, text):
        for _ in range(2):
            image_qkv = split_heads(self.qkv(image)).chunk(3, dim=-1)
            text_qkv = split_heads(self.text_qkv(text)).chunk(3, dim=-1)
            if self.hybrid_seq_parallel_attn is None:
                together = [torch.cat(pair, dim=1) for pair in zip(image_qkv, text_qkv, strict=True)]
                attended = plain(*together).flatten(2)
                image_out, text_out = attended.split([image.shape[1], text.shape[1]], dim=1)
            else:
                image_out, text_out = self.attend_in_parallel(image_qkv, text_qkv)
            image, text = image + self.out(image_out), text + self.out(text_out)
        return image, text

    def attend_in_parallel(self, image_qkv, text_qkv):
        q, k, v = image_qkv
        attended = self.hybrid_seq_parallel_attn(
            None,
            q,
            k,
            v,
            dropout_p=0.0,
            causal=False,
            joint_tensor_query=text_qkv[0],
            joint_tensor_key=text_qkv[1],
            joint_tensor_value=text_qkv[2],
            joint_strategy=self.strategy,
        )
        attended = attended.view(attended.shape[0], -1, WIDTH)
        tokens, text = q.shape[1], text_qkv[0].shape[1]
        if self.strategy == "rear":
            return attended.split([tokens, text], dim=1)
        text_out, image_out = attended.split([text, tokens], dim=1)
        return image_out, text_out


def joint_forward(model, image, text):
    """A client's wrapper: split the rows of the image, or its columns if the rows are not divisible."""
    world, rank = get_sequence_parallel_world_size(), get_sequence_parallel_rank()
    split_dim = -3 if image.shape[-3] % world == 0 else -2
    mine = torch.chunk(image, world, dim=split_dim)[rank]
    model.hybrid_seq_parallel_attn = xFuserLongContextAttention()
    out, text = model(mine.reshape(image.shape[0], -1, WIDTH), text)
    return get_sp_group().all_gather(out.reshape(mine.shape), dim=split_dim), text


def guided_step(model, latents, scale=3.0):
    """Batched guidance: each CFG rank computes one branch, each sequence rank a shard of it; then gather both."""
    cfg, branch = get_classifier_free_guidance_world_size(), get_classifier_free_guidance_rank()
    both = torch.cat([latents, 0.5 * latents])
    mine = torch.chunk(both, cfg, dim=0)[branch]
    get_runtime_state().split_text_embed_in_sp = False
    noise = usp_dit_forward(model, mine)
    if cfg > 1:
        cond, uncond = get_cfg_group().all_gather(noise, separate_tensors=True)
    else:
        cond, uncond = noise.chunk(2)
    return uncond + scale * (cond - uncond)


def make_attention(attn_type, sync_ulysses):
    """Return attention over ``[B, H, S, D]`` or ``[B, S, H*D]``, as node-based user interfaces patch it in."""
    layer = xFuserLongContextAttention(use_sync=sync_ulysses, attn_type=AttnType[attn_type])

    def attention(q, k, v, heads, mask=None, skip_reshape=False, skip_output_reshape=False):
        if skip_reshape:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        else:
            q, k, v = (x.view(x.shape[0], -1, heads, x.shape[-1] // heads) for x in (q, k, v))
        out = layer(None, q, k, v).transpose(1, 2)
        return out if skip_output_reshape else out.transpose(1, 2).reshape(out.shape[0], -1, heads * out.shape[-1])

    return attention


class Worker:
    """One rank of a node-based user interface: it builds its own groups by the rank grid, and rank 0 sends commands."""

    def __init__(self, ulysses, ring, cfg):
        rank, world = dist.get_rank(), dist.get_world_size()
        grid = RankGenerator(1, ulysses * ring, 1, cfg, 1, 1, "tp-sp-pp-cfg-dp")
        assert grid.world_size == world
        for ranks in grid.get_ranks("sp"):
            group = dist.new_group(ranks)
            if rank in ranks:
                self.own_group, self.own_ranks = group, ranks
        xfuser.core.distributed.init_distributed_environment(rank=rank, world_size=world)
        xfuser.core.distributed.initialize_model_parallel(
            sequence_parallel_degree=ulysses,
            classifier_free_guidance_degree=cfg,
            ring_degree=ring,
            ulysses_degree=ulysses,
        )
        assert get_sp_group().ranks == self.own_ranks
        self.attention = make_attention("FA", sync_ulysses=True)

    def command(self, name=None):
        (command,) = xfuser.core.distributed.get_world_group().broadcast_object_list([name], src=0)
        return getattr(self, command)

    def sample(self, latents):
        """Self-attention without weights; the number of tokens is divisible by the ranks."""
        x = latents.chunk(len(self.own_ranks), dim=1)[self.own_ranks.index(dist.get_rank())]
        with torch.no_grad() if x.requires_grad else nullcontext():
            first = self.attention(x, x, x, HEADS)
            heads_first = split_heads(first).transpose(1, 2)
            x = self.attention(heads_first, heads_first, heads_first, HEADS, skip_reshape=True)
        gathered = [torch.empty_like(x) for _ in self.own_ranks]
        dist.all_gather(gathered, x, group=self.own_group)
        return torch.cat(gathered, dim=1)
