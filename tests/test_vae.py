"""The parallel VAE equals the VAE of one process: every class, encode and decode, bands of any height."""

from contextlib import nullcontext
from functools import cache

import diffusers
import pytest
import running
import tiny
import torch
import torch.distributed as dist
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn

from xfuser.core.distributed import get_world_group, init_distributed_environment
from xfuser.core.meters import LiveMemory, traffic
from xfuser.methods.data import split_decode
from xfuser.vae import parallelize_vae
from xfuser.vae.bands import Bands
from xfuser.vae.engines import PROVEN, parallel_vae
from xfuser.vae.parallelize import OnBands, compression

SHAPES = {  # shapes of latents
    "AutoencoderKL": (2, 4, 7, 5),
    "AutoencoderKL without quant": (1, 4, 6, 3),
    "AutoencoderKLFlux2": (1, 4, 6, 4),
    "AutoencoderTiny": (1, 4, 6, 5),
    "AutoencoderKLWan": (1, 4, 2, 6, 5),
    "AutoencoderKLQwenImage": (1, 4, 1, 6, 5),
    "AutoencoderKLCogVideoX": (1, 4, 2, 6, 5),
    "AutoencoderKLHunyuanVideo": (1, 4, 2, 6, 5),
    "AutoencoderKLLTXVideo": (1, 8, 2, 6, 5),
    "AutoencoderKLMochi": (1, 4, 2, 6, 5),
    "AutoencoderKLAllegro": (1, 4, 2, 8, 6),
    "AutoencoderDC": (1, 4, 6, 4),
}
WITHOUT_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}
MORE_SHAPES = {
    "AsymmetricAutoencoderKL": (1, 4, 7, 5),
    "AutoencoderKLHunyuanImage": (1, 4, 7, 5),
    "AutoencoderKLHunyuanImageRefiner": (1, 4, 2, 7, 5),
    "AutoencoderKLHunyuanVideo15": (1, 4, 2, 7, 5),
    "AutoencoderKLKVAE": (1, 4, 7, 5),
    "AutoencoderKLKVAEVideo": (1, 4, 2, 7, 5),
    "AutoencoderKLLTX2Video": (1, 8, 2, 5, 6),
    "AutoencoderKLMagvit": (1, 4, 2, 6, 5),
    "AutoencoderKLQwenImage21": (1, 4, 1, 6, 5),
    "VQModel": (1, 3, 7, 5),
}

FRAMES = {"AutoencoderKLQwenImage": (1,), "AutoencoderKLQwenImage21": (1,), "AutoencoderKLAllegro": (8,)}


def make(name, dtype=torch.float32):
    torch.manual_seed(0)
    kind, *without = name.split(" without ")
    vae = tiny.coder(kind, **WITHOUT_QUANT if without else {}).eval().to(dtype)
    if name == "AutoencoderKLAllegro":  # supports only tiles: two of them, one below the other
        vae.enable_tiling()
        vae.kernel, vae.stride = (8, 48, 48), (4, 16, 16)
    return vae


def both_ways(name, shape=None, parallel=None, dtype=torch.float32, prepare=None):
    """Return the results of a VAE that decodes latents, and encodes an image."""
    vae, shape = make(name, dtype), shape or (SHAPES | MORE_SHAPES)[name]
    if prepare:
        getattr(vae, prepare)()
    generator = running.seeded()
    latents = torch.randn(shape, generator=generator).to(dtype)
    factor = compression(vae)
    frames = () if len(shape) == 4 else FRAMES.get(name, (9,))
    picture = torch.randn(shape[0], 3, *frames, shape[-2] * factor, shape[-1] * factor, generator=generator).to(dtype)
    undo = parallelize_vae(vae, **parallel) if parallel is not None else None
    with torch.no_grad():
        decoded, encoded = vae.decode(latents, return_dict=False)[0], vae.encode(picture, return_dict=False)[0]
    if undo:
        undo()
        assert not any("forward" in vars(coder) for coder in (vae.encoder, vae.decoder))
    return decoded.float().numpy(), getattr(encoded, "parameters", encoded).float().numpy()


