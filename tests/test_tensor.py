"""Tensor parallelism equals serial for every class and in combinations, shards the weights, and restores them."""

import dataclasses
from unittest import mock

import diffusers
import pytest
import running
import tiny
import torch
import transformers
from torch import nn

from xfuser import xDiTParallel, xFuserArgs
from xfuser.core.distributed import get_tp_group, init_distributed_environment, initialize_model_parallel
from xfuser.core.tensor_parallel import division, structure
from xfuser.core.tensor_parallel.layers import Divided, Gathered, SpanningNorm, SpanningRMSNorm, Summed
from xfuser.methods.tensor import TensorParallel, divide, division_of
from xfuser.models.registry import PLANS, plan_of
from xfuser.testing import matrix
from xfuser.testing.loop import loop_of
from xfuser.testing.zoo import FAMILIES

PRESENT = [name for name, family in FAMILIES.items() if family.present]
CALL = {"images": 3, "num_inference_steps": 2}
PIPED = {"pipefusion_parallel_degree": 2, "num_pipeline_patch": 2, "warmup_steps": 1}
everything = mock.patch.object(structure, "SMALLEST", 1)  # shard small layers as well


def tolerance(family):
    return matrix.TOLERANCES.get(family, matrix.TOLERANCE)


def changed(family, changes):
    return dataclasses.replace(FAMILIES[family], config=FAMILIES[family].config | (changes or {}))


@everything
def drawn(family, degrees, changes=None, call=CALL):
    """Return the result, the fraction of weights held in the call, and whether all weights are restored."""
    pipe = loop_of(changed(family, changes))
    before = {name: weight.clone() for name, weight in pipe.transformer.state_dict().items()}
    kinds = [type(module) for module in pipe.transformer.modules()]
    numbers = [sorted(vars(module)) for module in pipe.transformer.modules()]
    parallel = xDiTParallel(pipe, *xFuserArgs(**degrees).create_config())
    kept = sum(weight.numel() for weight in pipe.transformer.parameters() if not weight.is_meta)
    result = parallel(changed(family, changes), **call)
    parallel.unwrap()
    after = pipe.transformer.state_dict()
    whole = [type(module) for module in pipe.transformer.modules()] == kinds
    whole &= [sorted(vars(module)) for module in pipe.transformer.modules()] == numbers
    whole &= before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    return result, kept / sum(weight.numel() for weight in pipe.transformer.parameters()), whole


def check(pool, family, ranks, degrees, changes=None, call=CALL, most=0.7):
    if not FAMILIES[family].present:
        pytest.skip("this release of Diffusers does not have it")
    expected = matrix.draw_family(changed(family, changes), None, call)
    if degrees.get("num_pipeline_patch"):
        expected = matrix.reference(family, degrees, call)
    for result, kept, whole in pool.run(ranks, drawn, family, degrees, changes, call):
        assert matrix.error(result, expected) <= tolerance(family)
        assert kept < most and whole


@pytest.mark.parametrize("family", PRESENT)
def test_two_ranks_equal_serial(pool, family):
    """Three heads over two ranks, odd lengths, three batch entries with guidance."""
    check(pool, family, 2, {"tensor_parallel_degree": 2})


@pytest.mark.parametrize("family", ["flux", "wan", "z_image", "unet"])
def test_three_ranks_equal_serial(pool, family):
    check(pool, family, 3, {"tensor_parallel_degree": 3}, most=0.4)


@pytest.mark.parametrize(
    ("family", "changes", "ranks"),
    [
        ("lumina2", {"num_kv_heads": 2, "num_attention_heads": 4, "axes_dim_rope": (2, 2, 2)}, 3),
        ("lumina2", {"num_kv_heads": 3}, 2),
        ("wan", {"image_dim": 10, "added_kv_proj_dim": 24}, 2),
        ("latte", {"activation_fn": "geglu"}, 2),
        ("ltx2", {"rope_type": "split"}, 2),
        ("sana", {"qk_norm": "rms_norm_across_heads"}, 2),
        ("sd3", {"num_attention_heads": 5, "caption_projection_dim": 40}, 4),
    ],
)
def test_other_layouts_equal_serial(pool, family, changes, ranks):
    """KV shared by several heads, images besides the text, gates, norms over all heads."""
    check(pool, family, ranks, {"tensor_parallel_degree": ranks}, changes)


