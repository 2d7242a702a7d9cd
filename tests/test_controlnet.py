"""ControlNets under PipeFusion: synchronous steps equal serial, other steps equal the oracle, for all stage counts."""

import controlled
import diffusers
import pytest
import running
import whole
from test_pipefusion import degrees


@pytest.fixture
def path_of(folder_of, tmp_path_factory):
    root = tmp_path_factory.mktemp("controlled")

    def path(kind):
        family = controlled.KINDS[kind][0]
        return whole.save(family, root) if family in whole.WHOLE else folder_of(family, True)

    return path


def check(pool, ranks, path, kind, asked, expected):
    """Compare with ``expected``: one image for each of the requested degrees."""
    for pictures in pool.run(ranks, controlled.drawn, path, kind, asked):
        for picture, reference in zip(pictures, expected, strict=True):
            assert running.error(picture, reference) <= running.TOLERANCE


@pytest.mark.parametrize("kind", controlled.KINDS)
def test_patches_equal_the_oracle(pool, path_of, kind):
    path = path_of(kind)
    serial, two, three = (controlled.draw(path, kind, asked) for asked in (None, (2, 1), (3, 1)))
    assert min(running.error(two, serial), running.error(three, serial)) > 1e-3  # staleness has an effect
    asked = [degrees(2, 3, 4), degrees(2, 2, 1), degrees(2, 3, 1)]
    check(pool, 2, path, kind, asked, [serial, two, three])
    hybrids = [degrees(2, 2, 1, ulysses_degree=2), degrees(2, 3, 1, ring_degree=2)]
    check(pool, 4, path, kind, hybrids, [two, three])


def test_an_array_of_sigmas_says_how_many_steps_there_are(pool, path_of):
    path, kind = path_of("flux_uneven"), "flux_uneven"
    expected = controlled.draw(path, kind, (2, 1))
    check(pool, 1, path, kind, [degrees(1, 2, 1)], [expected])


def test_control_of_unknown_steps_is_refused(pool, path_of):
    for message in pool.run(1, refused, path_of("sd3")):
        assert "the call does not say how many there are" in message and "Use 0 and 1" in message


def refused(path):
    pipe = controlled.pipeline(path, "sd3")
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    parallel = running.wrap(pipe, degrees(1, 2, 1))
    with pytest.raises(ValueError) as error:
        parallel(**controlled.call_of("sd3"), control_guidance_end=0.5)
    parallel.unwrap()
    return str(error.value)
