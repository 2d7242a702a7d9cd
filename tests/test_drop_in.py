"""Process groups, attention over shards and tensor parallelism, as models with their own forward call them."""

import inspect
import subprocess
import sys

import clients
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from xfuser import xFuserArgs
from xfuser.compat import sharded
from xfuser.core import distributed
from xfuser.core.distributed import (
    get_cfg_group,
    get_runtime_state,
    get_sequence_parallel_rank,
    get_sequence_parallel_world_size,
    get_sp_group,
    get_world_group,
    init_distributed_environment,
    initialize_model_parallel,
    initialize_runtime_state,
)
from xfuser.core.distributed.utils import RankGenerator
from xfuser.core.long_ctx_attention import AttnType, xFuserLongContextAttention
from xfuser.core.long_ctx_attention.ring.ring_flash_attn import xdit_ring_flash_attn_func
from xfuser.logger import init_logger
from xfuser.model_executor.layers.usp import USP, _ft_c_input_all_to_all, _ft_c_output_all_to_all

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
PLACES = {  # ranks and degrees
    "one": (1, {}),
    "ulysses2": (2, {"ulysses_degree": 2}),
    "ring2": (2, {"ring_degree": 2}),
    "ulysses4": (4, {"ulysses_degree": 4}),
    "ring4": (4, {"ring_degree": 4}),
    "both": (4, {"ulysses_degree": 2, "ring_degree": 2}),
}
everywhere = pytest.mark.parametrize("place", PLACES)


def start(**degrees):
    """Initialise as a client does: its process group exists (the pool's), and ours is created from it."""
    init_distributed_environment(rank=dist.get_rank(), world_size=dist.get_world_size())
    initialize_model_parallel(**degrees)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain(q, k, v, causal=False, scale=None):
    """Attention of ``[B, S, H, D]`` tensors on one device."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=gqa).transpose(1, 2)


def error(a, b):
    assert a.shape == b.shape, (a.shape, b.shape)
    return ((a.float() - b.float()).abs().max() / b.abs().max().clamp(min=1e-6)).item() if a.numel() else 0.0


# Attention ---------------------------------------------------------------------------------------------------------

CASES = [  # tokens of each rank, query heads, key heads, joint tokens, strategy, dtype, causal
    ((5, 5, 5, 5), 4, 4, 0, "none", torch.float32, False),
    ((5, 5, 6, 5), 4, 4, 0, "none", torch.float32, False),  # rank 0 has as many as before, but not all ranks do
    ((5, 3, 0, 7), 6, 2, 0, "none", torch.float32, True),
    ((3, 6, 2, 1), 3, 3, 4, "front", torch.float32, False),
    ((0, 2, 2, 5), 4, 1, 7, "rear", torch.float32, False),
    ((4, 4, 4, 4), 5, 5, 1, "rear", torch.bfloat16, False),
    ((4, 3, 4, 4), 4, 2, 3, "front", torch.float16, False),
    ((2, 2, 2, 2), 4, 4, 0, "rear", torch.float32, False),  # no joint tensors, but a strategy
]


def parts_of(lengths, heads, kv_heads, text):
    """Return queries, keys and values of all ranks' tokens, and the joint ones."""
    shapes = [(2, sum(lengths), h, 8) for h in (heads, kv_heads, kv_heads)]
    joint = [(2, text, h, 8) for h in (heads, kv_heads, kv_heads)] if text else []
    return [drawn(*shape, seed=i) for i, shape in enumerate(shapes)], [
        drawn(*shape, seed=9 + i) for i, shape in enumerate(joint)
    ]


def expected_of(lengths, whole, joint, strategy, causal, scale, rank):
    """Return plain attention for this rank's tokens and the joint ones."""
    if not joint:
        return plain(*whole, causal, scale).split(lengths, dim=1)[rank]
    together = [torch.cat([a, b], dim=1) for a, b in zip(whole, joint, strict=True)]
    *shares, text = plain(*together, scale=scale).split([*lengths, joint[0].shape[1]], dim=1)
    return torch.cat([text, shares[rank]] if strategy == "front" else [shares[rank], text], dim=1)