PRODUCTS = {
    "cfg": {"use_cfg_parallel": True},
    "dp": {"data_parallel_degree": 2},
    "ulysses": {"ulysses_degree": 2},
    "ring": {"ring_degree": 2},
    "pipefusion": PIPED,
}


@pytest.mark.parametrize(
    ("family", "product"),
    [
        *[("flux", product) for product in PRODUCTS],
        *[("ltx", product) for product in ("ulysses", "ring", "pipefusion")],
        ("dit", "pipefusion"), ("hunyuan_dit", "pipefusion"), ("pixart", "cfg"), ("sana", "ring"), ("mochi", "ulysses"),
        ("unet", "cfg"), ("unet", "dp"),
    ],
)  # fmt: skip
def test_products_equal_serial(pool, family, product):
    steps = {"num_inference_steps": 3 if product == "pipefusion" else 2}
    check(pool, family, 4, {"tensor_parallel_degree": 2} | PRODUCTS[product], call=CALL | steps)


@pytest.mark.parametrize("method", [{"distrifusion_degree": 2}, {"naive_patch_degree": 2, "split_scheme": "col"}])
@pytest.mark.parametrize("family", ["pixart", "unet"])
def test_parts_of_a_picture_are_as_with_whole_weights(pool, family, method):
    """Inexact methods give the same result with sharded weights."""
    call = CALL | {"num_inference_steps": 3}
    expected = pool.run(2, matrix.draw, family, method, call)[0]
    for result, kept, whole in pool.run(4, drawn, family, {"tensor_parallel_degree": 2} | method, None, call):
        assert matrix.error(result, expected) <= matrix.TOLERANCE
        assert kept < 0.7 and whole


@pytest.mark.parametrize("scheme", ["col", "row"])
@pytest.mark.parametrize("family", ["flux", "wan", "sana", "unet"])
def test_other_schemes_equal_serial(pool, family, scheme):
    """Four ranks and three heads: these schemes do not split heads."""
    check(pool, family, 4, {"tensor_parallel_degree": 4, "split_scheme": scheme}, most=0.35)


FOUR = {"num_attention_heads": 4, "cross_attention_dim": 32}  # divisible, so that no shape shows the error


def headless():
    """A broken engine: attention modules keep their full number of heads."""
    with mock.patch.object(division, "_set", lambda *args: None):
        return drawn("pixart", {"tensor_parallel_degree": 2}, FOUR)[0]


def test_undivided_heads_would_be_noticed(pool):
    expected = matrix.draw_family(changed("pixart", FOUR), None, CALL)
    for result in pool.run(2, headless):
        assert matrix.error(result, expected) > 100 * matrix.TOLERANCE