serial = cache(both_ways)


def check(pool, ranks, name, shape=None, **parallel):
    expected = serial(name, shape)
    for result in pool.run(ranks, both_ways, name, shape, parallel):
        for ours, reference in zip(result, expected, strict=True):
            assert running.error(ours, reference) <= running.TOLERANCE


@pytest.mark.parametrize("name", SHAPES)
def test_every_class(pool, name):
    check(pool, 2, name)
    check(pool, 3, name, split="width")
    check(pool, 4, name, split="height", chunk_rows=2)


@pytest.mark.parametrize("name", MORE_SHAPES)
def test_more_classes(pool, name):
    check(pool, 4, name, split="height", chunk_rows=2)


NOISY = {"decoder_inject_noise": (True,) * 5, "timestep_conditioning": True}


def of_noise(parallel):
    """Return the result of a decoder that samples noise, and random numbers sampled after it."""
    torch.manual_seed(0)
    vae = tiny.coder("AutoencoderKLLTXVideo", **NOISY).eval()
    for name, weight in vae.named_parameters():
        if "per_channel_scale" in name:
            torch.nn.init.normal_(weight)
    undo = parallelize_vae(vae, **parallel) if parallel is not None else None
    with torch.no_grad():
        decoded = vae.decode(torch.randn(2, 8, 2, 7, 5), torch.tensor([0.05, 0.05]), return_dict=False)[0]
    if undo:
        undo()
    return decoded.numpy(), torch.randn(3).tolist()


@pytest.mark.parametrize("parallel", [{}, {"split": "width"}, {"chunk_rows": 2}])
def test_noise_within_a_decoder_is_that_of_one_device(pool, parallel):
    expected, drawn_behind = of_noise(None)
    for ranks in (2, 3):
        for decoded, behind in pool.run(ranks, of_noise, parallel):
            assert running.error(decoded, expected) <= running.TOLERANCE and behind == drawn_behind


def consistency_decoder():
    down = {"block_out_channels": (32, 32), "layers_per_block": 1, "norm_num_groups": 4}
    unet = {
        f"decoder_{name}": value
        for name, value in {
            "block_out_channels": (32, 32), "layers_per_block": 1, "norm_num_groups": 4, "num_train_timesteps": 1024,
            "down_block_types": ("ResnetDownsampleBlock2D",) * 2, "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
        }.items()
    }  # fmt: skip
    encoder = {f"encoder_{name}": value for name, value in down.items()}
    kinds = {"encoder_down_block_types": ("DownEncoderBlock2D",) * 2}
    return diffusers.ConsistencyDecoderVAE(**unet, **encoder, **kinds, latent_channels=4), {}


def temporal_decoder():
    channels = {"block_out_channels": (32, 32), "layers_per_block": 1, "latent_channels": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2}
    return diffusers.AutoencoderKLTemporalDecoder(**channels, **blocks), {"num_frames": 3}


def plain_decoder():
    return make("AutoencoderKL"), {}


def batch_of(build, ranks):
    """Decode six latents over a group of ranks or on one; return the images, and how many this rank decoded at once."""
    torch.manual_seed(0)
    vae, more = build()
    vae.eval()
    latents, rows = torch.randn(6, 4, 4, 4), []
    coder = vae.decoder if hasattr(vae, "decoder") else vae.decoder_unet
    coder.register_forward_pre_hook(lambda module, args, kwargs: rows.append(len([*args, *kwargs.values()][0])),
                                    with_kwargs=True)  # fmt: skip
    torch.manual_seed(7)
    if ranks > 1:
        init_distributed_environment()
    with torch.no_grad(), split_decode(vae, get_world_group()) if ranks > 1 else nullcontext():
        decoded = vae.decode(latents, return_dict=False, **more)[0]
    return decoded.numpy(), max(rows)


@pytest.mark.parametrize(("build", "rows"), [(plain_decoder, 3), (consistency_decoder, 6), (temporal_decoder, 6)])
def test_a_batch_is_split_where_rows_are_independent(pool, build, rows):
    expected, _ = batch_of(build, 1)
    for decoded, most in pool.run(2, batch_of, build, 2):
        assert most == rows and running.error(decoded, expected) <= running.TOLERANCE


