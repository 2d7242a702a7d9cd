"""Models that are changed while they are wrapped: adapters (LoRA) and fused projections.

What is wrapped computes what the changed model computes on one rank, and unwrap() gives everything back, or refuses
with what to do before anything is changed.
"""

import pytest
import running
import tiny
import torch
from diffusers import DiffusionPipeline

FSDP = {"ulysses_degree": 2, "fully_shard_degree": 2}
TENSOR = {"tensor_parallel_degree": 2}


def adapter(pipe, rank=2):
    """A LoRA for the attention of a pipeline's transformer."""
    numbers, weights = torch.Generator().manual_seed(3), {}
    for name, layer in pipe.transformer.named_modules():
        if name.endswith(("attn.to_q", "attn.to_v")):
            weights[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, layer.in_features, generator=numbers)
            weights[f"transformer.{name}.lora_B.weight"] = torch.randn(layer.out_features, rank, generator=numbers)
    return weights


def fresh(path):
    pipe = DiffusionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, call):
    return running.array(pipe(**call, generator=running.seeded()))


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in state.items())


CHANGES = {
    "lora": (lambda pipe, lora: pipe.load_lora_weights(lora), lambda pipe: pipe.unload_lora_weights()),
    "fused": (
        lambda pipe, lora: pipe.transformer.fuse_qkv_projections(),
        lambda pipe: pipe.transformer.unfuse_qkv_projections(),
    ),
}


def changed(path, degrees, call, change, only=None):
    """Pictures of the changed and the restored model, what unwrap() said, and whether all weights are there again."""
    pipe = fresh(path)
    lora, before = adapter(pipe), {name: x.clone() for name, x in pipe.transformer.state_dict().items()}
    do, undo = CHANGES[change]
    wrapped = running.wrap(pipe, degrees)
    alone = only is None or torch.distributed.get_rank() == only
    if alone:
        do(wrapped, lora)
    picture = None if only is not None or degrees is None else drawn(wrapped, call)
    told = ""
    if degrees is None:
        return drawn(pipe, call)
    try:
        wrapped.unwrap()
    except ValueError as error:
        told = str(error)
        if picture is not None:  # nothing was changed by the refusal
            assert running.error(drawn(wrapped, call), picture) <= running.TOLERANCE
        if alone:
            undo(wrapped)
        wrapped.unwrap()
    return picture, told, same(before, pipe.transformer.state_dict()), drawn(pipe, call)


@pytest.mark.parametrize(
    ("degrees", "change", "refused"),
    [
        (FSDP, "lora", "has got 'transformer_blocks.0.attn.to_q.base_layer.weight'"),
        (TENSOR, "fused", "has got 'transformer_blocks.0.attn.to_qkv'"),
    ],
)
def test_unwrap_refuses_a_changed_model_and_gives_it_back_when_that_is_undone(
    pool, folder_of, degrees, change, refused
):
    path, call = folder_of("flux"), tiny.call_of("flux", 1)
    expected, bare = changed(path, None, call, change), running.bare(path, call)
    for picture, told, whole, after in pool.run(2, changed, path, degrees, call, change):
        assert running.error(picture, expected) <= running.TOLERANCE
        assert refused in told and "unload_lora_weights()" in told
        assert whole and running.error(after, bare) <= running.TOLERANCE


@pytest.mark.parametrize(("degrees", "change"), [(FSDP, "lora"), (TENSOR, "fused")])
def test_all_ranks_refuse_what_one_has_changed(pool, folder_of, degrees, change):
    path, call = folder_of("flux"), tiny.call_of("flux", 1)
    for _, told, whole, _ in pool.run(2, changed, path, degrees, call, change, 1):
        assert "has got" in told and whole


def loads_late(path, call):
    """What a tensor-parallel pipeline says to adapters, through each way in, and the picture and weights behind it."""
    pipe = fresh(path)
    lora, before = adapter(pipe), {name: x.clone() for name, x in pipe.transformer.state_dict().items()}
    wrapped = running.wrap(pipe, TENSOR)
    told = []
    for load in (wrapped.load_lora_weights, pipe.load_lora_weights, pipe.transformer.load_lora_adapter):
        with pytest.raises(ValueError) as refused:
            load(dict(lora))
        told.append(str(refused.value))
    picture = drawn(wrapped, call)
    wrapped.unwrap()
    whole = same(before, pipe.transformer.state_dict())
    pipe.load_lora_weights(lora)
    return told, picture, whole, drawn(pipe, call)


def test_tensor_parallel_models_refuse_adapters_with_what_works(pool, folder_of):
    path, call = folder_of("flux"), tiny.call_of("flux", 1)
    bare, adapted = running.bare(path, call), changed(path, None, call, "lora")
    for told, picture, whole, after in pool.run(2, loads_late, path, call):
        assert all("is divided by tensor parallelism" in one and "before the wrap" in one for one in told)
        assert running.error(picture, bare) <= running.TOLERANCE and whole
        assert running.error(after, adapted) <= running.TOLERANCE


def fuses_late(path, call):
    """What a pipeline in shares says to methods that fuse weights, and the picture and weights behind it."""
    pipe = fresh(path)
    before = {name: x.clone() for name, x in pipe.transformer.state_dict().items()}
    wrapped = running.wrap(pipe, FSDP)
    wrapped.load_lora_weights(adapter(fresh(path)))
    told = []
    for fuse in (wrapped.transformer.fuse_qkv_projections, wrapped.fuse_lora):
        with pytest.raises(ValueError) as refused:
            fuse()
        told.append(str(refused.value))
    picture = drawn(wrapped, call)
    wrapped.unload_lora_weights()
    wrapped.unwrap()
    return told, picture, same(before, pipe.transformer.state_dict())


def test_models_in_shares_refuse_to_fuse_weights(pool, folder_of):
    path, call = folder_of("flux"), tiny.call_of("flux", 1)
    adapted = changed(path, None, call, "lora")
    for told, picture, whole in pool.run(2, fuses_late, path, call):
        assert all("before the wrap" in one for one in told)
        assert running.error(picture, adapted) <= running.TOLERANCE and whole


def loads_early(path, degrees, call):
    """Adapted before the wrap; pictures with and without the adapter, and whether unwrap() gave all back."""
    pipe = fresh(path)
    pipe.load_lora_weights(adapter(pipe))
    wrapped = running.wrap(pipe, degrees)
    adapted = drawn(wrapped, call)
    if degrees == TENSOR:
        wrapped.unload_lora_weights()
    plain = drawn(wrapped, call)
    wrapped.unwrap()
    return adapted, plain, drawn(pipe, call)


@pytest.mark.parametrize("degrees", [TENSOR, FSDP])
def test_adapters_that_are_there_before_the_wrap_are_divided(pool, folder_of, degrees):
    """Tensor-parallel models may lose them while they are wrapped, too."""
    path, call = folder_of("flux"), tiny.call_of("flux", 1)
    bare, expected = running.bare(path, call), changed(path, None, call, "lora")
    for adapted, plain, after in pool.run(2, loads_early, path, degrees, call):
        assert running.error(adapted, expected) <= running.TOLERANCE
        unloaded = bare if degrees == TENSOR else expected
        assert running.error(plain, unloaded) <= running.TOLERANCE
        assert running.error(after, unloaded) <= running.TOLERANCE
