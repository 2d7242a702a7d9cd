"""Which plan serves which transformer class."""

from torch import nn

from xfuser.models.dit import DIT
from xfuser.models.flux import FLUX
from xfuser.models.hunyuandit import HUNYUAN_DIT
from xfuser.models.pixart import PIXART
from xfuser.models.plan import ModelPlan
from xfuser.models.sd3 import SD3

PLANS: dict[str, ModelPlan] = {
    "DiTTransformer2DModel": DIT,
    "FluxTransformer2DModel": FLUX,
    "HunyuanDiT2DModel": HUNYUAN_DIT,
    "PixArtTransformer2DModel": PIXART,
    "SD3Transformer2DModel": SD3,
}


def plan_of(module: nn.Module) -> ModelPlan | None:
    """The plan of a module's class or of the nearest class that it derives from; None for other modules."""
    names = (cls.__name__ for cls in type(module).__mro__)
    return next((PLANS[name] for name in names if name in PLANS), None)


def planned_models(pipe) -> dict[str, tuple[nn.Module, ModelPlan]]:
    """The pipeline's denoisers by component name, with their plans.

    Raises:
        ValueError: the pipeline has none that is known.
    """
    if not hasattr(pipe, "components"):
        raise ValueError(f"{type(pipe).__name__} is no Diffusers pipeline")
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    found = {name: (part, plan) for name, part in modules.items() if (plan := plan_of(part))}
    if found:
        return found
    denoiser = next((modules[name] for name in ("transformer", "unet", "prior") if name in modules), None)
    kind = "no transformer" if denoiser is None else type(denoiser).__name__
    advice = " U-Nets are not supported." if "UNet" in kind else ""
    raise ValueError(
        f"{type(pipe).__name__} has {kind}, for which there is no plan.{advice} Known classes:"
        f" {', '.join(PLANS)}. docs/adding_a_model.md shows how to add one"
    )