class Drawing(torch.nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        return x + self.draw(x)


DRAWS = {
    "normal_": lambda x: torch.empty_like(x).normal_(),
    "uniform": lambda x: torch.empty_like(x).uniform_(),
    "bernoulli": lambda x: torch.bernoulli(torch.full_like(x, 0.5)),
    "bernoulli_ of dropout": lambda x: torch.nn.functional.dropout(x, 0.5, training=True),
    "randn of shape": lambda x: torch.randn(2, 77)[:, :1, None, None],
}


def drawing(name):
    vae = make("AutoencoderKL")
    vae.decoder = Drawing(DRAWS[name])
    undo = parallelize_vae(vae)
    try:
        with torch.no_grad(), pytest.raises(ValueError) as refused:
            vae.decode(torch.randn(2, 4, 6, 4))
        return str(refused.value)
    finally:
        undo()


@pytest.mark.parametrize("name", DRAWS)
def test_other_ways_to_draw_are_refused_by_name(pool, name):
    for message in pool.run(2, drawing, name):
        assert name.split()[0] in message and "use_parallel_vae" in message


COINCIDENCES = {  # bands on two ranks with equal width, height and channels
    "AutoencoderDC": ((1, 4, 4, 8), {"decoder_block_out_channels": (8, 8)}),
    "AutoencoderDC taller": ((1, 4, 8, 4), {"decoder_block_out_channels": (4, 8)}),
    "AutoencoderKLLTXVideo": ((1, 8, 2, 8, 16), {}),
    "AutoencoderKLLTXVideo taller": ((1, 8, 2, 16, 8), {}),
}


def by_coincidence(name, parallel):
    shape, changes = COINCIDENCES[name]
    torch.manual_seed(0)
    vae = tiny.coder(name.split()[0], **changes).eval()
    undo = parallelize_vae(vae) if parallel else None
    with torch.no_grad():
        decoded = vae.decode(torch.randn(shape), return_dict=False)[0]
    if undo:
        undo()
    return decoded.numpy()


@pytest.mark.parametrize("name", COINCIDENCES)
def test_sizes_that_coincide_are_not_taken_for_others(pool, name):
    for decoded in pool.run(2, by_coincidence, name, True):
        assert running.error(decoded, by_coincidence(name, False)) <= running.TOLERANCE


def test_proven_classes_are_tested():
    assert {name.split()[0] for name in SHAPES | MORE_SHAPES} == PROVEN


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(1, 4, 4, 3), (3, 4, 5, 9), (1, 4, 1, 1), (2, 4, 3, 2)])
def test_bands_of_one_row_and_fewer_rows_than_ranks(pool, ranks, shape):
    check(pool, ranks, "AutoencoderKL", shape, chunk_rows=1)


@pytest.mark.parametrize("prepare", ["enable_slicing", "enable_tiling"])
def test_with_slicing_and_tiling(pool, prepare):
    """Each tile is decoded in bands, equal to tiles on one device."""
    shape = (2, 4, 70, 3) if prepare == "enable_tiling" else (2, 4, 7, 5)
    expected = both_ways("AutoencoderKL", shape, None, torch.float32, prepare)
    for result in pool.run(2, both_ways, "AutoencoderKL", shape, {}, torch.float32, prepare):
        for ours, reference in zip(result, expected, strict=True):
            assert running.error(ours, reference) <= running.TOLERANCE