def attend_everywhere(degrees):
    """Return the largest error of the layer and of USP for each case."""
    start(**degrees)
    rank, ranks = get_sequence_parallel_rank(), get_sequence_parallel_world_size()
    layer = xFuserLongContextAttention()
    worst = []
    for lengths, heads, kv_heads, text, strategy, dtype, causal in CASES:
        lengths = list(lengths[:ranks])
        whole, joint = parts_of(lengths, heads, kv_heads, text)
        expected = expected_of(lengths, whole, joint, strategy, causal, None, rank)
        q, k, v = (x.split(lengths, dim=1)[rank].to(dtype) for x in whole)
        joint = [x.to(dtype) for x in joint] or [None] * 3
        names = ("joint_tensor_query", "joint_tensor_key", "joint_tensor_value")
        keywords = dict(zip(names, joint, strict=True)) | {"joint_strategy": strategy, "causal": causal}
        out = layer(None, q, k, v, **keywords)
        assert out.dtype == dtype and out.is_contiguous()
        heads_first = [x if x is None else x.transpose(1, 2) for x in (q, k, v, *joint)]
        same = USP(*heads_first[:3], 0.0, causal, *heads_first[3:], None if strategy == "none" else strategy)
        worst.append((error(out, expected), error(same.transpose(1, 2), expected)))
    return worst


@everywhere
def test_attention_over_shares_is_plain_attention(pool, place):
    ranks, degrees = PLACES[place]
    for worst in pool.run(ranks, attend_everywhere, degrees):
        for (*_, dtype, _), errors in zip(CASES, worst, strict=True):
            assert max(errors) <= TOLERANCE[dtype], (errors, dtype)


def all_call_forms(degrees):
    start(**degrees)
    q, k, v = (drawn(1, 4, 4, 8, seed=get_sequence_parallel_rank() * 3 + i) for i in range(3))
    layer = xFuserLongContextAttention(
        scatter_idx=2,
        gather_idx=1,
        ring_impl_type="zigzag",
        use_pack_qkv=True,
        use_kv_cache=True,
        use_sync=True,
        attn_type=AttnType.FA,
        attn_processor=None,
    )
    assert isinstance(layer, nn.Module)
    everything = layer(
        nn.Identity(),
        query=q,
        key=k,
        value=v,
        joint_tensor_query=None,
        joint_tensor_key=None,
        joint_tensor_value=None,
        dropout_p=0.0,
        softmax_scale=0.2,
        causal=False,
        window_size=(-1, -1),
        alibi_slopes=None,
        deterministic=True,
        return_attn_probs=False,
        joint_strategy="none",
    )
    scaled = xFuserLongContextAttention(attn_type=AttnType.TORCH_MATH)(
        attn=None, query=q, key=k, value=v, softmax_scale=0.2
    )
    several = [
        xFuserLongContextAttention()(None, q, k, v),
        xFuserLongContextAttention(attn_type=None)(None, query=q, key=k, value=v, window_size=[-1, -1]),
        xFuserLongContextAttention()(None, q.clone().requires_grad_(), k, v),  # without torch.no_grad()
        xFuserLongContextAttention(2, 1, "basic", False, False)(None, q, key=k, value=v, causal=False),
    ]
    same = all(torch.equal(several[0], other) for other in several)
    with torch.autocast(q.device.type, torch.bfloat16):  # casts inputs, as scaled_dot_product_attention does
        half = layer(None, q, k, v.bfloat16())
    same &= half.dtype == torch.bfloat16 and error(half, several[0]) <= TOLERANCE[torch.bfloat16]
    whole = [get_sp_group().all_gather(x, dim=1) for x in (q, k, v)]
    expected = plain(*whole, scale=0.2).chunk(get_sequence_parallel_world_size(), dim=1)[get_sequence_parallel_rank()]
    return same, error(everything, expected), error(scaled, expected)


@pytest.mark.parametrize("place", ["ulysses2", "ring2"])
def test_every_form_of_call(pool, place):
    ranks, degrees = PLACES[place]
    for same, *errors in pool.run(ranks, all_call_forms, degrees):
        assert same and max(errors) <= 1e-5