LARGE = {
    "pixart": {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 8, "cross_attention_dim": 1152,
               "caption_channels": 4096, "sample_size": 64},
    "dit": {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 8},
    "sd3": {"num_attention_heads": 24, "attention_head_dim": 64, "num_layers": 8, "joint_attention_dim": 4096,
            "caption_projection_dim": 1536, "pooled_projection_dim": 2048},
    "flux": {"num_attention_heads": 8, "attention_head_dim": 128, "num_layers": 4, "num_single_layers": 8,
             "joint_attention_dim": 4096, "pooled_projection_dim": 768, "in_channels": 64},
    "flux2": {"num_attention_heads": 8, "attention_head_dim": 128, "num_layers": 4, "num_single_layers": 8,
              "joint_attention_dim": 4096, "in_channels": 128},
    "wan": {"num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 8, "ffn_dim": 8960, "text_dim": 4096,
            "freq_dim": 256},
    "ltx": {"num_attention_heads": 16, "attention_head_dim": 64, "num_layers": 8, "cross_attention_dim": 1024,
            "caption_channels": 4096},
    "hidream": {"num_attention_heads": 8, "attention_head_dim": 128, "num_layers": 4, "num_single_layers": 4,
                "caption_channels": [4096, 4096], "num_routed_experts": 4, "num_activated_experts": 2},
    "sana": {"num_attention_heads": 16, "attention_head_dim": 32, "num_layers": 8, "num_cross_attention_heads": 8,
             "cross_attention_head_dim": 64, "cross_attention_dim": 512, "caption_channels": 2304},
    "unet": {"block_out_channels": (320, 640, 1280), "layers_per_block": 2, "attention_head_dim": (5, 10, 20),
             "norm_num_groups": 32, "cross_attention_dim": 2048},
}  # fmt: skip


def meta(family, changes=None):
    with torch.device("meta"):
        return getattr(diffusers, FAMILIES[family].cls)(**FAMILIES[family].config | (changes or {}))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("family", LARGE)
def test_each_rank_keeps_its_part_of_the_weights(family, ranks):
    """Models as wide as real ones, with few layers: each rank keeps 1 / ``ranks``, plus at most a tenth of that."""
    model = meta(family, LARGE[family])
    division = division_of(model, PLANS[FAMILIES[family].cls], ranks)
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    whole = sum(shape.numel() for shape in shapes.values())
    for rank in range(ranks):
        kept = division.kept(rank)
        own = sum(
            shape.numel() * (sum(map(len, kept[name][1])) / shape[kept[name][0]] if name in kept else 1)
            for name, shape in shapes.items()
        )
        assert own <= 1.1 * whole / ranks


@everything
def loaded(family):
    """Build a model on the meta device, shard it there, and load only this rank's weights."""
    init_distributed_environment()
    initialize_model_parallel(tensor_parallel_degree=2)
    source = FAMILIES[family].build()
    weights, rank = source.state_dict(), get_tp_group().rank_in_group
    model = FAMILIES[family].build().to("meta")
    kept = divide(model, plan_of(model), get_tp_group()).kept(rank)
    for name, (dim, ranges) in kept.items():
        weights[name] = torch.cat([weights[name].narrow(dim, one.start, len(one)) for one in ranges], dim)
    assert {name: x.shape for name, x in model.state_dict().items()} == {name: x.shape for name, x in weights.items()}
    model.load_state_dict(weights, assign=True)
    for name, buffer in source.named_buffers():
        owner, _, key = name.rpartition(".")
        model.get_submodule(owner)._buffers[key] = buffer
    pipe = loop_of(FAMILIES[family])
    pipe.transformer = model
    parallel = xDiTParallel(pipe, *xFuserArgs(tensor_parallel_degree=2).create_config())
    result = parallel(FAMILIES[family], **CALL)
    restored = parallel.unwrap().transformer.state_dict()
    return result, all(torch.equal(restored[name], x) for name, x in source.state_dict().items())


@pytest.mark.parametrize("family", ["pixart", "flux", "sana"])
def test_models_divided_on_the_meta_device_need_only_what_a_rank_keeps(pool, family):
    expected = matrix.draw(family, None, CALL)
    for result, restored in pool.run(2, loaded, family):
        assert matrix.error(result, expected) <= matrix.TOLERANCE and restored


WORDS = torch.tensor([[5, 3, 9, 2, 7], [1, 2, 8, 2, 0]])
CLIP = {"vocab_size": 20, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
CLIP |= {"projection_dim": 13, "max_position_embeddings": 8, "eos_token_id": 7}
T5 = {"vocab_size": 20, "d_model": 16, "d_kv": 4, "d_ff": 23, "num_layers": 2, "num_heads": 3}
ENCODERS = {
    "t5": lambda: transformers.T5EncoderModel(transformers.T5Config(**T5)),
    "gated": lambda: transformers.T5EncoderModel(transformers.T5Config(**T5, feed_forward_proj="gated-gelu")),
    "umt5": lambda: transformers.UMT5EncoderModel(transformers.UMT5Config(**T5, feed_forward_proj="gated-gelu")),
    "clip": lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP)),
    "projecting": lambda: transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**CLIP)),
    "gemma": lambda: transformers.Gemma2Model(
        transformers.Gemma2Config(
            vocab_size=20, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8,
        )
    ),
}  # fmt: skip


