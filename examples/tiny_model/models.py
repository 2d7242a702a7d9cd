"""The untrained parts of the tiny text-to-image models: their sizes and initial weights."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, FluxTransformer2DModel, PixArtTransformer2DModel
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from xfuser.testing.shapes.scenes import vocabulary

LATENT_CHANNELS = 4
LATENT_SIZE = 32
TEXT_WIDTH = 96
TEXT_LENGTH = 24
HEADS, HEAD_WIDTH, LAYERS = 4, 32, 8
JOINT_HEADS, DOUBLE_LAYERS, SINGLE_LAYERS = 3, 2, 6
POOLED_WIDTH, POOLED_LENGTH = 32, 32


def build_vae() -> AutoencoderKL:
    """Build an autoencoder that downsamples by 8 and starts close to plain averaging."""
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=1,
        mid_block_add_attention=False,
        sample_size=256,
        scaling_factor=1.0,
    )
    _initialise_vae(vae)
    return vae


@torch.no_grad()
def _initialise_vae(vae: AutoencoderKL) -> None:
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.bias)
            _extended_identity(module.weight)
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.kaiming_normal_(module.conv1.weight)
            nn.init.normal_(module.conv2.weight, std=0.02)
        elif isinstance(module, Downsample2D):
            channels = range(module.conv.weight.shape[0])
            module.conv.weight.zero_()
            module.conv.weight[channels, channels, :2, :2] = 0.25
    # Separate constant channels keep the group norms from removing the brightness of the image.
    nn.init.normal_(vae.encoder.conv_in.bias[3:])
    nn.init.normal_(vae.decoder.conv_in.bias[LATENT_CHANNELS:])
    for coder in (vae.encoder, vae.decoder):
        nn.init.constant_(coder.conv_norm_out.bias, 1.5)
    nn.init.zeros_(vae.encoder.conv_out.weight[LATENT_CHANNELS:])
    nn.init.constant_(vae.encoder.conv_out.bias[LATENT_CHANNELS:], -4.0)


def _extended_identity(weight: torch.Tensor) -> None:
    """Pass the first channels through unchanged; make additional channels unit-norm mixtures of the inputs."""
    outputs, inputs, height, width = weight.shape
    weight.zero_()
    centre = weight[:, :, height // 2, width // 2]
    same = min(outputs, inputs)
    centre[:same, :same] = torch.eye(same)
    if outputs > inputs:
        centre[inputs:] = nn.functional.normalize(torch.randn(outputs - inputs, inputs), dim=1)


def build_tokenizer(longest: int = 300) -> PreTrainedTokenizerFast:
    """Build a tokenizer of whole words that drops punctuation and ends each text with `</s>`, as T5 does."""
    words = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\w\s]"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", words["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="right",
        model_max_length=longest,
    )


def build_text_encoder(words: int) -> T5EncoderModel:
    """Build a T5 encoder for a vocabulary of `words` tokens."""
    config = T5Config(
        vocab_size=words,
        d_model=TEXT_WIDTH,
        d_kv=24,
        d_ff=2 * TEXT_WIDTH,
        num_layers=3,
        num_heads=4,
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
        pad_token_id=0,
        eos_token_id=1,
    )
    encoder = T5EncoderModel(config)
    with torch.no_grad():
        _look_to_both_sides(encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight)
    return encoder


def _look_to_both_sides(bias: torch.Tensor) -> None:
    """Bias half of the heads to earlier words and half to later ones, so that word order matters from the start.

    With T5's own initialisation the encoder ignores word order for long: "red above blue" means "blue above red".
    """
    buckets, heads = bias.shape
    nn.init.normal_(bias)
    bias[: buckets // 2, : heads // 2] += 3.0
    bias[buckets // 2 :, heads // 2 :] += 3.0


def build_transformer() -> PixArtTransformer2DModel:
    """Build the denoiser; every block starts as the identity."""
    transformer = PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        num_layers=LAYERS,
        cross_attention_dim=HEADS * HEAD_WIDTH,
        caption_channels=TEXT_WIDTH,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        sample_size=LATENT_SIZE,
        patch_size=2,
        use_additional_conditions=False,
    )
    _initialise_transformer(transformer)
    return transformer


@torch.no_grad()
def _initialise_transformer(transformer: PixArtTransformer2DModel) -> None:
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for block in transformer.transformer_blocks:
        nn.init.normal_(block.scale_shift_table, std=0.02)
        nn.init.zeros_(block.attn2.to_out[0].weight)
    nn.init.normal_(transformer.scale_shift_table, std=0.02)
    nn.init.zeros_(transformer.adaln_single.linear.weight)
    nn.init.zeros_(transformer.proj_out.weight)


def build_pooled_encoder(words: int) -> CLIPTextModel:
    """Build a CLIP text encoder for a vocabulary of `words` tokens; it pools a prompt into one vector."""
    config = CLIPTextConfig(
        vocab_size=words,
        hidden_size=POOLED_WIDTH,
        intermediate_size=2 * POOLED_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=POOLED_LENGTH,
        projection_dim=POOLED_WIDTH,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return CLIPTextModel(config)


def build_joint_transformer() -> FluxTransformer2DModel:
    """Build the denoiser with joint attention of text and image; every block starts close to the identity."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=DOUBLE_LAYERS,
        num_single_layers=SINGLE_LAYERS,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=JOINT_HEADS,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(HEAD_WIDTH // 4, HEAD_WIDTH * 3 // 8, HEAD_WIDTH * 3 // 8),
    )
    with torch.no_grad():
        for name, module in transformer.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
                if ".norm" in name:  # produces the gates
                    module.weight.mul_(0.1)
        nn.init.zeros_(transformer.proj_out.weight)
        nn.init.zeros_(transformer.time_text_embed.guidance_embedder.linear_2.weight)
    return transformer


def build_scheduler(dynamic: bool = False) -> DPMSolverMultistepScheduler:
    """Build the scheduler: flow matching noise levels, for a model that predicts the clean latents.

    With `dynamic`, the pipeline sets the shift of the levels towards noise.
    """
    return DPMSolverMultistepScheduler(
        prediction_type="sample", use_flow_sigmas=True, flow_shift=2.0, use_dynamic_shifting=dynamic
    )