def test_signatures():
    assert list(inspect.signature(xFuserLongContextAttention).parameters) == [
        *("scatter_idx", "gather_idx", "ring_impl_type", "use_pack_qkv", "use_kv_cache", "use_sync", "attn_type"),
        "attn_processor",
    ]
    forward = inspect.signature(xFuserLongContextAttention.forward).parameters
    assert list(forward)[:5] == ["self", "attn", "query", "key", "value"]
    assert {name: one.default for name, one in forward.items() if one.kind is one.KEYWORD_ONLY} == {
        "joint_tensor_query": None,
        "joint_tensor_key": None,
        "joint_tensor_value": None,
        "dropout_p": 0.0,
        "softmax_scale": None,
        "causal": False,
        "window_size": (-1, -1),
        "alibi_slopes": None,
        "deterministic": False,
        "return_attn_probs": False,
        "joint_strategy": "none",
    }
    import xfuser.core.long_ctx_attention.hybrid as hybrid

    assert hybrid.xFuserLongContextAttention is xFuserLongContextAttention


def test_absent_kernels_are_replaced_and_told_once(caplog):
    sharded._warn_once.cache_clear()
    with caplog.at_level("WARNING", logger="xfuser"):
        for kind in (AttnType.FA, AttnType.FA, "fa", AttnType.SAGE_FP8, AttnType.TORCH_FLASH, None):
            assert sharded.backend_for(kind) in ("auto", "flash", "flash_attn")
    told = [record.message for record in caplog.records]
    assert len(told) == len(set(told)) and any("attn_type='sage_fp8'" in one for one in told)
    with pytest.raises(ValueError, match=r"attn_type='fast' is unknown; known are .*AttnType\.FA"):
        sharded.backend_for("fast")


def ring_function(degrees):
    """Call only the ring, between the all-to-alls of Ulysses, as hand-written forwards do."""
    start(**degrees)
    sp = get_sp_group()
    lengths = [6] * sp.world_size
    whole, joint = parts_of(lengths, 4, 4, 3)
    q, k, v = (x.split(lengths, dim=1)[sp.rank_in_group] for x in whole)
    text = [x.chunk(sp.ulysses_world_size, dim=2)[sp.ulysses_rank] for x in joint]
    gathered = [_ft_c_input_all_to_all(x.transpose(1, 2)) for x in (q, k, v)]
    assert error(_ft_c_output_all_to_all(gathered[0]), q.transpose(1, 2)) == 0
    q, k, v = (x.transpose(1, 2) for x in gathered)
    errors = []
    for causal in (False, True):
        out = xdit_ring_flash_attn_func(q, k, v, 0.0, None, causal, group=sp.ring_group, attn_type=AttnType.FA)
        out = _ft_c_output_all_to_all(out.transpose(1, 2)).transpose(1, 2)
        errors.append(error(out, plain(*whole, causal).split(lengths, dim=1)[sp.rank_in_group]))
    out, lse, _ = xdit_ring_flash_attn_func(
        torch.cat([q, text[0]], dim=1),
        k,
        v,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=True,
        group=sp.ring_group,
        joint_tensor_key=text[1],
        joint_tensor_value=text[2],
        joint_strategy="rear",
    )
    together = [torch.cat([a, b], dim=1) for a, b in zip(whole, joint, strict=True)]
    mine = [x.chunk(sp.ulysses_world_size, dim=2)[sp.ulysses_rank] for x in together]
    errors.append(error(out[:, -3:], plain(*mine)[:, -3:]))
    scores = mine[0].transpose(1, 2) @ mine[1].permute(0, 2, 3, 1) * 8**-0.5
    errors.append(error(lse[..., -3:], scores.logsumexp(-1)[..., -3:]))
    return errors


@everywhere
def test_ring_function_between_all_to_alls(pool, place):
    ranks, degrees = PLACES[place]
    for errors in pool.run(ranks, ring_function, degrees):
        assert max(errors) <= 1e-5


def refused(calls):
    """Return the message of each call, which must raise a ValueError."""
    messages = []
    for call in calls:
        with pytest.raises(ValueError) as caught:
            call()
        messages.append(str(caught.value))
    return messages


