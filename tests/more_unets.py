"""More tiny pipelines over U-Nets, for videos and images, built with the same weights on every rank."""

from collections.abc import Callable
from functools import cache
from typing import Any

import diffusers
import numpy as np
import running
import tiny
import torch
import unets
import whole
from diffusers.pipelines.kolors import KolorsPipeline
from diffusers.pipelines.pag import KolorsPAGPipeline
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from xfuser.testing.zoo import FAMILIES, TEXT

LATENTS = (9, 7)
CALL = {
    "height": 8 * LATENTS[0], "width": 8 * LATENTS[1], "num_inference_steps": 3, "output_type": "np",
}  # fmt: skip
FRAMES = 3
VISION = TEXT  # channels of an embedded image


def unet(family: str, **changes: Any) -> Any:
    known = FAMILIES[family]
    return type(known)(**vars(known) | {"config": known.config | changes}).build()


def text() -> dict[str, Any]:
    return {"text_encoder": tiny.clip(False), "tokenizer": tiny.tokenizer(7)}


def vision() -> dict[str, Any]:
    config = CLIPVisionConfig(
        hidden_size=10, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=224,
        patch_size=56, projection_dim=VISION,
    )  # fmt: skip
    return {"image_encoder": CLIPVisionModelWithProjection(config), "feature_extractor": CLIPImageProcessor()}


def motion(base: Any, cls: str, parts: dict[str, Any], **more: Any) -> Any:
    levels = base.config.block_out_channels
    adapter = diffusers.MotionAdapter(
        block_out_channels=levels, motion_layers_per_block=1, motion_norm_num_groups=3, motion_num_attention_heads=3,
        use_motion_mid_block=False,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(beta_schedule="linear")
    return getattr(diffusers, cls)(
        vae=tiny.vae(4), unet=base, motion_adapter=adapter, scheduler=scheduler, **parts, **more
    )


def sd() -> Any:
    return unets.sd15().unet


def animatediff(cls: str = "AnimateDiffPipeline", **more: Any) -> Any:
    return motion(sd(), cls, text(), **more)


def animatediff_controlled() -> Any:
    return animatediff("AnimateDiffControlNetPipeline", controlnet=unets.controlnet(sd()))


def animatediff_xl() -> Any:
    whole_sdxl = unets.sdxl()
    parts = {name: part for name, part in whole_sdxl.components.items() if "text" in name or "token" in name}
    return motion(whole_sdxl.unet, "AnimateDiffSDXLPipeline", parts)


def svd() -> Any:
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, sample_size=64
    )
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type="v_prediction", timestep_type="continuous")
    return diffusers.StableVideoDiffusionPipeline(
        vae=vae, unet=unet("unet_svd", in_channels=8), scheduler=scheduler, **vision()
    )


def text_to_video() -> Any:
    return diffusers.TextToVideoSDPipeline(
        vae=tiny.vae(4), unet=unet("unet_3d", cross_attention_dim=8), scheduler=diffusers.DDIMScheduler(), **text()
    )


def i2vgen() -> Any:
    return diffusers.I2VGenXLPipeline(
        vae=tiny.vae(4), unet=unet("unet_i2vgen"), scheduler=diffusers.DDIMScheduler(), **text(),
        **vision(),
    )  # fmt: skip


def of_picture(cls: str, channels: int = 4, **more: Any) -> Any:
    """Return an image pipeline with Stable Diffusion's parts, and a U-Net with ``channels`` input channels."""
    base, made = unets.sd15(), getattr(diffusers, cls)
    parts = {name: part for name, part in base.components.items() if name != "image_encoder"}
    changed = type(base.unet).from_config(base.unet.config, in_channels=channels)
    return made(**parts | {"unet": changed}, requires_safety_checker=False, **more)


def adapted() -> Any:
    adapter = diffusers.T2IAdapter(
        channels=[6, 12, 12, 12], num_res_blocks=1, downscale_factor=8, adapter_type="full_adapter"
    )
    return of_picture("StableDiffusionAdapterPipeline", adapter=adapter)


def controlled() -> Any:
    return of_picture("StableDiffusionControlNetPipeline", controlnet=unets.controlnet(sd()))


def kandinsky() -> Any:
    """Return Kandinsky 2.2, which takes an embedded image instead of text."""
    base = unets.unet(
        out_channels=8, addition_embed_type="image", addition_time_embed_dim=None, encoder_hid_dim=VISION,
        encoder_hid_dim_type="image_proj", cross_attention_dim=12, projection_class_embeddings_input_dim=None,
    )  # fmt: skip
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    movq = tiny.coder("VQModel", latent_channels=4)
    return diffusers.KandinskyV22Pipeline(unet=base, movq=movq, scheduler=scheduler)


def kolors(cls: type = KolorsPipeline, **more: Any) -> Any:
    """Return Kolors without its text encoder, as its tokenizer requires SentencePiece."""
    net = unets.unet(cross_attention_dim=TEXT, projection_class_embeddings_input_dim=6 * 4 + VISION)
    return cls(
        vae=tiny.vae(4),
        text_encoder=None,
        tokenizer=None,
        unet=net,
        scheduler=diffusers.EulerDiscreteScheduler(),
        **more,
    )