@pytest.mark.parametrize("name", ["AutoencoderKL", "AutoencoderKLWan"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_half_precision_stays_within_its_rounding(pool, name, dtype, chunk_rows):
    exact, rounded = serial(name, None), serial(name, None, None, dtype)
    for result in pool.run(2, both_ways, name, None, {"chunk_rows": chunk_rows}, dtype):
        for ours, on_one, reference in zip(result, rounded, exact, strict=True):
            assert running.error(ours, reference) <= 2 * running.error(on_one, reference)


def convolved(cases):
    """Return the largest error over many convolution geometries, each on this rank's band."""
    worst = 0.0
    for seed, (spatial, rows, kernel, stride, padding, dilation, (mode, top, bottom), dim, chunk) in enumerate(cases):
        generator = torch.Generator().manual_seed(seed)
        kind = nn.Conv2d if spatial == 2 else nn.Conv3d
        torch.manual_seed(seed)
        options = {"stride": stride, "padding": padding, "dilation": dilation, "padding_mode": mode}
        conv = kind(2, 3, kernel, **options)
        pads = (top, bottom, 0, 0) if dim == -1 else (0, 0, top, bottom)
        shape = [1, 2, *([4 * kernel] if spatial == 3 else []), rows, rows + 1]
        x = torch.randn(shape, generator=generator)
        ranks, rank = dist.get_world_size(), dist.get_rank()
        length = x.shape[dim]
        cuts = sorted(torch.randint(1, length, (ranks - 1,), generator=generator).tolist())
        sizes = [b - a for a, b in zip([0, *cuts], [*cuts, length], strict=True)]
        if 0 in sizes:
            continue
        with torch.no_grad():
            try:
                expected = conv(nn.functional.pad(x, pads))
            except RuntimeError:
                continue  # the kernel is larger than its input
            bands = Bands(dim, sizes, x.shape[-3 - dim], dist.group.WORLD)
            try:
                with OnBands(bands, chunk):
                    part = conv(nn.functional.pad(x.split(sizes, dim)[rank], pads))
            except ValueError as error:
                assert "too few for" in str(error) or "padded in two ways" in str(error)
                continue
            whole = bands.gather(part, bands.sizes(part.shape[dim], "the output"), dim)
        worst = max(worst, running.error(whole.numpy(), expected.numpy()))
    return worst


GEOMETRY = st.tuples(
    st.sampled_from([2, 3]),  # dimensions
    st.integers(4, 13),  # rows
    st.integers(1, 5),  # kernel
    st.integers(1, 3),  # stride
    st.integers(0, 3),  # padding
    st.integers(1, 2),  # dilation
    st.one_of(  # padding mode, and rows of zeros that a separate pad adds
        st.tuples(st.just("zeros"), st.integers(0, 2), st.integers(0, 2)), st.just(("replicate", 0, 0))
    ),
    st.sampled_from([-1, -2]),
    st.sampled_from([None, 1, 2]),
)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cases=st.lists(GEOMETRY, min_size=20, max_size=40), ranks=st.sampled_from([2, 3, 4]))
def test_convolutions_of_any_geometry(pool, cases, ranks):
    for worst in pool.run(ranks, convolved, cases):
        assert worst <= running.TOLERANCE


def wan_conv():
    """Return a causal convolution that gets the previous frames."""
    conv = WanCausalConv3d(4, 4, 3, padding=1)
    return lambda x: conv(x[:, :, 2:], x[:, :, :2])


def at_each_pixel(norm):
    return lambda x: norm(x.movedim(1, -1)).movedim(-1, 1)


LEAVES = {  # builder of a function of a map, with random weights, and the map's shape
    "Conv2d with groups": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=2), (2, 4, 9, 6)),
    "Conv2d with reflection": (lambda: nn.Conv2d(4, 4, 5, padding=2, padding_mode="reflect"), (2, 4, 9, 6)),
    "Conv2d with replication": (lambda: nn.Conv2d(4, 4, 5, padding=2, padding_mode="replicate"), (2, 4, 9, 6)),
    "Conv2d padded same": (lambda: nn.Conv2d(4, 4, 3, padding="same", dilation=2), (2, 4, 9, 6)),
    "Conv3d": (lambda: nn.Conv3d(4, 4, 3, padding=1, groups=2, padding_mode="replicate"), (2, 4, 3, 9, 6)),
    "causal Conv3d with a cache": (wan_conv, (2, 4, 4, 9, 6)),
    "rows padded, then frames": (
        lambda: nn.Sequential(nn.ConstantPad3d((1, 1, 1, 1, 0, 0), 0.0), nn.ConstantPad3d((0, 0, 0, 0, 2, 0), 0.0),
                              nn.Conv3d(4, 4, 3)),
        (2, 4, 3, 9, 6),
    ),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (2, 4, 9, 6)),
    "GroupNorm of frames": (lambda: nn.GroupNorm(2, 4), (2, 4, 3, 9, 6)),
    "GroupNorm twice": (lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.GroupNorm(2, 4)), (2, 4, 9, 6)),
    "RMSNorm": (lambda: at_each_pixel(nn.RMSNorm(4)), (2, 4, 9, 6)),
    "LayerNorm": (lambda: at_each_pixel(nn.LayerNorm(4)), (2, 4, 9, 6)),
    "downsampler": (lambda: Downsample2D(4, use_conv=True, padding=0), (2, 4, 9, 6)),
    "upsampler": (lambda: Upsample2D(4, use_conv=True), (2, 4, 9, 6)),
    "pixel shuffle": (lambda: nn.Sequential(nn.PixelShuffle(2), nn.Conv2d(1, 2, 3, padding=1)), (2, 4, 9, 6)),
    "pixel unshuffle": (
        lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.PixelUnshuffle(2), nn.Conv2d(16, 2, 3, padding=1)),
        (2, 4, 9, 6),
    ),
    "average pooling": (lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.AvgPool2d(2)), (2, 4, 9, 6)),
    "attention": (lambda: Attention(4, heads=1, dim_head=4, norm_num_groups=2, residual_connection=True), (2, 4, 9, 6)),
    "two maps' maximum": (lambda: lambda x: torch.max(x, 1 - x) + torch.minimum(x, 2 * x), (2, 4, 9, 6)),
    "a change in place": (lambda: lambda x: (nn.functional.silu(x) + x).mul_(2) + x, (2, 4, 9, 6)),
}  # fmt: skip


