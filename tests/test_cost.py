"""Communication, computation and memory of the methods: counted, not timed."""

import pytest
import running
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from xfuser.core.meters import LiveMemory, traffic

TOKENS, HIDDEN, LAYERS, BYTES = 16, tiny.HEADS * tiny.HEAD_DIM, 2, 4


def forward_arguments(tokens_high=8, tokens_wide=8, batch=1):
    generator = running.seeded()
    return {
        "hidden_states": torch.randn(batch, 4, tokens_high, tokens_wide, generator=generator),
        "encoder_hidden_states": torch.randn(batch, 5, tiny.TEXT, generator=generator),
        "timestep": torch.full((batch,), 500),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }


def sent(degrees, batch):
    torch.manual_seed(0)
    pipe = tiny.build("pixart_sigma")
    pipe.transformer = tiny.pixart_transformer(num_attention_heads=4, attention_head_dim=6, cross_attention_dim=24)
    with running.wrap(pipe, degrees).active(), torch.no_grad():
        arguments = forward_arguments(batch=batch)
        with traffic() as meter:
            pipe.transformer(**arguments)
    return meter.sent


def output_bytes(ranks):
    return (ranks - 1) * TOKENS // ranks * 2 * 2 * 8 * BYTES  # 2 x 2 pixels of 8 channels per token


@pytest.mark.parametrize("ranks", [2, 4])
def test_ulysses_sends_four_shares_a_layer(pool, ranks):
    expected = 4 * TOKENS * HIDDEN * LAYERS * (ranks - 1) // ranks**2 * BYTES
    for counted in pool.run(ranks, sent, {"ulysses_degree": ranks}, 1):
        assert counted == {"all_to_all_single": expected, "all_gather": output_bytes(ranks)}


@pytest.mark.parametrize("ranks", [2, 4])
def test_ring_sends_keys_and_values_around(pool, ranks):
    expected = 2 * TOKENS * HIDDEN * LAYERS * (ranks - 1) // ranks * BYTES
    for counted in pool.run(ranks, sent, {"ring_degree": ranks}, 1):
        assert counted == {"send": expected, "all_gather": output_bytes(ranks)}


@pytest.mark.parametrize("degrees", [{"use_cfg_parallel": True}, {"data_parallel_degree": 2}])
def test_batch_methods_send_their_output_alone(pool, degrees):
    for counted in pool.run(2, sent, degrees, 2):
        assert counted == {"all_gather": TOKENS * 2 * 2 * 8 * BYTES}


def peak(degrees, tokens_wide):
    torch.manual_seed(0)
    pipe = tiny.build("pixart_sigma")
    pipe.transformer = tiny.pixart_transformer(num_attention_heads=4, attention_head_dim=32, cross_attention_dim=128)
    arguments = forward_arguments(64, tokens_wide)
    with running.wrap(pipe, degrees).active(), torch.no_grad(), LiveMemory() as memory:
        pipe.transformer(**arguments)
    return memory.peak


@pytest.mark.parametrize("kind", ["ulysses_degree", "ring_degree"])
def test_activations_shrink_with_the_degree(pool, kind):
    serial = pool.run(1, peak, {}, 64)[0]
    two = max(pool.run(2, peak, {kind: 2}, 64))
    four = max(pool.run(4, peak, {kind: 4}, 64))
    assert two <= 0.7 * serial and four <= 0.45 * serial


def block_calls(path, degrees, call):
    """Return the batch entries of each forward of the first block."""
    pipe = running.loaded(path)
    rows = []
    block = pipe.transformer.transformer_blocks[0]
    handle = block.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append((kwargs.get("hidden_states", *args[:1])).shape[0]), with_kwargs=True
    )
    try:
        running.array(running.wrap(pipe, degrees)(**call, generator=running.seeded()))
    finally:
        handle.remove()
    return rows


def test_sequential_guidance_computes_one_branch_a_rank(pool, folder_of):
    call = tiny.call_of("flux", 1, num_inference_steps=5, true_cfg_scale=2.0, negative_prompt="a cat")
    for rows in pool.run(2, block_calls, folder_of("flux"), {"use_cfg_parallel": True}, call):
        assert rows == [1] * (2 + 4)  # both branches in step 0, then one


def test_batched_guidance_and_data_parallelism_halve_the_rows(pool, folder_of):
    call = tiny.call_of("sd3", 3, num_inference_steps=2)
    for rows in pool.run(2, block_calls, folder_of("sd3"), {"use_cfg_parallel": True}, call):
        assert rows == [3, 3]
    results = pool.run(4, block_calls, folder_of("sd3"), {"use_cfg_parallel": True, "data_parallel_degree": 2}, call)
    assert sorted(results) == [[1, 1], [1, 1], [2, 2], [2, 2]]


def test_one_rank_adds_nothing_to_the_forward(folder_of, pool):
    assert pool.run(1, touches_nothing, folder_of("sd3")) == [True]


def touches_nothing(path):
    pipe = running.loaded(path)
    before = running.fingerprint(pipe)
    with running.wrap(pipe, {}).active():
        return running.fingerprint(pipe) == before