def refusals():
    start(ulysses_degree=2)
    rank = dist.get_rank()
    layer, x, text = xFuserLongContextAttention(), drawn(1, 4, 4, 8), drawn(1, 3, 4, 8)
    joint = {"joint_tensor_query": text, "joint_tensor_key": text, "joint_tensor_value": text}
    front = joint | {"joint_strategy": "front"}
    other = drawn(1, 3 + rank, 4, 8)
    return refused(
        [
            lambda: layer(None, x, x, x, **joint),
            lambda: layer(None, x, x, x, joint_tensor_query=text, joint_strategy="rear"),
            lambda: layer(None, x, x, x, **joint, joint_strategy="middle"),
            lambda: layer(None, x[0], x[0], x[0]),
            lambda: layer(None, x, x[:, :, :3], x[:, :, :3]),
            lambda: layer(None, x, x[:, :2], x[:, :2]),
            lambda: layer(None, x, x.double(), x),
            lambda: layer(None, x, x, x, **front | {"joint_tensor_key": text[:, :, :2]}),
            lambda: layer(None, x, x, x, **front, causal=True),
            lambda: layer(None, x, x, x, window_size=(8, 8)),
            lambda: layer(None, x, x, x, dropout_p=0.1),
            lambda: layer(None, x, x, x, alibi_slopes=torch.ones(4)),
            lambda: layer(None, x, x, x, return_attn_probs=True),
            lambda: xFuserLongContextAttention(ring_impl_type="zigzag")(None, x, x, x, causal=True),
            lambda: xFuserLongContextAttention(ring_impl_type="spiral"),
            lambda: xFuserLongContextAttention(scatter_idx=1, gather_idx=2),
            lambda: layer(None, x.clone().requires_grad_(), x, x).sum().backward(),
            lambda: layer(None, x, x, x, **dict.fromkeys(joint, other), joint_strategy="rear"),
            lambda: _ft_c_input_all_to_all(x.transpose(1, 2)[:, :3]),
            lambda: _ft_c_input_all_to_all(x.transpose(1, 2)[:, :, : 4 - rank]),
            lambda: _ft_c_output_all_to_all(x.transpose(1, 2)[:, :, :3]),
            lambda: xdit_ring_flash_attn_func(x, x, x, causal=True, joint_tensor_key=x, joint_tensor_value=x),
        ]
    )


def test_what_cannot_be_served_is_refused_with_shapes(pool):
    fragments = [
        "joint_tensor_query (1, 3, 4, 8), joint_tensor_key (1, 3, 4, 8), joint_tensor_value (1, 3, 4, 8) came with"
        " joint_strategy='none'",
        "joint_tensor_query (1, 3, 4, 8) came without joint_tensor_key, joint_tensor_value",
        "joint_strategy='middle' is unknown; known are none, front, rear",
        "query (4, 4, 8), key (4, 4, 8), value (4, 4, 8): all must have four dimensions, [B, S, H, D]",
        "key (1, 4, 3, 8), value (1, 4, 3, 8)",
        "query (1, 4, 4, 8), key (1, 2, 4, 8): a rank must hold as many queries as keys",
        "key torch.float64 on cpu",
        "joint_tensor_key (1, 3, 2, 8), key (1, 4, 4, 8)",
        "causal=True has no meaning beside joint tensors",
        "window_size=(8, 8) must be (-1, -1)",
        "dropout_p=0.1 must be 0",
        "alibi_slopes must be None",
        "return_attn_probs=True",
        "causal=True with ring_impl_type='zigzag': use 'basic'",
        "ring_impl_type='spiral' is unknown; known are basic",
        "scatter_idx=1, gather_idx=2 must be 2 and 1",
        "no gradient passes their collectives",
        "are [(1, 4, 4, 8, 3, 3), (1, 4, 4, 8, 4, 4)]",
        "(1, 3, 4, 8) must be [B, H, S, D] with heads (dimension 1) that divide by the 2 ranks",
        "ranks hold [4, 3] tokens",
        "(1, 4, 3, 8) must be [B, H, S, D] with tokens (dimension 2) that divide by the 2 ranks",
        "joint_strategy='none'",
    ]
    for messages in pool.run(2, refusals):
        for message, fragment in zip(messages, fragments, strict=True):
            assert fragment in message


# Process groups ----------------------------------------------------------------------------------------------------


def test_use_before_initialisation_shows_the_two_calls():
    for call in (get_sp_group, get_world_group, xFuserLongContextAttention):
        with pytest.raises(
            RuntimeError, match=r"init_distributed_environment\(\)\n.*initialize_model_parallel\(ulysses"
        ):
            call()
    with pytest.raises(RuntimeError, match=r"initialize_runtime_state\(pipe, engine_config\)"):
        get_runtime_state()
    with pytest.raises(ValueError, match="engine_config=None must be the first result of xFuserArgs"):
        initialize_runtime_state(None, None)