class Processor:
    """Replaces a processor of text and images; it uses only the text."""

    def __call__(self, text: list[str], images: list[Any], **how: Any) -> Any:
        return tiny.tokenizer(99)(text, **how)


def dreamlite() -> Any:
    net = diffusers.DreamLiteUNetModel(
        block_out_channels=(6, 12, 12), layers_per_block=1, norm_num_groups=3, cross_attention_dim=TEXT,
        attention_head_dim=3,
    )  # fmt: skip
    pipe = diffusers.DreamLitePipeline(
        text_encoder=tiny.t5(), tokenizer=tiny.tokenizer(99), processor=Processor(),
        vae=tiny.coder("AutoencoderTiny", latent_channels=4), unet=net,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )  # fmt: skip
    pipe.prompt_template_encode_generate_start_idx = pipe.prompt_template_encode_edit_start_idx = 3
    return pipe


def picture() -> Image.Image:
    return whole.picture(CALL["height"], CALL["width"])


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompts(images: int) -> dict[str, Any]:
    return {"prompt": unets.PROMPTS[:images], "negative_prompt": ["the cat"] * images, "guidance_scale": 3.0}


def embedded(images: int) -> dict[str, Any]:
    return {"guidance_scale": 3.0} | {
        f"{sign}{name}": noise(images, *shape, seed=seed)
        for seed, sign in enumerate(("", "negative_"))
        for name, shape in (("prompt_embeds", (7, TEXT)), ("pooled_prompt_embeds", (VISION,)))
    }


def masked(images: int) -> dict[str, Any]:
    mask = Image.fromarray(np.tri(CALL["height"], CALL["width"], dtype=np.uint8) * 255)
    return prompts(images) | {"image": [picture()] * images, "mask_image": [mask] * images, "strength": 1.0}


Calls = Callable[[int], dict[str, Any]]
KINDS: dict[str, tuple[Callable[[], Any], Calls]] = {  # builder; arguments of a call by number of images
    "animatediff": (animatediff, lambda images: prompts(images) | {"num_frames": FRAMES}),
    "animatediff_xl": (animatediff_xl, lambda images: prompts(images) | {"num_frames": FRAMES}),
    "animatediff_controlnet": (
        animatediff_controlled,
        lambda images: prompts(images) | {"num_frames": FRAMES, "conditioning_frames": [picture()] * FRAMES},
    ),
    "svd": (
        svd,
        lambda images: {"image": [picture()] * images, "num_frames": FRAMES, "decode_chunk_size": 2},
    ),
    "text_to_video": (text_to_video, lambda images: prompts(images) | {"num_frames": FRAMES}),
    "i2vgen": (
        i2vgen,
        lambda images: {
            "num_frames": FRAMES, "image": [picture()] * images, "guidance_scale": 3.0,
            "prompt_embeds": noise(images, 7, TEXT), "negative_prompt_embeds": noise(images, 7, TEXT, seed=2),
        },
    ),
    "pix2pix": (
        lambda: of_picture("StableDiffusionInstructPix2PixPipeline", channels=8),
        lambda images: prompts(images) | {"image": [picture()] * images, "image_guidance_scale": 1.5},
    ),
    "inpaint": (lambda: of_picture("StableDiffusionInpaintPipeline", channels=9), masked),
    "t2i_adapter": (adapted, lambda images: prompts(images) | {"image": [picture()] * images}),
    "controlnet": (controlled, lambda images: prompts(images) | {"image": [picture()] * images}),
    "kandinsky": (
        kandinsky,
        lambda images: {
            "image_embeds": noise(images, VISION), "negative_image_embeds": noise(images, VISION, seed=2),
            "guidance_scale": 3.0,
        },
    ),
    "kolors": (kolors, embedded),
    "kolors_pag": (
        lambda: kolors(KolorsPAGPipeline, pag_applied_layers=["mid"]),
        lambda images: embedded(images) | {"pag_scale": 2.0},
    ),
    "dreamlite": (dreamlite, lambda images: {"prompt": tiny.PROMPT, "num_images_per_prompt": images}),
    "dreamlite_edit": (
        dreamlite,
        lambda images: {"prompt": tiny.PROMPT, "image": picture(), "height": 80, "width": 48},
    ),
}  # fmt: skip


AMPLIFYING = ("animatediff", "animatediff_controlnet", "text_to_video", "i2vgen")  # amplify rounding of float32


@cache
def built(kind: str) -> Any:
    torch.manual_seed(0)
    pipe = KINDS[kind][0]()
    for part in pipe.components.values():
        for weight in part.parameters() if isinstance(part, torch.nn.Module) else ():
            if not weight.any():
                torch.nn.init.normal_(weight, std=0.1)
            weight.requires_grad_(False)
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(torch.float64) if kind in AMPLIFYING else pipe


def draw(kind: str, degrees: Any, images: int = 1, **changes: Any) -> np.ndarray:
    pipe = running.wrap(built(kind), degrees)
    call = CALL | KINDS[kind][1](images) | changes
    if kind == "pix2pix":
        call = {name: value for name, value in call.items() if name not in ("height", "width")}
    result = running.array(pipe(**call, generator=running.seeded()))
    running.unwrap(pipe)
    return result