def pipefusion(patches, stages, **others):
    return {"pipefusion_parallel_degree": stages, "num_pipeline_patch": patches, **others}


def wider(family, blocks=16, width=64):
    """Return a tiny pipeline with a transformer that is large relative to its embeddings."""
    torch.manual_seed(0)
    pipe = tiny.FAMILIES[family]()
    sizes = {"num_attention_heads": 4, "attention_head_dim": width // 4, "num_layers": blocks}
    if family == "pixart_sigma":
        pipe.transformer = tiny.pixart_transformer(**sizes, cross_attention_dim=width, sample_size=16)
    elif family == "sd3":
        pipe.transformer = tiny.sd3_transformer(**sizes, caption_projection_dim=width)
    else:
        sizes |= {"num_layers": 2, "num_single_layers": blocks - 2, "axes_dims_rope": (4, 6, 6)}
        pipe.transformer = tiny.flux_transformer(**sizes)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wide_call(family, steps, text=32):
    """256 image tokens and 12 % as many text tokens, without guidance."""
    call = tiny.call_of(family, num_inference_steps=steps, guidance_scale=1.0, height=256, width=256)
    call |= {"prompt_embeds": torch.randn(1, text, tiny.TEXT, generator=running.seeded()), "output_type": "latent"}
    del call["prompt"], call["max_sequence_length"]
    if family == "pixart_sigma":
        return call | {"prompt_attention_mask": torch.ones(1, text), "negative_prompt": None}
    return call | {"pooled_prompt_embeds": torch.randn(1, 16 if family == "sd3" else 8, generator=running.seeded())}


def operations(family, degrees, steps):
    pipe = running.wrap(wider(family), degrees)
    with FlopCounterMode(display=False) as counter:
        pipe(**wide_call(family, steps))
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["pixart_sigma", "sd3", "flux"])
def test_pipefusion_computes_text_once_a_step(pool, family):
    def step(degrees):
        return pool.run(1, operations, family, degrees, 3)[0] - pool.run(1, operations, family, degrees, 2)[0]

    assert step(pipefusion(4, 1)) <= 1.02 * step({})


def sent_by_pipeline(degrees, steps):
    pipe = running.wrap(wider("pixart_sigma"), degrees)
    with traffic() as meter:
        pipe(**wide_call("pixart_sigma", steps))
    parameters = sum(weight.numel() for weight in pipe.transformer.parameters())
    return meter.sent, parameters


@pytest.mark.parametrize("stages", [2, 4])
def test_pipefusion_sends_activations_once_a_hop(pool, stages):
    tokens, hidden, blocks, steps = 256, 64, 16, 6
    results = [sent for sent, _ in pool.run(stages, sent_by_pipeline, pipefusion(4, stages), steps)]
    hop, latents = tokens * hidden * BYTES, tokens * 2 * 2 * 4 * BYTES
    # The first step is synchronous, and all ranks get the last one's result, so only the other steps send latents.
    assert [sent.get("send") for sent in results] == [hop * steps] * (stages - 1) + [latents * (steps - 2)]
    by_ulysses = [sent for sent, _ in pool.run(stages, sent_by_pipeline, {"ulysses_degree": stages}, steps)]
    assert all(sent["send"] * blocks <= by_ulysses[0]["all_to_all_single"] * stages / 2 for sent in results)


@pytest.mark.parametrize("stages", [2, 4])
def test_a_stage_has_the_parameters_of_its_own_blocks(pool, stages):
    (_, whole), *_ = pool.run(1, sent_by_pipeline, {}, 1)
    for _, parameters in pool.run(stages, sent_by_pipeline, pipefusion(2, stages), 1):
        assert parameters <= whole * (1 / stages + 0.05)


def peak_of_steps(degrees, steps):
    pipe = running.wrap(wider("flux"), degrees)
    call = wide_call("flux", steps)
    with LiveMemory() as memory:
        pipe(**call)
    return memory.peak


def test_pipefusion_holds_no_more_after_more_steps(pool):
    few = pool.run(2, peak_of_steps, pipefusion(4, 2), 4)
    many = pool.run(2, peak_of_steps, pipefusion(4, 2), 12)
    assert all(late <= 1.01 * early for early, late in zip(few, many, strict=True))


def held_ahead_of_decoding(degrees):
    pipe, held = running.wrap(wider("flux"), degrees), []
    decode = pipe.vae.decode
    with LiveMemory() as memory:
        pipe.vae.decode = lambda *args, **kwargs: (held.append(memory.live), decode(*args, **kwargs))[1]
        pipe(**wide_call("flux", 3) | {"output_type": "pt"})
    return held


def test_pipefusion_holds_no_keys_and_values_when_the_vae_decodes(pool):
    (serial,) = pool.run(1, held_ahead_of_decoding, {})[0]
    keys_and_values = 8 * 2 * (256 + 32) * 64 * BYTES  # of a stage's blocks; some latents are also kept
    for (held,) in pool.run(2, held_ahead_of_decoding, pipefusion(4, 2)):
        assert held <= serial + keys_and_values / 2