def leaf_errors(name, offset=0.0):
    """Return the largest error of a layer on bands of one to six rows, with different numbers of rows at a time."""
    make_leaf, shape = LEAVES[name]
    torch.manual_seed(0)
    leaf = make_leaf()
    x = torch.randn(shape, generator=running.seeded()) + offset
    errors = []
    for dim, sizes in ((-2, [2, 1, 6]), (-1, [2, 1, 3])):
        for chunk_rows in (None, 1, 4):
            with torch.no_grad():
                expected = leaf(x.clone())
                bands = Bands(dim, sizes, x.shape[-3 - dim], dist.group.WORLD)
                with OnBands(bands, chunk_rows):
                    part = leaf(x.split(sizes, dim)[dist.get_rank()].clone())
                whole = bands.gather(part, bands.sizes(part.shape[dim], "the output"), dim)
            errors.append(running.error(whole.numpy(), expected.numpy()))
    return max(errors)


@pytest.mark.parametrize("name", LEAVES)
def test_leaves_on_uneven_bands(pool, name):
    assert max(pool.run(3, leaf_errors, name)) <= running.TOLERANCE


@pytest.mark.parametrize("offset", [1e3, -1e4])
def test_group_norm_is_stable_far_from_zero(pool, offset):
    """The error is within the rounding of the values, which is 6e-8 of the offset."""
    assert max(pool.run(3, leaf_errors, "GroupNorm", offset)) <= 3e-7 * abs(offset)


def in_another_layout(chunk_rows):
    """Return the errors with weights, latents and images in channels-last layout, and with strided ones."""
    vae, (decoded, encoded) = make("AutoencoderKL"), both_ways("AutoencoderKL")
    generator = running.seeded()
    latents = torch.randn(2, 4, 7, 5, generator=generator)
    picture = torch.randn(2, 3, 28, 20, generator=generator)
    vae.to(memory_format=torch.channels_last)
    parallelize_vae(vae, chunk_rows=chunk_rows)
    strided = latents.repeat_interleave(2, dim=-1)[..., ::2]
    with torch.no_grad():
        results = [vae.decode(x, return_dict=False)[0] for x in (latents, strided)]
        results.append(vae.decode(latents.contiguous(memory_format=torch.channels_last), return_dict=False)[0])
        moments = vae.encode(picture.contiguous(memory_format=torch.channels_last), return_dict=False)[0].parameters
    return max(running.error(x.numpy(), decoded) for x in results), running.error(moments.numpy(), encoded)


