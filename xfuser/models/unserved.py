"""Transformer classes of Diffusers that have no plan, and why no plan can describe them."""

UNSERVED: dict[str, str] = {
    "AnyFlowFARTransformer3DModel": (
        "it writes keys and values of chunks of frames into a cache of the caller's, whose rows are not the batch's, by"
        " their place in the sequence, and attends by blocks of flex attention"
    ),
    "Cosmos3OmniTransformer": (
        "tokens that are read and tokens that are made are two sequences without a batch, of which the first is causal,"
        " by a second attention in the same module"
    ),
    "DreamLiteTransformer2DModel": "it is a part of DreamLite's U-Net, and no denoiser",
    "MiniMaxMusic3RVQDepthDecoder": "it decodes codes one after the other, and denoises nothing",
    "PriorTransformer": (
        "it makes one embedding, of a causal sequence as short as the prompt, in which no token is the image's"
    ),
    "RFD4ProteinaTransformer": (
        "it makes the structure of proteins: attention takes a bias for each pair of residues, and updates of these"
        " biases look at all pairs"
    ),
    "T5FilmDecoder": "its attention multiplies matrices itself, unscaled, and calls no `scaled_dot_product_attention`",
    "Transformer2DModel": (
        "it is a part of U-Nets; where it was a denoiser, Diffusers loads it as `PixArtTransformer2DModel` or"
        " `DiTTransformer2DModel`"
    ),
    "TransformerTemporalModel": "it is a part of U-Nets for videos, and no denoiser",
    "WanAnimate2Transformer3DModel": (
        "it takes keys of a first forward from a cache of the caller's, packs them frame by frame, and attends by"
        " blocks of flex attention"
    ),
}
