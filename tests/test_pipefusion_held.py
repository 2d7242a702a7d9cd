"""PipeFusion where the scheduler steps a part of the frames: the first one is a picture, as in image-to-video."""

from dataclasses import replace

import pytest
import running
import torch

from xfuser.models.registry import plan_of
from xfuser.testing import matrix, oracle
from xfuser.testing.loop import DenoisingLoop, loop_of
from xfuser.testing.zoo import FAMILIES

VIDEOS = {
    "hunyuan_video": replace(FAMILIES["hunyuan_video"], latents=(4, 5, 10, 6)),  # a time of its own for the picture
    "kandinsky5": FAMILIES["kandinsky5"],
    "sana_video": FAMILIES["sana_video"],
    "wan": replace(FAMILIES["wan"], latents=(4, 5, 10, 6)),
}
TWO_STAGES = {"pipefusion_parallel_degree": 2, "num_pipeline_patch": 3}
RUN = {
    "hunyuan_video": (4, TWO_STAGES | {"ulysses_degree": 2}),
    "kandinsky5": (2, TWO_STAGES | {"num_pipeline_patch": 2}),
    "wan": (2, TWO_STAGES),
}


class HoldingFirst(DenoisingLoop):
    """Keeps the first frame as it was drawn."""

    @torch.no_grad()
    def __call__(self, family, seed=0):
        generator, dim = torch.Generator().manual_seed(seed), plan_of(self.transformer).frames

        def draw(*shape):
            return torch.randn(*shape, generator=generator)

        latents, given = draw(1, *family.latents), family.conditions(self.transformer, 1, draw)
        self.scheduler.set_timesteps(4)
        for t in self.scheduler.timesteps:
            noise = self._forward(family, latents, t, given)[0]
            (first, rest), count = latents.split([1, latents.shape[dim] - 1], dim), latents.shape[dim] - 1
            rest = self.scheduler.step(noise.narrow(dim, 1, count), t, rest, return_dict=False)[0]
            latents = torch.cat([first, rest], dim)
        return [latents]


def loop(name):
    plain = loop_of(VIDEOS[name])
    return HoldingFirst(plain.transformer, plain.scheduler)


def drawn(name, degrees):
    parallel = running.wrap(loop(name), degrees)
    result = parallel(VIDEOS[name])
    running.unwrap(parallel)
    return result


@pytest.mark.parametrize("name", RUN)
def test_a_first_frame_that_does_not_step(pool, name):
    (ranks, degrees), serial, pipe = RUN[name], drawn(name, None), loop(name)
    with oracle.displaced(pipe, degrees["num_pipeline_patch"], 1):
        expected = pipe(VIDEOS[name])
    assert matrix.error(expected, serial) >= 1e-3  # staleness shows
    for warmup, reference in ((1, expected), (4, serial)):
        for result in pool.run(ranks, drawn, name, degrees | {"warmup_steps": warmup}):
            assert matrix.error(result, reference) <= matrix.TOLERANCES.get(name, matrix.TOLERANCE)


def refused(name, degrees):
    with pytest.raises(ValueError) as error:
        drawn(name, degrees)
    return str(error.value)


def test_sums_over_patches_that_are_not_known_in_the_first_step_are_refused(pool):
    for message in pool.run(2, refused, "sana_video", TWO_STAGES):
        assert "patches are rows of what the scheduler steps" in message
