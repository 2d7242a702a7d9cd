"""What the methods send, compute and hold: counted, not timed."""

import pytest
import running
import tiny
import torch

from xfuser.bench.meters import LiveMemory, traffic

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
    return (ranks - 1) * TOKENS // ranks * 2 * 2 * 8 * BYTES  # 2 x 2 pixels of 8 channels a token


@pytest.mark.parametrize("ranks", [2, 4])
def test_ulysses_sends_four_shares_a_layer(pool, ranks):
    expected = 4 * TOKENS * HIDDEN * LAYERS * (ranks - 1) // ranks**2 * BYTES
    for counted in pool.run(ranks, sent, {"ulysses_degree": ranks}, 1):
        assert counted == {"all_to_all_single": expected, "all_gather": output_bytes(ranks)}


@pytest.mark.parametrize("ranks", [2, 4])
def test_ring_sends_keys_and_values_around(pool, ranks):
    expected = 2 * TOKENS * HIDDEN * LAYERS * (ranks - 1) // ranks * BYTES
    for counted in pool.run(ranks, sent, {"ring_degree": ranks}, 1):
        assert counted == {"batch_isend_irecv": expected, "all_gather": output_bytes(ranks)}


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
    """Forwards of the first block, and rows that each had."""
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
