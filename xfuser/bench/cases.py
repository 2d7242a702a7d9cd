"""Named cases: pipelines of real classes with random weights, which require no files, and their call arguments."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import torch

from xfuser.vae.engines import available_engines

TEXT = 64  # size of the prompt embeddings
SEQUENCE = ("ulysses_degree={ranks}", "ring_degree={ranks}")
PIPEFUSION = "pipefusion_parallel_degree={{ranks}} num_pipeline_patch={0}"
VAE = "use_parallel_vae vae_engine={0} ulysses_degree={{ranks}}"


@dataclass(frozen=True)
class Case:
    """A pipeline to build with seeded weights, and the arguments of its call.

    Attributes:
        configs: the default configurations to compare; None for all methods.
    """

    title: str
    pipeline: Callable[[], Any]
    call: Callable[[], dict[str, Any]]
    configs: tuple[str, ...] | None = None


def pixart(blocks: int = 8, heads: int = 8, head_dim: int = 64, vae: Callable[[], Any] | None = None) -> Any:
    """A PixArt pipeline that takes prompt embeddings."""
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=head_dim, in_channels=4, out_channels=4, num_layers=blocks,
        cross_attention_dim=heads * head_dim, sample_size=128, patch_size=2, caption_channels=TEXT,
        use_additional_conditions=False,
    )  # fmt: skip
    return diffusers.PixArtSigmaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae() if vae else None,
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def pixart_call(side: int, steps: int, guidance: float = 1.0, tokens: int = 32) -> dict[str, Any]:
    """Arguments of a PixArt call: a square image of ``side`` pixels, ``tokens`` text tokens."""
    text, other = torch.randn(2, 1, tokens, TEXT, generator=torch.Generator().manual_seed(0))
    call = {
        "prompt_embeds": text, "prompt_attention_mask": torch.ones(1, tokens), "negative_prompt": None,
        "height": side, "width": side, "use_resolution_binning": False, "num_inference_steps": steps,
        "guidance_scale": guidance, "output_type": "latent",
    }  # fmt: skip
    if guidance > 1:
        call |= {"negative_prompt_embeds": other, "negative_prompt_attention_mask": torch.ones(1, tokens)}
    return call


def flux(double: int = 4, single: int = 8, heads: int = 8) -> Any:
    """A Flux pipeline that takes prompt embeddings."""
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=64, num_layers=double, num_single_layers=single, attention_head_dim=64, num_attention_heads=heads,
        joint_attention_dim=TEXT, pooled_projection_dim=TEXT, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return diffusers.FluxPipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), **parts
    )


def flux_call(height: int, width: int, text: int, steps: int) -> dict[str, Any]:
    """Arguments of a Flux call: sizes in pixels, ``text`` text tokens."""
    generator = torch.Generator().manual_seed(0)
    return {
        "prompt_embeds": torch.randn(1, text, TEXT, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, TEXT, generator=generator),
        "height": height, "width": width, "num_inference_steps": steps, "output_type": "latent",
    }  # fmt: skip


def sd3(blocks: int = 6, heads: int = 8) -> Any:
    """A Stable Diffusion 3 pipeline that takes prompt embeddings."""
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=64, patch_size=2, in_channels=16, out_channels=16, num_layers=blocks, attention_head_dim=64,
        num_attention_heads=heads, joint_attention_dim=TEXT, caption_projection_dim=heads * 64,
        pooled_projection_dim=TEXT, pos_embed_max_size=96,
    )  # fmt: skip
    parts = dict.fromkeys(f"{part}{which}" for part in ("text_encoder", "tokenizer") for which in ("", "_2", "_3"))
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=None, **parts
    )


def sd3_call(side: int, text: int, steps: int, guidance: float = 4.5) -> dict[str, Any]:
    """Arguments of a Stable Diffusion 3 call: a square image of ``side`` pixels, ``text`` text tokens."""
    generator = torch.Generator().manual_seed(0)
    words, pooled = torch.randn(2, 1, text, TEXT, generator=generator), torch.randn(2, 1, TEXT, generator=generator)
    return {
        "prompt_embeds": words[0], "negative_prompt_embeds": words[1], "pooled_prompt_embeds": pooled[0],
        "negative_pooled_prompt_embeds": pooled[1], "height": side, "width": side, "num_inference_steps": steps,
        "guidance_scale": guidance, "output_type": "latent",
    }  # fmt: skip


def wan(blocks: int = 6, heads: int = 4) -> Any:
    """A Wan pipeline that takes prompt embeddings."""
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=TEXT, freq_dim=64,
        ffn_dim=heads * 512, num_layers=blocks, rope_max_seq_len=1024,
    )  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    return diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=transformer
    )


def wan_call(height: int, width: int, frames: int, text: int, steps: int, guidance: float = 5.0) -> dict[str, Any]:
    """Arguments of a Wan call: sizes in pixels, ``text`` text tokens."""
    words = torch.randn(2, 1, text, TEXT, generator=torch.Generator().manual_seed(0))
    return {
        "prompt_embeds": words[0], "negative_prompt_embeds": words[1], "height": height, "width": width,
        "num_frames": frames, "num_inference_steps": steps, "guidance_scale": guidance, "output_type": "latent",
    }  # fmt: skip


def decoder(widths: tuple[int, int, int, int]) -> Any:
    """An ``AutoencoderKL`` of Stable Diffusion's structure with random weights."""
    return diffusers.AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    ).eval()


