"""The published coefficients of TeaCache (arXiv 2411.19108): data."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TeaCachePlan:
    """The data that TeaCache uses for one model.

    Attributes:
        model: its common name.
        coefficients: of the polynomial that maps the signal's relative change to an addend of the sum; the highest
            power first.
        threshold: default threshold of the sum, the lowest published one; None if none is published.
        signal: of the first block: its ``time`` embedding; its ``norm`` of the image tokens, which modulates them; or
            that norm, ``scaled`` and shifted by the block's table.
        source: where the coefficients were published, in github.com/ali-vilab/TeaCache at 7c10efc.
        config: values of the transformer's configuration that distinguish the model from others of its class.
        first: steps at the beginning in which all blocks run.
    """

    model: str
    coefficients: tuple[float, ...]
    threshold: float | None
    signal: str
    source: str
    config: dict[str, Any] = field(default_factory=dict)
    first: int = 1


TEACACHE: dict[str, tuple[TeaCachePlan, ...]] = {  # by class
    "FluxTransformer2DModel": (TeaCachePlan(
        "FLUX.1", (4.98651651e02, -2.83781631e02, 5.58554382e01, -3.82021401e00, 2.64230861e-01),
        0.25, "norm", "TeaCache4FLUX/teacache_flux.py",
    ),),
    "HunyuanVideoTransformer3DModel": (TeaCachePlan(
        "HunyuanVideo", (7.33226126e02, -4.01131952e02, 6.75869174e01, -3.14987800e00, 9.61237896e-02),
        0.1, "norm", "TeaCache4HunyuanVideo/teacache_sample_video.py", {"image_condition_type": None},
    ),),
    "LTXVideoTransformer3DModel": (TeaCachePlan(
        "LTX-Video", (2.14700694e01, -1.28016453e01, 2.31279151e00, 7.92487521e-01, 9.69274326e-03),
        0.03, "scaled", "TeaCache4LTX-Video/teacache_ltx.py",
    ),),
    "MochiTransformer3DModel": (TeaCachePlan(
        "Mochi 1", (-3.51241319e03, 8.11675948e02, -6.09400215e01, 2.42429681e00, 3.05291719e-03),
        0.06, "norm", "TeaCache4Mochi/teacache_mochi.py",
    ),),
    "CogVideoXTransformer3DModel": (TeaCachePlan(
        "CogVideoX-2B", (-3.10658903e01, 2.54732368e01, -5.92380459e00, 1.75769064e00, -3.61568434e-03),
        0.1, "time", "eval/teacache/experiments/cogvideox.py",
        {"use_rotary_positional_embeddings": False, "patch_size_t": None},
    ), TeaCachePlan(
        "CogVideoX-5B", (-1.53880483e03, 8.43202495e02, -1.34363087e02, 7.97131516e00, -5.23162339e-02),
        0.1, "time", "eval/teacache/experiments/cogvideox.py",
        {"use_rotary_positional_embeddings": True, "patch_size_t": None},
    )),
    "WanTransformer3DModel": (TeaCachePlan(  # by the projected embedding that blocks get ("retention mode")
        "Wan 2.1 T2V 1.3B", (-5.21862437e04, 9.23041404e03, -5.28275948e02, 1.36987616e01, -4.99875664e-02),
        None, "time", "TeaCache4Wan2.1/teacache_generate.py",
        {"num_attention_heads": 12, "num_layers": 30, "in_channels": 16}, 5,
    ), TeaCachePlan(
        "Wan 2.1 T2V 14B", (-3.03318725e05, 4.90537029e04, -2.65530556e03, 5.87365115e01, -3.15583525e-01),
        None, "time", "TeaCache4Wan2.1/teacache_generate.py",
        {"num_attention_heads": 40, "num_layers": 40, "in_channels": 16}, 5,
    )),
}  # fmt: skip


def teacache_plan(cls: str, config: dict[str, Any] | None = None) -> TeaCachePlan:
    """The plan of a transformer of this class; ``config`` is its configuration, if known.

    Raises:
        ValueError: no coefficients are known for it.
    """
    plans = TEACACHE.get(cls, ())
    if config is not None:
        plans = [plan for plan in plans if all(config.get(key) == value for key, value in plan.config.items())]
    if not plans:
        served = ", ".join(plan.model for plans in TEACACHE.values() for plan in plans)
        raise ValueError(
            f"use_teacache: no coefficients are known for this {cls}, only for {served}: use use_fbcache,"
            " which needs none"
        )
    return plans[0]