def encoder(kind):
    torch.manual_seed(0)
    model = ENCODERS[kind]().eval().requires_grad_(False)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)
    return model


@torch.no_grad()
def encoded(kind, ranks):
    model = encoder(kind)
    divided = None
    if ranks:
        init_distributed_environment()
        initialize_model_parallel(tensor_parallel_degree=ranks)
        with everything:
            divided = TensorParallel([(model, None)], get_tp_group())
    kept = sum(weight.numel() for weight in model.parameters())
    outputs = model(input_ids=WORDS, attention_mask=(WORDS > 0).long(), output_hidden_states=True)
    results = [outputs.hidden_states[-2], outputs[0]]
    if ranks:
        divided.restore()
        again = model(input_ids=WORDS, attention_mask=(WORDS > 0).long())[0]
        assert torch.equal(again, encoder(kind)(input_ids=WORDS, attention_mask=(WORDS > 0).long())[0])
    return results, kept / sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("kind", ENCODERS)
def test_text_encoders_equal_serial(pool, kind):
    expected, _ = encoded(kind, None)
    for results, kept in pool.run(2, encoded, kind, 2):
        assert matrix.error(results, expected) <= matrix.TOLERANCE and kept < 0.67


@everything
def whole_pipeline(path, degrees, call):
    pipe = running.loaded(path)
    pipe(**call, generator=running.seeded())  # the first call adds attributes
    before = running.fingerprint(pipe)
    parallel = running.wrap(pipe, degrees)
    encoders = [getattr(pipe, name) for name in ("text_encoder", "text_encoder_2", "text_encoder_3")]
    divided = [any(isinstance(module, Divided) for module in one.modules()) for one in encoders]
    picture = running.array(parallel(**call, generator=running.seeded()))
    parallel.unwrap()
    return picture, divided, before == running.fingerprint(pipe)


def test_a_pipeline_with_its_text_encoders_equals_serial(pool, folder_of):
    path, call = folder_of("sd3"), tiny.call_of("sd3", 3)
    expected = running.bare(path, call)
    degrees = {"tensor_parallel_degree": 2, "tensor_parallel_text_encoder": True}
    for picture, divided, as_before in pool.run(2, whole_pipeline, path, degrees, call):
        assert running.error(picture, expected) <= running.TOLERANCE
        assert all(divided) and as_before


