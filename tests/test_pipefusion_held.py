"""PipeFusion when the scheduler steps only some frames: the first frame is an image, as in image-to-video."""

from dataclasses import replace

import pytest
import running
import torch
from diffusers.utils.torch_utils import randn_tensor

from xfuser.models.registry import plan_of
from xfuser.testing import matrix, oracle
from xfuser.testing.loop import DenoisingLoop, loop_of
from xfuser.testing.zoo import FAMILIES

VIDEOS = {
    "hunyuan_video": replace(FAMILIES["hunyuan_video"], latents=(4, 5, 10, 6)),  # the image has its own timestep
    "kandinsky5": FAMILIES["kandinsky5"],
    "sana_video": FAMILIES["sana_video"],  # sums over patches, known only after the first step
    "wan": replace(FAMILIES["wan"], latents=(4, 5, 10, 6)),
}
TWO_STAGES = {"pipefusion_parallel_degree": 2, "num_pipeline_patch": 3}
RUN = {
    "hunyuan_video": (4, TWO_STAGES | {"ulysses_degree": 2}),
    "kandinsky5": (2, TWO_STAGES | {"num_pipeline_patch": 2}),
    "sana_video": (2, TWO_STAGES),
    "wan": (2, TWO_STAGES),
}


class Holding(DenoisingLoop):
    """Keeps the first frame, or the one at ``place``, and adds noise to it in each iteration."""

    @torch.no_grad()
    def __call__(self, family, seed=0, place=0):
        generator, dim = torch.Generator().manual_seed(seed), plan_of(self.transformer).frames

        def draw(*shape):
            return torch.randn(*shape, generator=generator)

        latents, given = draw(1, *family.latents), family.conditions(self.transformer, 1, draw)
        count, first = latents.shape[dim] - 1, latents.select(dim, place).unsqueeze(dim)
        rest = latents.narrow(dim, 1 + place, count)
        self.scheduler.set_timesteps(4)
        for t in self.scheduler.timesteps:
            held = first + 0.3 * randn_tensor(first.shape, generator=generator)
            noise = self._forward(family, torch.cat([rest, held] if place else [held, rest], dim), t, given)[0]
            rest = self.scheduler.step(noise.narrow(dim, 1 + place, count), t, rest, return_dict=False)[0]
        return [rest]


def loop(name):
    plain = loop_of(VIDEOS[name])
    return Holding(plain.transformer, plain.scheduler)


def drawn(name, degrees):
    parallel = running.wrap(loop(name), degrees)
    result = parallel(VIDEOS[name])
    running.unwrap(parallel)
    return result


@pytest.mark.parametrize("name", RUN)
def test_a_first_frame_that_does_not_step(pool, name):
    (ranks, degrees), serial, pipe = RUN[name], drawn(name, None), loop(name)
    with oracle.displaced(pipe, degrees["num_pipeline_patch"], 2 if name == "sana_video" else 1):
        expected = pipe(VIDEOS[name])
    assert matrix.error(expected, serial) >= 1e-3  # staleness has an effect
    for warmup, reference in ((1, expected), (4, serial)):
        for result in pool.run(ranks, drawn, name, degrees | {"warmup_steps": warmup}):
            assert matrix.error(result, reference) <= matrix.TOLERANCES.get(name, matrix.TOLERANCE)


def refused():
    with pytest.raises(ValueError) as error:
        running.wrap(loop("wan"), TWO_STAGES)(VIDEOS["wan"], place=-1)
    return str(error.value)


def test_another_frame_that_does_not_step_is_refused(pool):
    for message in pool.run(2, refused):
        assert "patches are rows of what the scheduler steps" in message
