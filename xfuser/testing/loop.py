"""A pipeline of only a transformer and a scheduler: the common part of all denoising loops."""

import copy
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch.utils._pytree import tree_map_only

from xfuser.models.registry import plan_of
from xfuser.testing.zoo import Family


class DenoisingLoop(DiffusionPipeline):
    """Generates latents with a tiny transformer and classifier-free guidance."""

    def __init__(self, transformer: torch.nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(
        self, family: Family, images: int = 1, guidance: str = "batched", num_inference_steps: int = 3, seed: int = 0
    ) -> list[torch.Tensor]:
        """Return the final latents, ``[images, ...]``, and the other outputs of the last forward.

        For a transformer of sound and video, the latter are the final latents of the sound. Noise and conditions are
        sampled on the CPU and moved to the transformer's device and dtype.

        Args:
            guidance: ``"batched"``: both branches in one call; ``"sequential"``: in two calls; ``"none"``.
        """
        generator = torch.Generator().manual_seed(seed)
        weight = next(self.transformer.parameters())

        def placed(x: torch.Tensor) -> torch.Tensor:
            return x.to(weight.device, weight.dtype if x.is_floating_point() else x.dtype)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        latents = placed(draw(images, *family.latents))
        rows = 2 * images if guidance == "batched" else images
        calls = [family.conditions(self.transformer, rows, draw) for _ in range(1 + (guidance == "sequential"))]
        calls = tree_map_only(torch.Tensor, placed, calls)
        plan = plan_of(self.transformer)
        of_sound = copy.deepcopy(self.scheduler) if plan and plan.sound else None
        for scheduler in filter(None, (of_sound, self.scheduler)):
            scheduler.set_timesteps(num_inference_steps, device=weight.device)
        with self.progress_bar(total=num_inference_steps) as bar:
            for t in self.scheduler.timesteps:
                outputs = [
                    self._forward(family, latents.repeat_interleave(rows // images, 0), t, call) for call in calls
                ]
                noise, *others = outputs[-1]
                if guidance == "batched":
                    noise = _guided(*noise.unflatten(0, (images, 2)).unbind(1))
                elif guidance == "sequential":
                    noise = _guided(outputs[0][0], noise)
                latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
                if of_sound:
                    others = [of_sound.step(others[0], t, calls[0][plan.sound], return_dict=False)[0]]
                    calls = [call | {plan.sound: others[0]} for call in calls]
                bar.update()
        return [latents, *others]

    def _forward(
        self, family: Family, latents: torch.Tensor, t: torch.Tensor, call: dict[str, Any]
    ) -> list[torch.Tensor]:
        plan = plan_of(self.transformer)
        given = list(latents) if plan and plan.latents in plan.row_lists else latents
        name = plan.latents if plan else "hidden_states"
        time = family.timestep(t.expand(len(latents)))
        output = self.transformer(**{name: given, family.time: time}, **call, return_dict=False)
        noise, *others = output if isinstance(output, tuple) else (output,)
        noise = torch.stack(noise) if isinstance(noise, list) else noise
        return [noise.narrow(1, 0, latents.shape[1]), *others]  # after the noise, some classes return variances


def _guided(without: torch.Tensor, conditioned: torch.Tensor) -> torch.Tensor:
    return without + 3.0 * (conditioned - without)


def loop_of(family: Family) -> DenoisingLoop:
    """Return a loop over the family's tiny transformer."""
    return DenoisingLoop(family.build(), FlowMatchEulerDiscreteScheduler())
