"""Transformer classes of Diffusers that have no plan, and why no plan can describe them."""

UNSERVED: dict[str, str] = {
    "AnyFlowFARTransformer3DModel": (
        "it writes keys and values of chunks of frames into the caller's cache, by their place in the sequence and not"
        " by batch entry, and attends by blocks of flex attention"
    ),
    "Cosmos3OmniTransformer": (
        "input tokens and generated tokens are two sequences without a batch, and the first one is causal, by a second"
        " attention in the same module"
    ),
    "DreamLiteTransformer2DModel": "it is a part of DreamLite's U-Net, not a denoiser",
    "MiniMaxMusic3RVQDepthDecoder": "it decodes codes one after the other, and is not a denoiser",
    "PriorTransformer": (
        "it makes one embedding, of a causal sequence as short as the prompt, without tokens of an image"
    ),
    "RFD4ProteinaTransformer": (
        "it generates structures of proteins: attention takes a bias for each pair of residues, and updates of these"
        " biases depend on all pairs"
    ),
    "T5FilmDecoder": "its attention multiplies matrices itself, unscaled, and calls no `scaled_dot_product_attention`",
    "Transformer2DModel": (
        "it is a part of U-Nets; where it was a denoiser, Diffusers loads it as `PixArtTransformer2DModel` or"
        " `DiTTransformer2DModel`"
    ),
    "TransformerTemporalModel": "it is a part of U-Nets for videos, not a denoiser",
    "WanAnimate2Transformer3DModel": (
        "it takes keys of a first forward from the caller's cache, packs them frame by frame, and attends by blocks of"
        " flex attention"
    ),
}
