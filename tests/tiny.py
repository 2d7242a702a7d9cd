"""Tiny pipelines of every family: the real classes with small random weights, saved as folders.

Sizes are awkward on purpose: 3 heads, odd text lengths, token counts that are not divisible by the degrees.
"""

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

HEADS, HEAD_DIM = 3, 8
WIDTH = HEADS * HEAD_DIM
TEXT = 16
WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "green", "blue", "circle", "square", "above", "the", "cat"]


def tokenizer(length: int) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )


def t5() -> T5EncoderModel:
    config = T5Config(vocab_size=len(WORDS), d_model=TEXT, d_kv=4, d_ff=24, num_layers=1, num_heads=2, dropout_rate=0.0)
    return T5EncoderModel(config)


def clip(projection: bool) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(WORDS), hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=8, eos_token_id=1, bos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def vae(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=2,
        shift_factor=0.1,
        scaling_factor=0.5,
        sample_size=64,
    )


KL = {
    "block_out_channels": (4, 8, 8), "down_block_types": ("DownEncoderBlock2D",) * 3, "latent_channels": 4,
    "up_block_types": ("UpDecoderBlock2D",) * 3, "layers_per_block": 1, "norm_num_groups": 2,
}  # fmt: skip
WAN = {
    "base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1, "latents_mean": [0.0] * 4,
    "temperal_downsample": [False, True, True], "latents_std": [1.0] * 4,
}  # fmt: skip
VIDEO = {"in_channels": 3, "out_channels": 3, "layers_per_block": 1}
BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2, "norm_num_groups": 2
}  # fmt: skip
HUNYUAN = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (32,) * 3, "layers_per_block": 1,
    "spatial_compression_ratio": 4,
}  # fmt: skip
VAES = {  # the configuration of every class that the parallel VAE supports
    "AutoencoderKL": KL,
    "AutoencoderKLFlux2": KL,
    "AutoencoderTiny": {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4},
    "AutoencoderKLWan": WAN,
    "AutoencoderKLQwenImage": WAN,
    "AutoencoderKLCogVideoX": VIDEO | {
        "down_block_types": ("CogVideoXDownBlock3D",) * 4, "up_block_types": ("CogVideoXUpBlock3D",) * 4,
        "block_out_channels": (8,) * 4, "latent_channels": 4, "norm_num_groups": 2,
    },
    "AutoencoderKLHunyuanVideo": VIDEO | {
        "latent_channels": 4, "block_out_channels": (8,) * 4, "norm_num_groups": 4
    },
    "AutoencoderKLLTXVideo": {
        "latent_channels": 8, "block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4,
        "layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5, "patch_size": 1,
        "spatio_temporal_scaling": (True, True, False, False),
        "decoder_spatio_temporal_scaling": (True, True, False, False), "decoder_inject_noise": (False,) * 5,
        "upsample_residual": (False,) * 4, "upsample_factor": (1,) * 4,
    },
    "AutoencoderKLMochi": {
        "latent_channels": 4, "encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4,
        "layers_per_block": (1,) * 5,
    },
    "AutoencoderDC": {
        "latent_channels": 4, "attention_head_dim": 2, "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "decoder_block_types": ("ResBlock", "EfficientViTBlock"), "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8), "encoder_qkv_multiscales": ((), (5,)), "scaling_factor": 1.0,
        "decoder_qkv_multiscales": ((), (5,)), "encoder_layers_per_block": (1, 1),
        "decoder_layers_per_block": (1, 1), "downsample_block_type": "conv", "upsample_block_type": "interpolate",
    },
    "AutoencoderKLAllegro": {
        "block_out_channels": (8,) * 4, "latent_channels": 4, "norm_num_groups": 4, "layers_per_block": 1,
        "sample_size": 160,
    },
    "AsymmetricAutoencoderKL": BLOCKS | {"down_block_out_channels": (8, 8), "up_block_out_channels": (8, 8)},
    "AutoencoderKLHunyuanImage": HUNYUAN | {"sample_size": 64},
    "AutoencoderKLHunyuanImageRefiner": HUNYUAN | {"temporal_compression_ratio": 2},
    "AutoencoderKLHunyuanVideo15": HUNYUAN | {"temporal_compression_ratio": 2},
    "AutoencoderKLKVAE": {
        "channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 4, "ch_mult": (1, 1, 1),
    },
    "AutoencoderKLKVAEVideo": {
        "ch": 32, "ch_mult": (1, 1, 1), "num_res_blocks": 1, "z_channels": 4, "temporal_compress_times": 2,
    },
    "AutoencoderKLLTX2Video": {
        "latent_channels": 8, "block_out_channels": (8,) * 4, "down_block_types": ("LTX2VideoDownBlock3D",) * 4,
        "decoder_block_out_channels": (16,) * 3, "upsample_factor": (1,) * 3, "layers_per_block": (1,) * 5,
        "decoder_layers_per_block": (1,) * 4, "patch_size": 1,
    },
    "AutoencoderKLMagvit": {
        "latent_channels": 4, "block_out_channels": [8] * 4, "layers_per_block": 1, "norm_num_groups": 4,
    },
    "AutoencoderKLQwenImage21": WAN | {
        "decoder_base_dim": 4, "dim_mult": [1] * 5, "temperal_downsample": [False] + [True] * 3, "in_channels": 3,
        "out_channels": 3,
    },
    "VQModel": BLOCKS | {"block_out_channels": (8, 8)},
}  # fmt: skip


def coder(name: str, **changes: Any) -> Any:
    """Build a VAE of ``VAES``."""
    return getattr(diffusers, name)(**VAES[name] | changes)


