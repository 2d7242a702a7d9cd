"""Tiny pipelines over U-Nets, saved as folders, and the functions that the ranks of the tests run."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import running
import tiny
import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

from xfuser.testing.zoo import FAMILIES

LATENTS = (17, 13)  # rows and columns that are not divisible by ranks or levels
CALL = {
    "height": 8 * LATENTS[0], "width": 8 * LATENTS[1], "num_inference_steps": 3, "guidance_scale": 3.0,
    "output_type": "np",
}  # fmt: skip
PROMPTS = [tiny.PROMPT, "the cat", "a green square"]


def unet(**changes: Any) -> diffusers.UNet2DConditionModel:
    known = FAMILIES["unet"]
    return type(known)(**vars(known) | {"config": known.config | changes}).build()


def sdxl() -> diffusers.StableDiffusionXLPipeline:
    return diffusers.StableDiffusionXLPipeline(
        unet=unet(cross_attention_dim=16, sample_size=128),
        vae=tiny.vae(4),
        scheduler=diffusers.EulerDiscreteScheduler(),
        text_encoder=tiny.clip(False),
        tokenizer=tiny.tokenizer(7),
        text_encoder_2=tiny.clip(True),
        tokenizer_2=tiny.tokenizer(7),
        add_watermarker=False,
    )


def sd15() -> diffusers.StableDiffusionPipeline:
    """Return a pipeline with four levels, heads of odd size, and attention projections that are convolutions."""
    return diffusers.StableDiffusionPipeline(
        unet=unet(
            block_out_channels=(6, 12, 12, 12),
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            use_linear_projection=False,
            addition_embed_type=None,
            sample_size=64,
            cross_attention_dim=8,
        ),
        vae=tiny.vae(4),
        scheduler=diffusers.DDIMScheduler(),
        text_encoder=tiny.clip(False),
        tokenizer=tiny.tokenizer(7),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


PIPELINES = {"sdxl": sdxl, "sd15": sd15}


def save(name: str, folder: Path) -> str:
    path = folder / name
    if not path.exists():
        torch.manual_seed(0)
        PIPELINES[name]().save_pretrained(path)
    return str(path)


def call_of(images: int = 1, **changes: Any) -> dict[str, Any]:
    return CALL | {"prompt": PROMPTS[:images]} | changes


@cache
def loaded(path: str, kind: str) -> Any:
    """Return the saved pipeline, or one of another kind with its parts."""
    pipe = running.loaded(path)
    kinds = {
        "text": lambda: pipe,
        "image": lambda: diffusers.AutoPipelineForImage2Image.from_pipe(pipe),
        "inpaint": lambda: diffusers.AutoPipelineForInpainting.from_pipe(pipe),
        "adapter": lambda: diffusers.StableDiffusionXLPipeline(
            **pipe.components | {"unet": with_adapter(pipe.unet)}, add_watermarker=False
        ),
        "controlnet": lambda: diffusers.StableDiffusionXLControlNetPipeline(
            **pipe.components, controlnet=controlnet(pipe.unet), add_watermarker=False
        ),
    }
    made = kinds[kind]()
    made.set_progress_bar_config(disable=True)
    return made


def controlnet(unet: Any) -> diffusers.ControlNetModel:
    torch.manual_seed(1)
    net = diffusers.ControlNetModel.from_unet(unet, conditioning_channels=3)
    for block in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
        torch.nn.init.normal_(block.weight, std=0.1)
    return net.eval()


def with_adapter(unet: Any) -> Any:
    """Return a copy with an IP-adapter of random weights and two tokens per image."""
    unet = copy.deepcopy(unet)
    torch.manual_seed(2)
    processors, width = {}, unet.config.cross_attention_dim
    for name, processor in unet.attn_processors.items():
        if name.endswith("attn2.processor"):
            hidden = unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
            processor = IPAdapterAttnProcessor2_0(hidden, width, num_tokens=(2,))
        processors[name] = processor
    unet.set_attn_processor(processors)
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(6, width, 2)])
    unet.config.encoder_hid_dim_type = "ip_image_proj"
    return unet.eval().requires_grad_(False)


def embedded_picture() -> torch.Tensor:
    return torch.randn(2, 1, 6, generator=running.seeded())


EXTRA = {  # additional arguments of each kind of pipeline
    "text": {},
    "adapter": {"ip_adapter_image_embeds": [embedded_picture()]},
    "image": {"image": running.picture(136, 104), "strength": 0.7, "num_inference_steps": 4},
    "inpaint": {
        "image": running.picture(136, 104), "strength": 0.8, "num_inference_steps": 4,
        "mask_image": torch.cat([torch.ones(1, 1, 60, 104), torch.zeros(1, 1, 76, 104)], dim=2),
    },
    "controlnet": {"image": running.picture(136, 104), "controlnet_conditioning_scale": 0.7},
}  # fmt: skip


def draw(path: str, degrees: Any, images: int = 1, kind: str = "text", **changes: Any) -> np.ndarray:
    call = call_of(images) | EXTRA[kind] | changes
    if kind == "image":
        call = {name: value for name, value in call.items() if name not in ("height", "width")}
    pipe = running.wrap(loaded(path, kind), degrees)
    try:
        return running.array(pipe(**call, generator=running.seeded()))
    finally:
        running.unwrap(pipe)