class Between(nn.Module):
    """Has the linears of a feed-forward, and one more, unknown parameter."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.mixing = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.eye(8))

    def forward(self, x):
        return self.fc2(self.fc1(x) @ self.mixing)


class Packed(nn.Linear):
    """Keeps its weight in its own layout, as quantised layers do."""


class Odd(nn.Module):
    """An embedding that shares its weight with a head, and unknown layers."""

    def __init__(self):
        super().__init__()
        self.words, self.between, self.head = nn.Embedding(20, 8), Between(), nn.Linear(8, 20, bias=False)
        self.head.weight = self.words.weight
        self.packed, self.mlp = Packed(8, 8), nn.Sequential(nn.Linear(8, 8), nn.GELU(), Packed(8, 8))
        self.convolution, self.grouped = nn.Conv2d(5, 7, 3), nn.Conv2d(4, 4, 3, groups=2)


def test_only_what_is_known_is_divided_in_pairs():
    with everything:
        division = structure.describe(Odd(), 3)
    kinds = {name: kind for name, (kind, _) in division.completions.items()}
    assert kinds == dict.fromkeys(("between.fc1", "between.fc2", "mlp.0", "convolution"), Gathered)
    assert set(division.kept(0)) == {f"{name}.{key}" for name in kinds for key in ("weight", "bias")}
    assert division.kept(0)["convolution.weight"] == (0, (range(3),))
    assert division.kept(2)["convolution.weight"] == (0, (range(5, 7),))


def test_gates_are_divided_in_halves():
    division = division_of(meta("latte"), None, 2)
    block = "transformer_blocks.0.ff.net"
    assert division.kept(1)[f"{block}.0.proj.weight"] == (0, (range(48, 96), range(144, 192)))
    assert division.kept(1)[f"{block}.2.weight"] == (1, (range(48, 96),))
    assert f"{block}.2.bias" not in division.kept(1)


@pytest.mark.parametrize(
    ("family", "kind", "changes"), [("wan", SpanningRMSNorm, {}), ("hidream", SpanningRMSNorm, {}), ("flux", None, {})]
)
def test_norms_over_all_heads_are_told_from_others(family, kind, changes):
    found = {kind for kind, _ in division_of(meta(family, changes), None, 2).completions.values()}
    assert found & {SpanningRMSNorm, SpanningNorm} == ({kind} if kind else set()) and Summed in found


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"split_scheme": "alternate"}, "'alternate' is unknown; known are row, col"),
        ({"use_fp8_t5_encoder": True, "tensor_parallel_text_encoder": True}, "exclude each other"),
        ({"enable_sequential_cpu_offload": True}, "use enable_model_cpu_offload with it"),
    ],
)
def test_bad_values_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        xFuserArgs(tensor_parallel_degree=2, **fields).checked(2)


def wrapped(pipe, **fields):
    """Return the error of a wrap, which must come before any process group is created."""
    with pytest.raises(ValueError) as refused:
        xDiTParallel(pipe, xFuserArgs(tensor_parallel_degree=4, **fields).checked(4)[0])
    assert not torch.distributed.is_initialized()
    return str(refused.value)


def test_fewer_heads_than_ranks_are_refused():
    message = wrapped(loop_of(FAMILIES["pixart"]))
    assert "3 heads cannot be divided over 4 ranks" in message and "split_scheme='col'" in message


def test_replaced_forwards_are_refused():
    pipe = loop_of(changed("pixart", FOUR))
    layer = pipe.transformer.transformer_blocks[0].attn1.to_out[0]
    layer.forward = layer.forward
    assert "attn1.to_out.0 of PixArtTransformer2DModel has a forward that is not its class's" in wrapped(pipe)


def test_pipelines_without_text_encoders_are_told_so():
    assert "has no text encoder" in wrapped(loop_of(FAMILIES["flux"]), tensor_parallel_text_encoder=True)


def wrapped_twice():
    pipe = loop_of(FAMILIES["pixart"])
    configs = xFuserArgs(tensor_parallel_degree=2).create_config()
    first = xDiTParallel(pipe, *configs)
    with pytest.raises(ValueError, match="is divided over ranks already: call unwrap"):
        xDiTParallel(pipe, *configs)
    first.unwrap()
    xDiTParallel(pipe, *configs).unwrap()
    return True


def test_a_divided_pipeline_cannot_be_wrapped_again(pool):
    assert all(pool.run(2, wrapped_twice))


def gradients():
    pipe = loop_of(FAMILIES["pixart"])
    pipe.transformer.requires_grad_(True)
    xDiTParallel(pipe, *xFuserArgs(tensor_parallel_degree=2).create_config())
    inputs = FAMILIES["pixart"].conditions(pipe.transformer, 2, torch.randn)
    output = pipe.transformer(torch.randn(2, 4, 10, 6), timestep=torch.tensor([5, 5]), **inputs, return_dict=False)[0]
    with pytest.raises(ValueError, match="for inference"):
        output.sum().backward()
    return True


def test_gradients_are_refused(pool):
    assert all(pool.run(2, gradients))