def pixart_transformer(**changes: Any) -> PixArtTransformer2DModel:
    config = {
        "num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM, "in_channels": 4, "out_channels": 8,
        "num_layers": 2, "cross_attention_dim": WIDTH, "sample_size": 8, "patch_size": 2, "caption_channels": TEXT,
        "use_additional_conditions": False,
    }  # fmt: skip
    return PixArtTransformer2DModel(**config | changes)


def pixart_alpha() -> PixArtAlphaPipeline:
    return PixArtAlphaPipeline(
        tokenizer=tokenizer(7),
        text_encoder=t5(),
        vae=vae(4),
        transformer=pixart_transformer(use_additional_conditions=True, sample_size=128),
        scheduler=DPMSolverMultistepScheduler(),
    )


def pixart_sigma() -> PixArtSigmaPipeline:
    return PixArtSigmaPipeline(
        tokenizer=tokenizer(7),
        text_encoder=t5(),
        vae=vae(4),
        transformer=pixart_transformer(),
        scheduler=DPMSolverMultistepScheduler(),
    )


def sd3_transformer(**changes: Any) -> SD3Transformer2DModel:
    config = {
        "sample_size": 8, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 3,
        "attention_head_dim": HEAD_DIM, "num_attention_heads": HEADS, "joint_attention_dim": TEXT,
        "caption_projection_dim": WIDTH, "pooled_projection_dim": 16, "pos_embed_max_size": 16,
        "dual_attention_layers": (0,), "qk_norm": "rms_norm",
    }  # fmt: skip
    return SD3Transformer2DModel(**config | changes)


def sd3() -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        transformer=sd3_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(16),
        text_encoder=clip(True),
        tokenizer=tokenizer(5),
        text_encoder_2=clip(True),
        tokenizer_2=tokenizer(5),
        text_encoder_3=t5(),
        tokenizer_3=tokenizer(6),
    )


def flux_transformer(**changes: Any) -> FluxTransformer2DModel:
    config = {
        "patch_size": 1, "in_channels": 64, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": HEAD_DIM,
        "num_attention_heads": HEADS, "joint_attention_dim": TEXT, "pooled_projection_dim": 8,
        "guidance_embeds": True, "axes_dims_rope": (4, 2, 2),
    }  # fmt: skip
    return FluxTransformer2DModel(**config | changes)


def flux() -> FluxPipeline:
    return FluxPipeline(
        transformer=flux_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(16),
        text_encoder=clip(False),
        tokenizer=tokenizer(5),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(6),
    )


def hunyuan_dit() -> HunyuanDiTPipeline:
    bert = BertConfig(
        vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformer = HunyuanDiT2DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=4, patch_size=2, sample_size=8,
        hidden_size=WIDTH, num_layers=4, mlp_ratio=2.0, cross_attention_dim=8, cross_attention_dim_t5=TEXT,
        pooled_projection_dim=8, text_len=77, text_len_t5=256, use_style_cond_and_image_meta_size=False,
    )  # fmt: skip
    return HunyuanDiTPipeline(
        vae=vae(4),
        text_encoder=BertModel(bert),
        tokenizer=tokenizer(77),
        transformer=transformer,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(256),
    )


def dit() -> DiTPipeline:
    transformer = DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=4, out_channels=8, num_layers=2,
        sample_size=10, patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    return DiTPipeline(
        transformer=transformer, vae=vae(4), scheduler=DDIMScheduler(), id2label={0: "circle", 1: "square"}
    )


FAMILIES = {
    "pixart_alpha": pixart_alpha,
    "pixart_sigma": pixart_sigma,
    "sd3": sd3,
    "flux": flux,
    "hunyuan_dit": hunyuan_dit,
    "dit": dit,
}
PROMPT = "a red circle above a blue square"


def build(family: str, attentive: bool = False) -> Any:
    """Build a pipeline with seeded weights; queries and keys are scaled up so that attention affects the result.

    ``attentive`` scales more, including values, for families whose random weights otherwise depend little on attention.
    """
    torch.manual_seed(0)
    pipe = FAMILIES[family]()
    if attentive:  # sampled again, as text encoders use more or fewer random numbers between releases of Transformers
        torch.manual_seed(0)
        pipe.transformer = type(pipe.transformer).from_config(pipe.transformer.config)
    much = attentive and family not in ("hunyuan_dit", "dit")
    for name, weight in pipe.transformer.named_parameters():
        kind = name.rpartition(".")[0].rpartition(".")[2]
        if weight.dim() == 2 and kind in ("to_q", "to_k"):
            weight.data.mul_(8 if much else 4)
        if weight.dim() == 2 and much and kind in ("add_k_proj", "add_v_proj", "to_v"):
            weight.data.mul_(16 if family.startswith("pixart") else 6)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save(family: str, folder: Path, attentive: bool = False) -> str:
    path = folder / (family + "_attentive" * attentive)
    if not path.exists():
        build(family, attentive).save_pretrained(path)
    return str(path)


def call_of(family: str, images: int = 1, **changes: Any) -> dict[str, Any]:
    """Return arguments of a short call with ``images`` different prompts, of 15 image tokens each (25 for DiT)."""
    call = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np"}
    if family == "dit":
        return call | {"class_labels": list(range(images))} | changes
    prompts = [PROMPT, "the cat", "a green square"]
    call |= {"prompt": prompts[:images] if images > 1 else PROMPT, "height": 80, "width": 48}
    if family.startswith("pixart"):
        call |= {"use_resolution_binning": False, "max_sequence_length": 7}
    if family == "sd3":
        call |= {"max_sequence_length": 6}
    if family == "flux":
        call |= {"max_sequence_length": 7}
    if family == "hunyuan_dit":
        call |= {"use_resolution_binning": False}
    return call | changes
