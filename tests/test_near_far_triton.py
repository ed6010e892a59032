"""The Triton kernels of near_far against the plain version in float64: in Triton's interpreter, or on the GPU where there is one."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton", reason="Triton is not installed")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from taylor_patch.backends.base import not_finite  # noqa: E402
from taylor_patch.backends.near_far import NearFar, NearFarOptions, aim, blocks, op, plan, reference  # noqa: E402
from taylor_patch.backends.near_far.layout import block_tokens  # noqa: E402
from taylor_patch.backends.targets import MARGIN  # noqa: E402
from taylor_patch.backends.tiles import adjacent, grids, tile_index  # noqa: E402
from taylor_patch.call import AttentionCall, TokenGrid  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TMA = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

CASES = {
    # batch, heads, key heads, text before, grid, text after, head_dim, dtype, masked, tail
    "image, text first, float32": (1, 1, 1, 5, (1, 16, 16), 0, 64, torch.float32, False, "cumulant"),
    "ragged image, text last": (1, 2, 2, 0, (1, 13, 19), 9, 40, torch.float16, False, "cumulant"),
    "video, grouped heads": (1, 4, 2, 3, (5, 6, 7), 0, 128, torch.float16, False, "cumulant"),
    "two masks, frames": (2, 2, 1, 66, (3, 9, 13), 0, 64, torch.float16, True, "cumulant"),
    "head_dim 96": (1, 1, 1, 0, (4, 8, 8), 0, 96, torch.float16, False, "cumulant"),
    "head_dim 256": (1, 1, 1, 4, (1, 16, 12), 0, 256, torch.float16, False, "cumulant"),
    "zeroth tail": (1, 1, 1, 4, (1, 16, 24), 0, 64, torch.float16, False, "zeroth"),
    "no tail": (1, 1, 1, 4, (1, 16, 24), 0, 64, torch.float16, False, "none"),
}
CROSS = {
    # the same of the queries (grid None: a line), and the keys: their number in a line, or text before, grid and text after
    "line to longer line, float32": ((1, 1, 1, 0, None, 131, 64, torch.float32, False, "cumulant"), 1091),
    "image to shorter line, grouped heads": ((1, 4, 2, 5, (1, 21, 19), 2, 40, torch.float16, False, "cumulant"), 327),
    "line to video, two masks": ((2, 2, 1, 0, None, 203, 128, torch.float16, True, "cumulant"), (9, (5, 9, 13), 3)),
    "image to image, text beside both": ((2, 2, 2, 66, (1, 17, 23), 0, 96, torch.float16, True, "cumulant"), (0, (1, 31, 27), 70)),
    "head_dim 256": ((1, 1, 1, 0, (1, 16, 12), 0, 256, torch.float16, False, "cumulant"), 1000),
    "zeroth tail": ((1, 1, 1, 0, (1, 13, 9), 0, 64, torch.float16, False, "zeroth"), 777),
    "no tail": ((1, 1, 1, 0, (1, 13, 9), 0, 64, torch.float16, False, "none"), 777),
}


def make_call(batch, heads, heads_kv, before, sides, after, head_dim, dtype, masked, *, keys=None, contiguous=True, seed=0, sharpness=1.5):
    """Random q, k, v of neighbouring likeness, with their grid and mask. keys: those of cross-attention, as CROSS has them; in a line of
    queries `after` is their number."""
    gen = torch.Generator().manual_seed(seed)
    line = isinstance(keys, int)
    of_queries = (before, sides or (1, 1, after), after if sides else 0)
    of_keys = of_queries if keys is None else (0, (1, 1, keys), 0) if line else keys

    def random(count, before, sides, after):
        tokens, apart = before + math.prod(sides) + after, 4 if sides[:2] != (1, 1) else 48
        x = torch.randn(batch, tokens, count, head_dim, generator=gen) * sharpness
        coarse = torch.randn(batch * count, head_dim, *(-(-side // apart) for side in sides), generator=gen)
        low = F.interpolate(coarse, sides, mode="trilinear")
        x[:, before : before + math.prod(sides)] += low.view(batch, count, head_dim, -1).permute(0, 3, 1, 2)
        x = x.to(dtype).to(DEVICE).transpose(1, 2)
        return x.contiguous() if contiguous else x

    q, k, v = random(heads, *of_queries), random(heads_kv, *of_keys), random(heads_kv, *of_keys)
    mask = None
    if masked:
        tokens = k.shape[2]
        mask = torch.zeros(batch, tokens)
        mask[:, ::7] = -0.5
        mask[-1, tokens // 3 : tokens // 2] = -torch.inf
        mask = mask.to(DEVICE)
    known = sides is not None or q.shape[2] == k.shape[2]
    return AttentionCall(q, k, v, scale=head_dim**-0.5, key_mask=mask, grid=TokenGrid(*of_queries[1], before) if known else None,
                         key_grid=None if keys is None or line else TokenGrid(*keys[1], keys[0]))


def plan_of(call, tma=False, aimed=False):
    tiles = plan.Tiles(tma=tma) if call.q.shape[3] * call.q.element_size() <= 256 else plan.Tiles(far=32, stages=1)
    return dataclasses.replace(plan.of_call(call, aimed), tiles=tiles)


def poisoned(sizes, device=DEVICE):
    """A workspace in which everything that is read before it is written shows."""
    return {name: x.fill_(math.nan) if x.is_floating_point() else x.fill_(13) for name, x in sizes.allocate(device).items()}


def near_blocks(sizes, space, head):
    """[image blocks of the queries, image blocks of the keys] bool from the workspace."""
    return space["far"].view(-1, sizes.queries.image_blocks, sizes.far_stride)[head, :, : sizes.keys.image_blocks].isneginf()


def run_round(call, density, tail, tma=False):
    """Output and near blocks of every head, from a poisoned workspace and output."""
    sizes = plan_of(call, tma)
    space = poisoned(sizes)
    out = op.empty_output(call.q).fill_(math.nan)
    assert sizes.round_lanes == sizes.lanes
    op.prepare(sizes, space, call.q, call.k, call.v, call.key_mask, 0, sizes.lanes)
    op.score(sizes, space, sizes.lanes, call.scale)
    op.select(sizes, space, sizes.lanes, density)
    flag = torch.zeros(1, device=DEVICE)
    op.attend_round(sizes, space, call.q, out, flag, 0, sizes.lanes, call.scale, tail)
    heads = call.q.shape[0] * call.q.shape[1]
    return out, [near_blocks(sizes, space, head) for head in range(heads)]


def places(call, bias=None):
    """What reference.Head takes after q, k and v."""
    grid, key_grid = grids(call)
    return grid, bias, None if call.self_attention else key_grid


def oracle(call, near, density, tail):
    """float64, with the near blocks that the kernels chose."""
    batch, heads = call.q.shape[:2]
    out = torch.empty(call.q.shape, dtype=torch.float64, device=call.q.device)
    for b in range(batch):
        bias = None if call.key_mask is None else call.key_mask[b % call.key_mask.shape[0]].double()
        for h in range(heads):
            kv = h * call.k.shape[1] // heads
            q, k, v = call.q[b, h].double() * call.scale, call.k[b, kv].double(), call.v[b, kv].double()
            out[b, h] = reference.Head(q, k, v, *places(call, bias)).attend(near[b * heads + h], tail)
    return out


def exact(call, dtype):
    """SDPA in dtype."""
    k, v = (x.repeat_interleave(call.q.shape[1] // call.k.shape[1], 1).to(dtype) for x in (call.k, call.v))
    bias = None if call.key_mask is None else call.key_mask[:, None, None].to(dtype)
    return F.scaled_dot_product_attention(call.q.to(dtype), k, v, attn_mask=bias, scale=call.scale)


def error(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def rounding(call):
    """Error of exact attention in the call's dtype."""
    return error(exact(call, call.q.dtype), exact(call, torch.float64))


@pytest.mark.parametrize(("case", "keys"), [*((case, None) for case in CASES.values()), *CROSS.values()], ids=[*CASES, *CROSS])
def test_equals_the_plain_version(case, keys):
    call = make_call(*case[:-1], keys=keys)
    before = [x.clone() for x in (call.q, call.k, call.v)]
    out, near = run_round(call, 0.3, case[-1])
    assert not all(bool(x.all()) for x in near)
    assert error(out, oracle(call, near, 0.3, case[-1])) <= 1.5 * rounding(call)
    assert all(torch.equal(a, b) for a, b in zip((call.q, call.k, call.v), before, strict=True))


def test_descriptors_give_the_same():
    if DEVICE == "cuda" and not TMA:
        pytest.skip("no tensor memory accelerator")
    pytest.importorskip("triton.tools.tensor_descriptor")
    call = make_call(1, 2, 1, 5, (1, 16, 20), 0, 64, torch.float16, False)
    with_tma, without = (run_round(call, 0.3, "cumulant", tma)[0] for tma in (True, False))
    assert error(with_tma, without) < 1e-4


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "two masks"])
def test_density_one_is_exact_attention(masked):
    call = make_call(2, 2, 1, 3, (1, 9, 14), 7, 64, torch.float16, masked, contiguous=False)
    out, _ = run_round(call, 1.0, "cumulant")
    assert error(out, exact(call, torch.float64)) <= 1.5 * rounding(call)


@pytest.mark.parametrize("added", [-104.0, -1e4, 100.0])
@pytest.mark.parametrize("head_dim", [40, 64])
def test_what_is_added_to_a_whole_mask_changes_nothing(head_dim, added):
    """Weights exp(mask) would all vanish or overflow. A row of the mask that hides every key stays what it is."""
    call = make_call(3, 1, 1, 3, (1, 9, 14), 7, head_dim, torch.float16, True)
    call.key_mask[2] = -torch.inf
    shifted = dataclasses.replace(call, key_mask=call.key_mask + added * torch.tensor([[1.0], [0.5], [1.0]], device=DEVICE))
    out = run_round(shifted, 1.0, "cumulant")[0]
    seen = dataclasses.replace(call, q=call.q[:2], k=call.k[:2], v=call.v[:2], key_mask=call.key_mask[:2])
    assert error(out[:2], exact(seen, torch.float64)) <= 1.5 * rounding(seen) and bool((out[2] == 0).all())
    assert torch.equal(run_round(shifted, 0.3, "cumulant")[0], run_round(call, 0.3, "cumulant")[0])


def test_what_is_added_to_a_whole_mask_changes_nothing_of_a_probe():
    call = make_call(1, 1, 1, 3, (1, 16, 16), 0, 16, torch.float16, True)
    found = [op.attend_aimed(dataclasses.replace(call, key_mask=call.key_mask + added), None) for added in (0.0, -1e4)]
    assert all(torch.equal(a, b) for a, b in zip(*((out, one.setting, one.always) for out, one in found), strict=True))


def test_one_mask_for_the_whole_batch():
    """[1, N_kv]; its largest value is taken off in every batch element."""
    call = make_call(2, 1, 1, 3, (1, 9, 14), 7, 64, torch.float16, True)
    one, all_rows = (dataclasses.replace(call, key_mask=mask) for mask in (call.key_mask[1:] - 200, call.key_mask[1:].expand(2, -1)))
    assert torch.equal(run_round(one, 0.3, "cumulant")[0], run_round(all_rows, 0.3, "cumulant")[0])


@pytest.mark.parametrize("n_kv", [61, 700])
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "two masks"])
def test_density_one_is_exact_cross_attention(masked, n_kv):
    call = make_call(2, 2, 1, 3, (1, 9, 14), 7, 64, torch.float16, masked, keys=n_kv, contiguous=False)
    out, _ = run_round(call, 1.0, "cumulant")
    assert error(out, exact(call, torch.float64)) <= 1.5 * rounding(call)


@pytest.mark.parametrize("keys", [None, 333], ids=["self", "cross"])
def test_rounds_of_few_heads_give_the_same(monkeypatch, keys):
    call = make_call(2, 4, 2, 3, (1, 9, 14), 0, 40, torch.float16, True, keys=keys)
    whole = op.attend(call, 0.3)
    monkeypatch.setattr(plan, "WORKSPACE_LIMIT", 1)
    plan.make.cache_clear()
    assert plan_of(call).round_lanes == 1
    assert torch.equal(op.attend(call, 0.3), whole)
    plan.make.cache_clear()


@given(st.integers(1, 5), st.integers(1, 12), st.integers(1, 12), st.integers(0, 70), st.integers(0, 9), st.sampled_from([16, 40, 64]),
       st.booleans(), st.booleans(), st.floats(0.01, 1.0))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_any_shape(t, h, w, before, after, head_dim, masked, contiguous, density):
    call = make_call(1, 1, 1, before, (t, h, w), after, head_dim, torch.float32, masked, contiguous=contiguous, seed=t * h * w)
    out, near = run_round(call, density, "cumulant")
    assert bool(out.isfinite().all())
    assert error(out, oracle(call, near, density, "cumulant")) < 1e-5


@given(st.integers(1, 400), st.integers(1, 900), st.integers(1, 3), st.booleans(), st.booleans(), st.floats(0.01, 1.0))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_any_numbers_of_queries_and_keys(n_q, n_kv, group, masked, contiguous, density):
    call = make_call(1, group, 1, 0, None, n_q, 16, torch.float32, masked and n_kv > 2, keys=n_kv, contiguous=contiguous, seed=n_q * n_kv)
    out, near = run_round(call, density, "cumulant")
    assert n_q == n_kv or not plan_of(call).own
    assert bool(out.isfinite().all())
    assert error(out, oracle(call, near, density, "cumulant")) < 1e-5


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(0, 70), st.integers(0, 9), st.integers(1, 12), st.integers(1, 12),
       st.integers(0, 70), st.booleans(), st.floats(0.01, 1.0))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_any_two_grids(t, h, w, before, after, key_h, key_w, key_after, masked, density):
    call = make_call(1, 1, 1, before, (t, h, w), after, 16, torch.float32, masked, keys=(2, (1, key_h, key_w), key_after + 1), seed=t * h * w)
    out, near = run_round(call, density, "cumulant")
    assert bool(out.isfinite().all())
    assert error(out, oracle(call, near, density, "cumulant")) < 1e-5


def test_pitfall_27_a_new_size_compiles_nothing_anew():
    """Kernels are told apart by their constants only, and of these by the arrangement of blocks, not by the size: image or video, blocks
    full or not, few or many, and how far a program of the scores goes."""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("near_far_compilations.py")
    done = subprocess.run([sys.executable, script], env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    specialised, constants = defaultdict(set), defaultdict(set)
    for size in json.loads(done.stdout):
        assert {kernel for kernel, *_ in size} >= {"gather_kernel", "attend_kernel", "probe_kernel"}
        for kernel, fixed, others in size:
            specialised[kernel, json.dumps(fixed)].add(json.dumps(others))
            for name, value in fixed.items():
                constants[name, kernel].add(value)
    assert {key[0]: found for key, found in specialised.items() if len(found) > 1} == {}
    varying = {name for (name, _), values in constants.items() if len(values) > 1}
    tiles = {f"{side}TILE_{axis}" for side in ("", "QUERY_") for axis in "THW"}
    assert varying == {"AIMED", "BETWEEN", "BIASED", "EXACT", "NEIGHBOURS", "STEPS", *tiles}
    assert len(constants["BETWEEN", "choose_kernel"]) == 2
    assert {int(re.search(r"\d+", value)[0]) for value in constants["STEPS", "score_kernel"]} <= {1, 2, 4, 8}


def at_the_limits_of_float16(kind):
    """Finite q, k and v of which sums, products or differences are beyond 65,504."""
    call = make_call(1, 2, 1, 3, (1, 16, 16), 0, 64, torch.float16, False)
    if kind == "logits":
        call.q.mul_(100), call.k.mul_(100)
    elif kind == "values":
        call.v.copy_(call.v.sign() * 60_000)
    else:
        call.q.mul_(1e-5), call.k.copy_(call.k.sign() * 60_000)
    return call


@pytest.mark.parametrize("kind", ["logits", "values"])
@pytest.mark.parametrize("attend", [op.attend, reference.attend], ids=["kernels", "plain"])
def test_pitfall_17_sums_and_products_beyond_float16(kind, attend):
    call = at_the_limits_of_float16(kind)
    assert error(attend(call, 1.0), exact(call, torch.float64)) < 1e-3


def test_pitfall_17_differences_beyond_float16_are_reported():
    """Kernels keep k less its mean in the dtype of k: what overflows there is not finite, and is said to be so."""
    out = op.attend(at_the_limits_of_float16("keys apart"), 1.0)
    assert not bool(out.isfinite().all()) and bool(not_finite(out))


@pytest.mark.parametrize("attend", [op.attend, reference.attend], ids=["kernels", "plain"])
def test_a_given_density_stays_within_reach_of_the_values_at_any_sharpness(attend):
    """Nothing checks a given density against an error: where the expansion does not hold, it must not run away."""
    call = make_call(1, 2, 2, 3, (1, 24, 24), 0, 64, torch.float32, False)
    plain = float(call.v.norm(dim=-1).max())
    for times in (1, 10, 1000):
        sharp = dataclasses.replace(call, q=call.q * times)
        assert float(attend(sharp, 0.1).norm(dim=-1).max()) < 2 * plain


HOSTILE = ("identical keys", "huge keys", "one-hot values", "a sink", "far from the origin")


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_inputs(kind):
    call = make_call(1, 1, 1, 3, (1, 24, 24), 0, 64, torch.float32, False)
    k, v = call.k, call.v
    if kind == "identical keys":
        k[:] = k[:, :, :1].clone()
    elif kind == "huge keys":
        k *= 30
    elif kind == "one-hot values":
        v[:] = 0
        v[:, :, 100, 3] = 1
    elif kind == "a sink":
        k[:, :, 40] = 3 * call.q.mean(2)
    else:
        k += 50
    out, near = run_round(call, 0.2, "cumulant")
    expected = oracle(call, near, 0.2, "cumulant")
    assert bool(out.isfinite().all())
    assert float((out - expected).norm()) <= 2e-3 * float(expected.norm())


@pytest.mark.parametrize("grid", [TokenGrid(1, 20, 28, 3), TokenGrid(1, 13, 9), TokenGrid(6, 9, 13, 2), TokenGrid(2, 7, 9)], ids=str)
def test_tile_order_is_that_of_tile_index(grid):
    @triton.jit
    def write(out, filled_out, n, T, H, W, START, TT: triton.language.constexpr, TH: triton.language.constexpr,
              TW: triton.language.constexpr):
        place = triton.language.arange(0, 64)
        block = triton.language.program_id(0)
        token, filled = block_tokens(block, place, n, T, H, W, START, 0, TT, TH, TW)
        triton.language.store(out + block * 64 + place, token)
        triton.language.store(filled_out + block * 64 + place, filled.to(triton.language.int32))

    index, filled = tile_index(grid)
    token, is_filled = (torch.empty(index.shape, dtype=torch.int32, device=DEVICE) for _ in range(2))
    from taylor_patch.backends.tiles import tile_shape
    write[(index.shape[0],)](token, is_filled, index.shape[0], grid.t, grid.h, grid.w, grid.start, *tile_shape(grid))
    assert torch.equal(is_filled.bool().cpu(), filled)
    assert torch.equal(token.cpu()[filled].long(), index[filled] + grid.start)


@pytest.mark.parametrize("keys", [None, 3001, 900], ids=["self", "more keys", "fewer keys"])
def test_near_blocks_are_the_most_massive(keys):
    call = make_call(1, 1, 1, 0, (1, 48, 56), 0, 16, torch.float32, False, keys=keys)
    sizes = plan_of(call)
    space = poisoned(sizes)
    op.prepare(sizes, space, call.q, call.k, call.v, None, 0, 1)
    op.score(sizes, space, 1, call.scale)
    op.select(sizes, space, 1, 0.1)
    near = near_blocks(sizes, space, 0)
    wanted = reference.route(reference.Head(call.q[0, 0] * call.scale, call.k[0, 0], call.v[0, 0], *places(call)), 0.1)
    assert abs(int(near.sum()) - int(wanted.sum())) <= 0.05 * int(wanted.sum())
    assert int((near & wanted).sum()) >= 0.95 * int(wanted.sum())
    assert bool(near.any(1).all())
    counts, lists = space["count"][0, 0], space["list"][0, 0].long()
    for row in range(near.shape[0]):
        assert sorted(lists[row, : counts[row]].tolist()) == near[row].nonzero().flatten().tolist()


@pytest.mark.parametrize("density", [0.02, 0.1])
def test_in_a_picture_of_many_blocks_the_neighbours_are_near_before_any_others(density):
    call = make_call(1, 1, 1, 0, (1, 113, 117), 0, 16, torch.float32, False)
    sizes, around = plan_of(call), adjacent(call.grid)
    assert sizes.neighbours and around.shape == (225, 225) and int(around.sum()) == 8 * 13 * 13 + 5 * 4 * 13 + 3 * 4
    space = poisoned(sizes)
    op.prepare(sizes, space, call.q, call.k, call.v, None, 0, 1)
    op.score(sizes, space, 1, call.scale)
    op.select(sizes, space, 1, density)
    chosen = near_blocks(sizes, space, 0).cpu()
    wanted = reference.route(reference.Head(call.q[0, 0] * call.scale, call.k[0, 0], call.v[0, 0], *places(call)), density).cpu()
    assert bool(wanted[around].all()) and bool(chosen[around].all())
    if density == 0.1:  # they count: no more blocks are near than without them, but for the best ones
        assert abs(int(chosen.sum()) - int(wanted.sum())) <= 0.05 * int(wanted.sum()) and float(chosen.float().mean()) < 0.106
    assert int((chosen & wanted).sum()) >= 0.95 * int(wanted.sum())
    counts, lists = space["count"][0, 0].cpu(), space["list"][0, 0].long().cpu()
    for row in range(225):  # each once, the best one of a row too
        assert sorted(lists[row, : counts[row]].tolist()) == chosen[row].nonzero().flatten().tolist()


@pytest.mark.parametrize("shape", [(1, 1, 1, 0, (1, 112, 112), 0, 16), (1, 1, 1, 0, (15, 34, 30), 0, 16)], ids=["196 blocks", "a video"])
def test_few_blocks_or_a_video_have_no_neighbours_before_others(shape):
    assert not plan_of(make_call(*shape, torch.float32, False)).neighbours


def aimed(call, target, tma=False):
    """(output, settled, plain version's settled, its output with the kernels' settings) from a poisoned workspace."""
    sizes = plan_of(call, tma, aimed=True)
    space, settled = poisoned(sizes), op.unsettled(sizes, torch.device(DEVICE))
    settled.setting.fill_(math.nan)
    settled.always.fill_(13)
    out = op.empty_output(call.q).fill_(math.nan)
    op.prepare(sizes, space, call.q, call.k, call.v, call.key_mask, 0, sizes.lanes)
    op.score(sizes, space, sizes.lanes, call.scale)
    op.probe(sizes, space, call.q, 0, sizes.lanes, call.scale, MARGIN * target, settled)
    sums = space["sums"].flatten(0, 1).clone()
    op.select(sizes, space, sizes.lanes, 1.0, settled)
    flag = torch.zeros(1, device=DEVICE)
    op.attend_round(sizes, space, call.q, out, flag, 0, sizes.lanes, call.scale, "cumulant", settled)
    near = [near_blocks(sizes, space, head) for head in range(call.q.shape[0] * call.q.shape[1])]
    return out, settled, sums, near


PROBED = {"image, text first": (None, 0.3, 1, 2, 1, 5, (1, 40, 48), 0, 64, torch.float32, False),
          "ragged video, text last": (None, 0.15, 1, 1, 1, 0, (5, 10, 19), 9, 40, torch.float32, False),
          "two masks": (None, 0.31, 2, 1, 1, 3, (1, 32, 36), 0, 32, torch.float32, True),
          "head_dim 16": (None, 0.3, 1, 2, 1, 5, (1, 40, 48), 0, 16, torch.float32, False),
          "line to line": (2003, 0.25, 1, 2, 1, 0, None, 611, 40, torch.float32, False),
          "image to line, two masks": (1301, 0.25, 2, 1, 1, 3, (1, 32, 36), 0, 32, torch.float32, True),
          "line to image and text": ((7, (1, 40, 44), 5), 0.4, 1, 1, 1, 0, None, 1400, 64, torch.float32, False)}


@pytest.mark.parametrize("case", PROBED.values(), ids=PROBED.keys())
def test_probe_equals_the_plain_version(case):
    probe_equals_the_plain_version(case)


def test_probe_equals_the_plain_version_where_neighbours_are_near(monkeypatch):
    monkeypatch.setattr(blocks, "FEW_BLOCKS", 20)
    plan.make.cache_clear()
    try:
        probe_equals_the_plain_version((None, 0.38, 1, 1, 1, 5, (1, 56, 50), 0, 64, torch.float32, False), neighbours=True)
    finally:
        plan.make.cache_clear()


def probe_equals_the_plain_version(case, neighbours=False):
    keys, target, *shape = case
    call = make_call(*shape, keys=keys, sharpness=0.8)
    out, settled, sums, near = aimed(call, target)
    assert plan_of(call, aimed=True).neighbours == neighbours
    assert torch.allclose(settled.setting, aim.choose(sums, target, plan_of(call).between), rtol=1e-4)
    wide = dataclasses.replace(call, q=call.q.double(), k=call.k.double(), v=call.v.double(), target_error=target)
    _, plain = reference.attend_aimed(wide, None)
    assert torch.equal(settled.always, plain.always)
    # Kernel and plain version cut the scores at slightly different places (a histogram), so the densities only nearly agree.
    assert torch.allclose(settled.setting[:, 0], plain.setting[:, 0], rtol=0.1, atol=0.005)
    assert bool(((settled.setting[:, 0] > 0.04) & (settled.setting[:, 0] < 0.5)).any())
    heads = call.q.shape[1]
    for number in range(call.q.shape[0] * heads):
        b, h = divmod(number, heads)
        kv = h * call.k.shape[1] // heads
        bias = None if call.key_mask is None else call.key_mask[b].double()
        head = reference.Head(wide.q[b, h] * call.scale, wide.k[b, kv], wide.v[b, kv], *places(call, bias))
        _, factor, linear, _ = settled.setting[number].tolist()
        expected = head.attend(near[number], "cumulant", factor, linear)
        assert error(out[b, h], expected) < 1e-5
        share = float(near[number].float().mean())
        # Each query's own block, its best one, the sinks and blocks that the mask hides come on top of the density.
        density = float(settled.setting[number, 0])
        kept = settled.always[number].bool().to(DEVICE) | head.blocks.log_mass.isneginf()
        most = density + 2 / near[number].shape[1] + float(kept.float().mean())
        assert 0.8 * density - 0.02 <= share <= most + 0.03


def test_sinks_are_near_for_every_query():
    call = make_call(1, 1, 1, 3, (1, 40, 40), 0, 64, torch.float32, False)
    call.q[..., 0] += 3
    call.k[:, :, 700, 0] = 45
    out, settled, _, near = aimed(call, 0.1)
    index, _ = tile_index(call.grid)
    sink = int((index == 700 - 3).any(1).nonzero())
    assert bool(settled.always[0, sink]) and int(settled.always.sum()) <= 3
    assert bool(near[0][:, sink].all())
    assert error(out, exact(call, torch.float64)) < 0.1


def test_what_cannot_meet_the_target_is_exact():
    call = make_call(1, 1, 1, 0, (1, 40, 40), 0, 64, torch.float32, False, sharpness=8)
    call.v[:] = torch.randn(call.v.shape, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    out, settled, _, _ = aimed(call, 1e-4)
    assert settled.setting[0].tolist() == [1.0, 1.0, 1.0, 0.0]
    assert error(out, exact(call, torch.float64)) < 1e-5


@pytest.mark.parametrize("n_kv", [128, 200])
def test_operator_passes_the_checks_of_torch(n_kv):
    call = make_call(1, 1, 1, 0, (1, 8, 16), 0, 16, torch.float32, False, keys=n_kv)
    of_keys = [1, 8, 16, 0] if n_kv == 128 else [1, 1, n_kv, 0]
    arguments = (call.q, call.k, call.v, None, [1, 8, 16, 0], of_keys, call.scale, 0.5, "cumulant", 0.0)
    torch.library.opcheck(op.near_far, arguments, test_utils=("test_schema", "test_faketensor"))


@gpu
@needs_gpu
@pytest.mark.parametrize("keys", [None, 9_001, 2_100], ids=["self", "more keys", "fewer keys"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_bfloat16_on_the_gpu(head_dim, keys):
    call = make_call(1, 4, 4, 77, (1, 64, 56), 0, head_dim, torch.bfloat16, False, keys=keys)
    out, near = run_round(call, 0.1, "cumulant", TMA)
    assert error(out, oracle(call, near, 0.1, "cumulant")) <= 1.5 * rounding(call)


@gpu
@needs_gpu
@pytest.mark.parametrize("keys", [None, 40_000, 4_096], ids=["self", "more keys", "fewer keys"])
@pytest.mark.parametrize("density", [0.1, "auto"])
def test_memory_is_as_stated_and_the_host_never_waits(density, keys):
    call = make_call(1, 8, 8, 0, (1, 128, 128), 0, 128, torch.bfloat16, False, keys=keys)
    backend = NearFar(NearFarOptions(density=density))
    backend.run(call)  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = backend.run(call)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    peak = torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()
    assert abs(peak / backend.workspace_nbytes(call) - 1) < 0.05


@pytest.mark.parametrize("place", [None, 3, 95])
def test_the_kernel_says_where_a_value_is_not_finite(place):
    """A value in the image or outside it; the key's weight is not zero anywhere."""
    call = make_call(1, 1, 1, 24, (1, 8, 9), 0, 16, torch.float32, False)
    if place is not None:
        call.v[0, 0, place, 5] = torch.inf
    out = op.attend(call, 1.0)
    assert bool(not_finite(out)) == (not out.isfinite().all()) == (place is not None)
    assert out.taylor_patch_not_finite.item() == (place is not None)