@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_layouts_in_memory(pool, chunk_rows):
    for errors in pool.run(2, in_another_layout, chunk_rows):
        assert max(errors) <= running.TOLERANCE


def of_mixed_types(parallel):
    vae = make("AutoencoderKL", torch.bfloat16)
    if parallel is not None:
        parallelize_vae(vae, **parallel)
    with pytest.raises(RuntimeError) as error, torch.no_grad():
        vae.decode(torch.randn(1, 4, 8, 4))
    return str(error.value)


@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_mixed_types_fail_as_they_do_on_one_device(pool, chunk_rows):
    assert set(pool.run(2, of_mixed_types, {"chunk_rows": chunk_rows})) == {of_mixed_types(None)}


class Mixing(nn.Module):
    """A coder with an operation that mixes rows and is not supported."""

    def __init__(self, operation):
        super().__init__()
        self.conv, self.operation = nn.Conv2d(4, 4, 3, padding=1), operation

    def forward(self, x):
        return self.operation(self.conv(x))


OPERATIONS = {
    "softmax": lambda x: torch.softmax(x, dim=-2),
    "roll": lambda x: torch.roll(x, 1, dims=-2),
    "flip": lambda x: x.flip(-2),
    "bilinear": lambda x: nn.functional.interpolate(x, scale_factor=2.0, mode="bilinear"),
    "adaptive_avg_pool2d": lambda x: nn.functional.adaptive_avg_pool2d(x, 1),
    "silu behind a padding": lambda x: nn.functional.silu(nn.functional.pad(x, (0, 0, 1, 0))),
    "max_pool2d": lambda x: nn.functional.max_pool2d(x, 3, 1, 1),
    "avg_pool2d of uneven bands": lambda x: nn.functional.avg_pool2d(x[:, :, :3], 2),
    "mean": lambda x: x - x.mean(dim=(-1, -2), keepdim=True),
    "max": lambda x: x.max(dim=-2).values,
    "var": lambda x: x.var(False),
    "norm": lambda x: x.norm(1, -2),
    "sum over rows with channels last": lambda x: x.permute(0, 2, 3, 1).sum(1),
    "mean of all tokens": lambda x: x.flatten(2).mean(-1),
    "layer_norm": lambda x: nn.functional.layer_norm(x, x.shape[-2:]),
    "different values": lambda x: nn.functional.pad(nn.functional.pad(x, (0, 0, 1, 1), value=0.5), (1, 1)),
    "mode='circular'": lambda x: nn.functional.pad(x, (1, 1, 1, 1), mode="circular"),
    "cumsum": lambda x: x.cumsum(-2),
    "conv_transpose2d": lambda x: nn.functional.conv_transpose2d(x, torch.ones(4, 4, 2, 2)),
}


def refused(name):
    vae = make("AutoencoderKL")
    vae.decoder = Mixing(OPERATIONS[name])
    parallelize_vae(vae)
    with pytest.raises(ValueError) as error, torch.no_grad():
        vae.decode(torch.randn(1, 4, 8, 6, generator=running.seeded()))
    return str(error.value)


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_mixes_rows_unseen_is_refused_by_name(pool, name):
    for message in pool.run(2, refused, name):
        assert message.startswith("parallel VAE: ") and name.split()[0] in message


PIPELINES = {
    "alone": (2, {}),
    "dp2": (4, {"data_parallel_degree": 2, "ring_degree": 2}),
    "cfg2-ulysses2": (4, {"use_cfg_parallel": True, "ulysses_degree": 2}),
    "pipefusion": (2, {"pipefusion_parallel_degree": 2, "warmup_steps": 2}),
}