def test_import_alone_reaches_the_groups():
    code = (
        "import xfuser\n"
        "groups, state = xfuser.core.distributed, xfuser.core.distributed.parallel_state\n"
        "groups.init_distributed_environment()\n"
        "groups.initialize_model_parallel(sequence_parallel_degree=1, ring_degree=1, ulysses_degree=1)\n"
        "print(state.get_sp_group().world_size, state.get_sequence_parallel_rank(), state.get_world_group().local_rank)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["1", "0", "0"], done.stderr


def test_scripts_log_on_rank_0(monkeypatch, caplog):
    script = init_logger("script")
    assert init_logger("script") is script
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        script.warning("rank %s", rank)
    assert caplog.messages == ["rank 0"]


UNDERSTOOD = [  # given; Ulysses and ring degree on four ranks
    ({"sequence_parallel_degree": 4, "ring_degree": 2, "ulysses_degree": 2}, (2, 2)),
    ({"sequence_parallel_degree": 2, "ring_degree": 2, "ulysses_degree": 2}, (2, 2)),  # ulysses_degree given twice
    ({"sequence_parallel_degree": 4, "vae_parallel_size": 0}, (4, 1)),
    ({"sequence_parallel_degree": 4, "ulysses_degree": 4}, (4, 1)),
    ({"sequence_parallel_degree": 4, "ulysses_degree": 1, "ring_degree": 1}, (4, 1)),
    ({"sequence_parallel_degree": 4, "ring_degree": 2}, (2, 2)),
    ({"sequence_parallel_degree": 4, "ulysses_degree": 2}, (2, 2)),
    ({"sequence_parallel_degree": 2, "ulysses_degree": 2, "classifier_free_guidance_degree": 2}, (2, 1)),
    ({"sequence_parallel_degree": 2, "tensor_parallel_degree": 2, "ulysses_degree": 2}, (2, 1)),
    ({"sequence_parallel_degree": 1, "pipeline_parallel_degree": 2, "data_parallel_degree": 2}, (1, 1)),
]


def forms_of_degrees():
    init_distributed_environment()
    init_distributed_environment(rank=dist.get_rank(), world_size=dist.get_world_size())
    understood = []
    for degrees, _ in UNDERSTOOD:
        initialize_model_parallel(**degrees)
        understood.append((get_sp_group().ulysses_world_size, get_sp_group().ring_world_size))
        distributed.destroy_model_parallel()
    return understood, refused(
        [
            lambda: initialize_model_parallel(sequence_parallel_degree=3, ulysses_degree=2),
            lambda: initialize_model_parallel(ulysses_degree=3),
            lambda: initialize_model_parallel(ulysses_degree=2, vae_parallel_size=2),
            lambda: init_distributed_environment(rank=7, world_size=8),
        ]
    )


def test_every_form_of_degrees_is_understood(pool):
    for understood, messages in pool.run(4, forms_of_degrees):
        assert understood == [expected for _, expected in UNDERSTOOD]
        fragments = (
            "which leaves 4 for the sequence",
            "is 3, the world has 4 ranks",
            "vae_parallel_size=2 must be 0",
            "the process group that is there",
        )
        assert all(fragment in message for fragment, message in zip(fragments, messages, strict=True))


def group_calls():
    start(sequence_parallel_degree=2, ulysses_degree=2, classifier_free_guidance_degree=2)
    sp, cfg, world = get_sp_group(), get_cfg_group(), get_world_group()
    rank = dist.get_rank()
    assert world.local_rank == rank and dist.get_world_size(sp.ulysses_group) == 2
    assert dist.get_world_size(sp.ring_group) == 1
    x = torch.full((1, 3, 2), float(rank)).transpose(1, 2)  # not contiguous
    assert sp.all_gather(x, dim=-1)[0, 0].tolist() == [float(r) for r in sp.ranks for _ in range(3)]
    noise = [part[0, 0, 0].item() for part in cfg.all_gather(x, separate_tensors=True)]
    assert noise == [float(r) for r in cfg.ranks]
    assert sp.broadcast_object_list([rank, None], src=0) == [sp.ranks[0], None]

    joined = world.gather(torch.full((1, rank + 1), float(rank)), dst=1)
    assert (joined is None) == (rank != 1)
    assert joined is None or joined.tolist() == [[0.0, 1.0, 1.0, 2.0, 2.0, 2.0, 3.0, 3.0, 3.0, 3.0]]
    told = {"x": torch.arange(rank + 1.0), "name": f"rank {rank}", "none": torch.empty(0, 3)}
    for call in (lambda: world.send(x, dst=4), lambda: world.irecv(x, src=-1), lambda: world.broadcast(x, src=4)):
        with pytest.raises(ValueError, match="of a group must be from 0 to 3"):
            call()
    if rank == 0:
        world.send_object({"a": 1}, dst=2)
        world.send_tensor_dict(told, dst=2)
    elif rank == 2:
        assert world.recv_object(src=0) == {"a": 1}
        received = world.recv_tensor_dict(src=0)
        assert received["x"].tolist() == [0.0] and received["name"] == "rank 0" and received["none"].shape == (0, 3)
    dist.barrier(group=world.cpu_group)
    return True


def test_group_calls(pool):
    assert all(pool.run(4, group_calls))


def beside_yunchang():
    import yunchang
    from yunchang.globals import PROCESS_GROUP

    start(ulysses_degree=2)
    groups = (PROCESS_GROUP.ULYSSES_PG, PROCESS_GROUP.RING_PG)
    assert groups == (get_sp_group().ulysses_group, get_sp_group().ring_group)
    q, k, v = (drawn(1, 4, 4, 8, seed=dist.get_rank() * 3 + i) for i in range(3))
    theirs = yunchang.LongContextAttention(attn_type=AttnType.TORCH_MATH)(q, k, v)
    difference = error(xFuserLongContextAttention()(None, q, k, v), theirs)
    distributed.destroy_model_parallel()
    return difference, PROCESS_GROUP.ULYSSES_PG is None


def test_yunchang_works_beside(pool):
    for difference, forgotten in pool.run(2, beside_yunchang):
        assert difference <= 1e-5 and forgotten


def test_rank_generator_takes_both_forms():
    order = "tp-sp-pp-cfg-dp"
    plain_form = RankGenerator(1, 2, 1, 2, 1, order)
    for other in (
        RankGenerator(1, 2, 1, 2, 1, 1, order),
        RankGenerator(tp=1, sp=2, pp=1, cfg=2, dp=1, fs=1, order=order),
        RankGenerator(1, 2, 1, 2, 1, order, 0),
        RankGenerator(1, 2, 1, 2, 1, "sp-cfg"),
    ):
        assert other.world_size == 4
        for token in ("sp", "cfg", "tp", "sp-cfg"):
            assert other.get_ranks(token) == plain_form.get_ranks(token)
    assert RankGenerator(1, 2, 1, 2, 1, order, 4).get_ranks("sp") == [[4, 5], [6, 7]]
    across = RankGenerator(1, 4, 1, 1, 1, 2, order)
    assert across.get_ranks("fs") == [[0, 1], [2, 3]] and across.get_ranks("sp") == [[0, 1, 2, 3]]
    inside = RankGenerator(1, 2, 1, 1, 1, fs=2, order="fs-tp-sp-pp-cfg-dp")
    assert inside.world_size == 4 and inside.get_ranks("sp") == [[0, 2], [1, 3]]
    with pytest.raises(ValueError, match="fs=3 must divide the number of ranks, 4"):
        RankGenerator(1, 4, 1, 1, 1, 3, order)


def state_of_a_script():
    engine_config, _ = xFuserArgs(ulysses_degree=2).create_config()
    initialize_runtime_state(object(), engine_config)
    state = get_runtime_state()
    state.set_input_parameters(
        height=64,
        width=48,
        batch_size=1,
        num_inference_steps=3,
        max_condition_sequence_length=9,
        split_text_embed_in_sp=False,
    )
    seen = [state.split_text_embed_in_sp, state.input_config.height]
    state.set_video_input_parameters(
        height=32, width=None, num_frames=5, batch_size=1, num_inference_steps=2, split_text_embed_in_sp=True
    )
    seen += [state.split_text_embed_in_sp, state.input_config.height, state.input_config.width]
    seen += [state.input_config.num_frames, state.parallel_config.ulysses_degree]
    get_runtime_state().split_text_embed_in_sp = False
    seen += [get_runtime_state().split_text_embed_in_sp, get_sequence_parallel_world_size()]
    messages = refused([lambda: state.set_input_parameters(height=-8)])
    state.destory_distributed_env()
    assert not distributed.model_parallel_is_initialized() and not distributed.runtime_state_is_initialized()
    initialize_runtime_state(object(), engine_config)
    get_runtime_state().destroy_distributed_env()
    return seen, messages


def test_runtime_state(pool):
    for seen, messages in pool.run(2, state_of_a_script):
        assert seen == [False, 64, True, 32, 48, 5, 2, False, 2]
        assert "height=-8 must be a whole number" in messages[0]


# Clients -----------------------------------------------------------------------------------------------------------


def video_client(degrees):
    start(sequence_parallel_degree=dist.get_world_size(), **degrees)
    model, x = clients.filled(clients.VideoModel()), drawn(2, 13, clients.WIDTH)  # 13 tokens: shards differ in length
    return error(clients.usp_dit_forward(model, x), model(x))


def joint_client(degrees, strategy, size):
    start(**degrees)
    model = clients.filled(clients.JointModel(strategy))
    image, text = drawn(1, *size, clients.WIDTH), drawn(1, 5, clients.WIDTH, seed=1)
    expected, expected_text = model(image.flatten(1, 2), text)
    out, out_text = clients.joint_forward(model, image, text)
    return error(out.flatten(1, 2), expected), error(out_text, expected_text)


def guided_client(degrees):
    initialize_runtime_state(None, xFuserArgs(**degrees).create_config()[0])
    model, latents = clients.filled(clients.VideoModel()), drawn(1, 8, clients.WIDTH)
    uncond, cond = model(0.5 * latents), model(latents)
    out = clients.guided_step(model, latents)
    get_runtime_state().destroy_distributed_env()
    return error(out, uncond + 3.0 * (cond - uncond))


def node_client(ulysses, ring, cfg):
    worker = clients.Worker(ulysses, ring, cfg)
    latents = drawn(1, 8, clients.WIDTH)
    sampled = worker.command("sample" if dist.get_rank() == 0 else None)(latents)
    x = clients.split_heads(latents)
    x = clients.plain(x, x, x)
    return error(sampled, clients.plain(x, x, x).flatten(2))


@everywhere
def test_video_forward_that_chunks_tokens(pool, place):
    ranks, degrees = PLACES[place]
    assert max(pool.run(ranks, video_client, degrees)) <= 1e-5


@everywhere
@pytest.mark.parametrize(("strategy", "size"), [("rear", (4, 3)), ("front", (3, 7))])
def test_forward_with_text_on_every_rank(pool, place, strategy, size):
    ranks, degrees = PLACES[place]
    for errors in pool.run(ranks, joint_client, degrees, strategy, size):
        assert max(errors) <= 1e-5


@pytest.mark.parametrize(
    ("ranks", "degrees"), [(1, {}), (2, {"use_cfg_parallel": True}), (4, {"use_cfg_parallel": True, "ring_degree": 2})]
)
def test_forward_with_guidance_in_its_batch(pool, ranks, degrees):
    assert max(pool.run(ranks, guided_client, degrees)) <= 1e-5


@pytest.mark.parametrize(("ranks", "degrees"), [(1, (1, 1, 1)), (2, (2, 1, 1)), (4, (2, 2, 1)), (4, (2, 1, 2))])
def test_worker_that_builds_groups_by_the_grid(pool, ranks, degrees):
    assert max(pool.run(ranks, node_client, *degrees)) <= 1e-5


# Tensor parallelism ------------------------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    """Queries, keys and values from one linear, in either order; with ``needs``, the call requires ``factor``."""

    def __init__(self, width, heads, by_head=True, needs=False):
        super().__init__()
        self.n_heads, self.head_dim, self.by_head, self.needs = heads, width // heads, by_head, needs
        self.wqkv, self.wo = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm = nn.RMSNorm(self.head_dim)

    def forward(self, x, factor=None):
        x = self.wqkv(x)
        if self.needs:
            x = x * factor[0]
        if self.by_head:
            q, k, v = x.view(*x.shape[:2], self.n_heads, -1).chunk(3, dim=-1)
        else:
            q, k, v = (part.view(*part.shape[:2], self.n_heads, -1) for part in x.chunk(3, dim=-1))
        return self.wo(plain(self.q_norm(q), k, v).flatten(2))


class CrossAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.n_heads = heads
        self.wq, self.wkv, self.wo = nn.Linear(width, width), nn.Linear(10, 2 * width), nn.Linear(width, width, False)

    def forward(self, x, text, mask=None):
        q = self.wq(x).view(*x.shape[:2], self.n_heads, -1)
        k, v = self.wkv(text).view(*text.shape[:2], self.n_heads, -1).chunk(2, dim=-1)
        return self.wo(plain(q, k, v).flatten(2))


class Gated(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.net = nn.ModuleList([Gated(width, inner), nn.Identity(), nn.Linear(inner, width)])

    def forward(self, x):
        for module in self.net:
            x = module(x)
        return x


class Toy(nn.Module):
    def __init__(self, heads=4, by_head=True, needs=False):
        super().__init__()
        self.attn1 = SelfAttention(8 * heads, heads, by_head, needs)
        self.attn2 = CrossAttention(8 * heads, heads)
        self.ff = FeedForward(8 * heads, 21)  # not divisible by any number of ranks
        self.mlp = nn.Sequential(nn.Linear(8 * heads, 5), nn.SiLU(), nn.Linear(5, 8 * heads))

    def forward(self, x, text):
        x = x + self.attn1(x, (1.0,) if self.attn1.needs else None)
        x = x + self.attn2(x, text)
        return x + self.ff(x) + self.mlp(x)


def divided(toy, ranks, stacked=None):
    """Return the error of a sharded toy, and the largest fraction of the weights that a rank keeps."""
    from xfuser.core.distributed.parallel_state import (
        get_tensor_model_parallel_rank,
        get_tensor_model_parallel_world_size,
    )
    from xfuser.model_executor.models.customized.step_video_t2v.tp_applicator import TensorParallelApplicator

    start(tensor_parallel_degree=ranks)
    model = clients.filled(Toy(**toy))
    x, text = drawn(2, 5, model.attn1.wo.in_features), drawn(2, 3, 10, seed=1)
    expected, whole = model(x, text), sum(weight.numel() for weight in model.parameters())
    options = {"stacked": stacked} if stacked else {}
    applicator = TensorParallelApplicator(
        get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank(), **options
    )
    applicator.apply_to_model(model)
    kept = sum(weight.numel() for weight in model.parameters()) / whole
    return error(model(x, text), expected), error(model(x, text), expected), kept


@pytest.mark.parametrize(
    ("ranks", "toy", "stacked"),
    [
        (1, {}, None),
        (2, {}, None),
        (2, {"by_head": False}, {"wqkv": "by_projection"}),
        (2, {"heads": 3}, "by_head"),
        (2, {"needs": True}, None),
        (2, {"needs": True, "by_head": False}, {"wqkv": "by_projection"}),
        (4, {"by_head": False, "heads": 5}, {"wqkv": "by_projection", "wkv": "by_head"}),
    ],
)
def test_divided_weights_give_the_same(pool, ranks, toy, stacked):
    for *errors, kept in pool.run(ranks, divided, toy, ranks, stacked):
        assert max(errors) <= 1e-5
        assert kept <= 1 if ranks == 1 else kept < 0.75


def undividable():
    from xfuser.model_executor.models.customized.step_video_t2v.tp_applicator import TensorParallelApplicator

    start(tensor_parallel_degree=2)
    rank = dist.get_rank()
    x = drawn(1, 3, 32)
    unread = clients.filled(SelfAttention(32, 4, by_head=False, needs=True))
    applicator = TensorParallelApplicator(2, rank)
    applicator.apply_to_model(unread)
    uncounted = SelfAttention(32, 4)
    del uncounted.n_heads
    return refused(
        [
            lambda: unread(x, (1.0,)),
            lambda: applicator.apply_to_model(unread),
            lambda: applicator.apply_to_model(uncounted),
            lambda: applicator.apply_to_model(SelfAttention(32, 1)),
            lambda: applicator.apply_to_model(SelfAttention(32, 2, needs=True)),
            lambda: applicator.apply_to_model(nn.Linear(3, 3)),
            lambda: TensorParallelApplicator(4, rank),
            lambda: TensorParallelApplicator(2, rank, stacked="somehow"),
        ]
    )


def test_what_cannot_be_divided_is_refused(pool):
    fragments = (
        "SelfAttention does not read wqkv by_head; give",
        "is divided over ranks already",
        "SelfAttention has none of n_heads",
        "1 heads cannot be divided over 2 ranks",
        "cannot confirm the order of wqkv: give stacked='by_head' or 'by_projection'",
        "there is nothing to divide",
        "tp_size=4",
        "stacked='somehow' is unknown",
    )
    for messages in pool.run(2, undividable):
        assert all(fragment in message for fragment, message in zip(fragments, messages, strict=True)), messages
