"""Video pipelines over U-Nets, and more image pipelines, equal serial under the methods that support them."""

import more_unets
import pytest
import running
import torch.distributed as dist

from xfuser import xDiTParallel, xFuserArgs

CFG, DP, TENSOR = {"use_cfg_parallel": True}, {"data_parallel_degree": 2}, {"tensor_parallel_degree": 2}
WAITING = {"distrifusion_degree": 2, "distrifusion_mode": "full_sync"}
CASES = [
    ("animatediff", 2, CFG, 1),
    ("animatediff", 2, DP, 3),
    ("animatediff", 2, TENSOR, 1),
    ("animatediff_xl", 4, CFG | DP, 3),
    ("animatediff_controlnet", 2, CFG, 1),
    ("svd", 2, CFG, 1),
    ("svd", 2, DP, 3),
    ("svd", 2, TENSOR, 1),
    ("text_to_video", 2, CFG, 1),
    ("text_to_video", 2, TENSOR, 1),
    ("i2vgen", 4, CFG | DP, 2),
    ("pix2pix", 2, CFG, 1),
    ("pix2pix", 4, CFG | DP, 2),
    ("pix2pix", 2, WAITING, 1),
    ("inpaint", 2, DP, 3),
    ("inpaint", 2, WAITING, 1),
    ("t2i_adapter", 2, CFG, 1),
    ("t2i_adapter", 2, WAITING, 1),
    ("controlnet", 4, CFG | TENSOR, 1),
    ("kandinsky", 2, CFG, 1),
    ("kandinsky", 2, WAITING, 1),
    ("kolors", 2, CFG, 1),
    ("kolors", 4, DP | WAITING, 3),
    ("kolors_pag", 4, CFG | DP, 2),
    ("dreamlite", 2, CFG, 1),
    ("dreamlite", 4, DP | WAITING, 3),
    ("dreamlite_edit", 2, CFG, 1),
    ("dreamlite_edit", 2, WAITING, 1),
    ("dreamlite_edit", 2, TENSOR, 1),
]


@pytest.mark.parametrize(("kind", "ranks", "degrees", "images"), CASES)
def test_equals_serial(pool, kind, ranks, degrees, images):
    expected = more_unets.draw(kind, None, images)
    for result in pool.run(ranks, more_unets.draw, kind, degrees, images):
        assert running.error(result, expected) <= running.TOLERANCE


@pytest.mark.parametrize("kind", ["animatediff", "svd", "text_to_video", "i2vgen"])
@pytest.mark.parametrize(
    ("degrees", "method"),
    [(WAITING, "DistriFusion"), ({"ring_degree": 2}, "sequence"), ({"pipefusion_parallel_degree": 2}, "PipeFusion")],
)
def test_methods_over_rows_and_tokens_are_refused_before_any_group(kind, degrees, method):
    engine_config, _ = xFuserArgs(**degrees).checked()
    with pytest.raises(ValueError, match=f"{method}.* support.*: .*Use CFG, data parallelism or tensor parallelism"):
        xDiTParallel(more_unets.built(kind), engine_config)
    assert not dist.is_initialized()