@pytest.mark.parametrize("method", PIPELINES)
@pytest.mark.parametrize("family", ["sd3", "pixart_sigma"])
def test_whole_pipelines(pool, folder_of, family, method):
    ranks, degrees = PIPELINES[method]
    call = tiny.call_of(family, 3 if method == "dp2" else 1, num_inference_steps=2)
    expected = running.bare(folder_of(family), call)
    degrees = degrees or {"ulysses_degree": 2}
    for result in pool.run(ranks, running.wrapped, folder_of(family), degrees | {"use_parallel_vae": True}, call):
        assert running.error(result, expected) <= running.TOLERANCE


def test_image_to_image_encodes_in_bands(pool, folder_of):
    expected = running.image_to_image(folder_of("sd3"), None)
    degrees = {"ring_degree": 2, "use_parallel_vae": True, "vae_chunk_rows": 3}
    for result in pool.run(2, running.image_to_image, folder_of("sd3"), degrees):
        assert running.error(result, expected) <= running.TOLERANCE


def by_distvae(name):
    """Return the errors of the other engine's decode and encode, and whether the VAE is restored."""
    vae, expected = make(name), both_ways(name)
    before = (vae.encoder, vae.decoder)
    latents = torch.randn(SHAPES[name], generator=running.seeded())
    with torch.no_grad(), parallel_vae(vae, dist.group.WORLD, "distvae"):
        decoded = vae.decode(latents, return_dict=False)[0]
    with torch.no_grad():
        after = vae.decode(latents, return_dict=False)[0]
    assert before == (vae.encoder, vae.decoder)
    return running.error(decoded.numpy(), expected[0]), running.error(after.numpy(), expected[0])


def test_the_other_engine(pool):
    for during, after in pool.run(2, by_distvae, "AutoencoderKL"):
        assert during <= running.TOLERANCE and after == 0


def unknown_to_distvae():
    vae = make("AutoencoderTiny")
    with pytest.raises(ValueError) as error, parallel_vae(vae, dist.group.WORLD, "distvae"):
        pass
    return str(error.value)


def test_the_other_engine_refuses_classes_that_it_does_not_know(pool):
    for message in pool.run(2, unknown_to_distvae):
        assert "AutoencoderTiny" in message


def halo_bytes(kernel, dilation, stride):
    conv = nn.Conv2d(3, 2, kernel, stride=stride, dilation=dilation, padding=dilation * (kernel // 2))
    x = torch.randn(1, 3, 16, 5)
    bands = Bands(-2, [8, 8], 5, dist.group.WORLD)
    with torch.no_grad(), traffic() as sent, OnBands(bands, None):
        conv(x.split(8, -2)[dist.get_rank()])
    return sent.total // (3 * 5 * 4)


@pytest.mark.parametrize(("kernel", "dilation", "stride"), [(1, 1, 1), (3, 1, 1), (5, 2, 1), (3, 1, 2)])
def test_a_convolution_borrows_the_rows_that_it_reaches(pool, kernel, dilation, stride):
    reach = dilation * (kernel - 1) // 2
    below_lends = max(0, reach - (stride - 1))  # with a stride of 2, the last centre is not the band's last row
    assert pool.run(2, halo_bytes, kernel, dilation, stride) == [reach, below_lends]


def peak_of_decode(parallel, chunk_rows=None, height=32):
    vae = make("AutoencoderKL")
    latents = torch.randn(1, 4, height, 16, generator=running.seeded())
    context = parallel_vae(vae, dist.group.WORLD, chunk_rows=chunk_rows) if parallel else nullcontext()
    with torch.no_grad(), context, LiveMemory() as memory:
        vae.decode(latents)
    return memory.peak


@pytest.mark.parametrize("ranks", [2, 4])
def test_feature_maps_shrink_with_the_ranks(pool, ranks):
    serial = pool.run(1, peak_of_decode, False)[0]
    for peak in pool.run(ranks, peak_of_decode, True):
        assert peak <= serial * (1 / ranks + 0.15)


def test_rows_at_a_time_need_a_third_of_the_memory(pool):
    serial = pool.run(1, peak_of_decode, False, None, 96)[0]
    assert pool.run(1, peak_of_decode, True, 2, 96)[0] <= serial / 3