CASES = {
    "guidance": Case(
        "PixArt with guidance, 8 layers, hidden 512", pixart, partial(pixart_call, 1024, 2, 4.5), ("use_cfg_parallel",)
    ),
    "sequence": Case("PixArt, 8 layers, hidden 512", pixart, partial(pixart_call, 1024, 2), SEQUENCE),
    "joint": Case(
        "Flux, 4 + 8 layers, hidden 512, 128 tokens of text", flux, partial(flux_call, 512, 512, 128, 2), SEQUENCE
    ),
    "uneven": Case(
        "Flux, 4 + 8 layers, hidden 512, 127 tokens of text", flux, partial(flux_call, 528, 496, 127, 2), SEQUENCE
    ),
    "guided-joint": Case(
        "SD3 with guidance, 6 layers, hidden 512, 77 tokens of text", sd3, partial(sd3_call, 512, 77, 3)
    ),
    "video": Case(
        "Wan with guidance, 6 layers, hidden 512, 4 latent frames", wan, partial(wan_call, 256, 256, 13, 64, 3)
    ),
    "pipefusion": Case(
        "PixArt, 16 layers, hidden 512",
        partial(pixart, 16),
        partial(pixart_call, 1024, 9),
        (PIPEFUSION.format(4), PIPEFUSION.format(8)),
    ),
    "costs": Case("PixArt, 8 layers, hidden 512", pixart, partial(pixart_call, 512, 6), ("methods",)),
    "links": Case("PixArt with guidance, 8 layers, hidden 512", pixart, partial(pixart_call, 512, 6, 4.5)),
    "vae": Case(
        "AutoencoderKL, widths 128 to 512, behind a small PixArt",
        partial(pixart, 1, 1, 8, partial(decoder, (128, 256, 512, 512))),
        lambda: pixart_call(512, 1) | {"output_type": "pt"},
        tuple(VAE.format(engine) for engine in available_engines()[1:]),
    ),
    "tiny-joint": Case(
        "Flux, 1 + 1 layers, hidden 128, 8 tokens of text", partial(flux, 1, 1, 2), partial(flux_call, 128, 96, 8, 2)
    ),
    "tiny": Case(
        "PixArt with guidance, 4 layers, hidden 32", partial(pixart, 4, 4, 8), partial(pixart_call, 128, 4, 4.5)
    ),
}  # fmt: skip


def seeded(make: Callable[[], Any]) -> Any:
    """Build the pipeline, with the same random weights on every rank."""
    torch.manual_seed(0)
    pipe = make()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipe
