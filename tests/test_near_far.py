"""near_far against a dense float64 oracle written from the formula."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import taylor_patch
from taylor_patch.backends.near_far import NearFar, reference
from taylor_patch.backends.tiles import adjacent, grids, tile_index
from taylor_patch.call import AttentionCall, TokenGrid


def members(grid, tokens):
    """Block of every token, -1 outside the grid; and the tokens of every block."""
    index, filled = tile_index(grid)
    block_of = torch.full((tokens,), -1)
    for b in range(index.shape[0]):
        block_of[index[b][filled[b]] + grid.start] = b
    return block_of, [(block_of == b).nonzero().flatten() for b in range(index.shape[0])]


def dense(q, k, v, grid, near, key_grid=None):
    """q times scale, all [N, D] float64; near [query blocks, key blocks]: every query against every key and block mean, in N x N."""
    query_block, _ = members(grid, q.shape[0])
    block_of, blocks = members(key_grid or grid, k.shape[0])
    mean_k, mean_v = (torch.stack([x[m].mean(0) for m in blocks]) for x in (k, v))
    n = (key_grid or grid).tokens
    cov = [sum((k[m] - k[m].mean(0)).T @ (x[m] - x[m].mean(0)) for m in blocks) / n for x in (k, v)]
    trace = torch.tensor([((k[m] - k[m].mean(0)) ** 2).sum() / len(m) for m in blocks], dtype=torch.float64)
    counts = torch.tensor([len(m) for m in blocks], dtype=torch.float64)
    spread = trace / ((trace * counts).sum() / n)
    out = torch.empty_like(q)
    for i in range(q.shape[0]):
        own = query_block[i]
        seen = torch.ones(k.shape[0], dtype=torch.bool) if own < 0 else (block_of < 0) | near[own][block_of.clamp_min(0)]
        weight = (q[i] @ k.T).exp() * seen
        numerator, mass = weight @ v, weight.sum()
        if own >= 0:
            deviation = math.sqrt(q[i] @ cov[0] @ q[i])
            excess = deviation**2 / 2 if deviation < 2 else 2 * deviation - 2
            far = (counts * (mean_k @ q[i] + spread * excess).exp()) * ~near[own]
            numerator = numerator + far @ (mean_v + min(1.0, 2 / deviation) * (q[i] @ cov[1]))
            mass = mass + far.sum()
        out[i] = numerator / mass
    return out


GRIDS = {"image": TokenGrid(1, 16, 16, 5), "ragged": TokenGrid(1, 13, 9), "video": TokenGrid(5, 6, 7, 3), "frames": TokenGrid(3, 5, 7)}


@pytest.mark.parametrize("sharpness", [1, 4])
@pytest.mark.parametrize("head_dim", [40, 128])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_equals_the_dense_oracle(grid, head_dim, sharpness):
    gen = torch.Generator().manual_seed(1)
    tokens = grid.start + grid.tokens + 4
    q, k, v = (torch.randn(tokens, head_dim, generator=gen, dtype=torch.float64) for _ in range(3))
    q = sharpness * q / math.sqrt(head_dim)
    head = reference.Head(q, k, v, grid)
    near = reference.route(head, 0.3)
    assert not near.all()
    out = head.attend(near)
    expected = dense(q, k, v, grid, near)
    assert (out - expected).norm() / expected.norm() < 1e-12


OTHER_KEYS = {"many keys, a line": (None, None, 611), "few keys, a line": (TokenGrid(1, 16, 16, 5), None, 201),
              "a line to a video": (None, TokenGrid(5, 6, 7), 210), "text beside both": (TokenGrid(1, 13, 9, 4), TokenGrid(1, 16, 20, 7), 330)}


@pytest.mark.parametrize("case", OTHER_KEYS.values(), ids=OTHER_KEYS.keys())
def test_cross_attention_equals_the_dense_oracle(case):
    grid, key_grid, n_kv = case
    gen = torch.Generator().manual_seed(1)
    n_q = 150 if grid is None else grid.start + grid.tokens + 4
    q, k, v = (torch.randn(n, 40, generator=gen, dtype=torch.float64) for n in (n_q, n_kv, n_kv))
    q = q / math.sqrt(40)
    call = AttentionCall(q[None, None], k[None, None], v[None, None], 1.0, grid=grid, key_grid=key_grid)
    of_queries, of_keys = grids(call)
    head = reference.Head(q, k, v, of_queries, None, of_keys)
    near = reference.route(head, 0.3)
    assert near.shape == (len(members(of_queries, n_q)[1]), len(members(of_keys, n_kv)[1])) and not near.all()
    expected = dense(q, k, v, of_queries, near, of_keys)
    assert (head.attend(near) - expected).norm() / expected.norm() < 1e-12
    assert torch.equal(reference.attend(call, 0.3)[0, 0], head.attend(near))


def test_keys_without_a_grid_lie_in_blocks_of_64_in_a_row():
    index, filled = tile_index(TokenGrid(1, 1, 150))
    assert [index[b][filled[b]].tolist() for b in range(3)] == [list(range(64)), list(range(64, 128)), list(range(128, 150))]


def test_blocks_that_share_an_edge_or_a_corner_are_adjacent():
    around = adjacent(TokenGrid(1, 20, 31, 5))
    assert around.shape == (12, 12) and not bool(around.diagonal().any())  # 3 rows of 4 blocks
    assert around[5].nonzero().flatten().tolist() == [0, 1, 2, 4, 6, 8, 9, 10]
    assert around[3].nonzero().flatten().tolist() == [2, 6, 7]


def test_neighbours_are_near_before_blocks_with_more_mass_and_count():
    gen = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(120 * 112, 16, generator=gen) for _ in range(3))
    head = reference.Head(q * 0.25, k, v, TokenGrid(1, 120, 112))
    around = adjacent(TokenGrid(1, 120, 112))
    near = reference.route(head, 0.1)
    assert bool(near[around].all()) and float(near.float().mean()) < 0.106
    assert bool(reference.route(head, 0.01)[around].all())
    assert reference.Head(q[:64], k[:64], v[:64], TokenGrid(1, 8, 8)).neighbours is None


def test_every_query_block_sees_its_best_key_block_and_none_is_its_own():
    gen = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(640, 16, generator=gen) for _ in range(3))
    line = TokenGrid(1, 1, 640)
    own, other = reference.Head(q, k, v, line), reference.Head(q, k, v, line, None, line)
    mass = reference.masses(other.q_blocks, other.filled, other.blocks)
    near = reference.route(other, 0.01)
    assert near.sum(1).eq(1).all() and torch.equal(near.int().argmax(1), mass.argmax(1))
    assert torch.equal(reference.route(own, 0.01), near | torch.eye(10, dtype=torch.bool))


@pytest.mark.parametrize("n_kv", [83, 1500])
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "two masks"])
def test_density_one_is_exact_cross_attention(masked, n_kv):
    gen = torch.Generator().manual_seed(2)
    q = torch.randn(2, 4, 261, 48, generator=gen)
    k, v = (torch.randn(2, n_kv, 2, 48, generator=gen).transpose(1, 2) for _ in range(2))  # strided, GQA
    mask = torch.zeros(2, n_kv)
    mask[1, n_kv // 3 : n_kv // 2] = -torch.inf
    before = [x.clone() for x in (q, k, v)]
    for grid in (None, (1, 16, 16)):
        out = taylor_patch.attention(q, k, v, backend="near_far", grid=grid, text=grid and (0, 5), mask=mask[:, None] if masked else None,
                                     options={"density": 1.0, "min_keys": 1})
        full = [x.repeat_interleave(2, 1) for x in (k, v)]
        exact = torch.nn.functional.scaled_dot_product_attention(q, *full, attn_mask=mask[:, None, None] if masked else None)
        assert (out - exact).norm() / exact.norm() < 1e-5
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), before, strict=True))


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "key mask"])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_density_one_is_exact_attention(grid, masked, monkeypatch):
    gen = torch.Generator().manual_seed(2)
    tokens = grid.start + grid.tokens
    q = torch.randn(2, 4, tokens, 48, generator=gen)
    k, v = (torch.randn(2, tokens, 2, 48, generator=gen).transpose(1, 2) for _ in range(2))  # strided, GQA
    mask = torch.zeros(2, tokens)
    mask[1, tokens // 3 : tokens // 2] = -torch.inf
    monkeypatch.setenv("TAYLOR_PATCH_BACKENDS__NEAR_FAR__DENSITY", "1.0")
    before = [x.clone() for x in (q, k, v)]
    out = taylor_patch.attention(q, k, v, backend="near_far", grid=(grid.t, grid.h, grid.w), text=(0, grid.start),
                                 mask=mask[:, None] if masked else None)
    full = [x.repeat_interleave(2, 1) for x in (k, v)]
    bias = mask[:, None, None] if masked else None
    exact = torch.nn.functional.scaled_dot_product_attention(q, *full, attn_mask=bias)
    assert (out - exact).norm() / exact.norm() < 1e-5
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), before, strict=True))


@pytest.mark.parametrize("added", [-104.0, -1e4, 100.0])
@pytest.mark.parametrize("head_dim", [40, 128])
def test_what_is_added_to_a_whole_mask_changes_nothing(head_dim, added):
    """Weights exp(mask) would all vanish or overflow. A row of the mask that hides every key stays what it is."""
    grid, tokens = TokenGrid(1, 13, 19, 5), 5 + 13 * 19 + 9
    q, k, v = (torch.randn(3, 2, tokens, head_dim) for _ in range(3))
    mask = torch.zeros(3, tokens)
    mask[:, ::7], mask[1, tokens // 3 : tokens // 2], mask[2] = -0.5, -torch.inf, -torch.inf
    call = AttentionCall(q, k, v, head_dim**-0.5, mask, grid=grid)
    shifted = AttentionCall(q, k, v, head_dim**-0.5, mask + torch.tensor([added, 0.5 * added, added])[:, None], grid=grid)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
    out = reference.attend(shifted, 1.0)
    assert (out[:2] - exact[:2]).norm() / exact[:2].norm() < 1e-5
    for attend in (lambda call: reference.attend(call, 0.3), lambda call: reference.attend_aimed(call, None)[0]):
        assert torch.equal(attend(shifted)[:2], attend(call)[:2]) and attend(shifted)[:2].isfinite().all()
    assert not out[2].isfinite().any()


def test_refuses_cross_attention_with_few_keys_and_says_so():
    q, k = torch.randn(1, 2, 256, 64), torch.randn(1, 2, 2047, 64)
    with pytest.raises(taylor_patch.TaylorPatchError, match="cross-attention with fewer keys than min_keys = 2048"):
        taylor_patch.attention(q, k, k, backend="near_far")
    k = torch.randn(1, 2, 2048, 64)
    assert taylor_patch.explain(q, k, k, backend="near_far").backend is not None


@pytest.mark.parametrize("scale", [0.0, -0.125])
def test_refuses_a_scale_that_is_not_positive_and_says_so(scale):
    """The attention kernel takes the largest product of a row before it multiplies by the scale."""
    x = torch.randn(1, 2, 128, 64)
    with pytest.raises(taylor_patch.TaylorPatchError, match=f"scale {scale} is not positive"):
        taylor_patch.attention(x, x, x, backend="near_far", grid=(1, 8, 16), scale=scale)


def test_refuses_wide_heads_in_float32_on_cuda_and_says_so():
    """On tensors that have a device but no memory."""
    pytest.importorskip("triton", reason="Triton is not installed")

    def reasons(device, head_dim, dtype):
        x = torch.empty(1, 2, 128, head_dim, device=device, dtype=dtype)
        return NearFar().reasons_against(AttentionCall(x, x, x, 0.1, grid=TokenGrid(1, 8, 16)))

    with FakeTensorMode():
        assert reasons("cuda", 129, torch.float32) == ("float32 with head_dim above 128 does not fit in shared memory",)
        assert reasons("cuda", 128, torch.float32) == reasons("cuda", 256, torch.bfloat16) == reasons("cpu", 256, torch.float32) == ()


def test_refuses_without_a_grid_and_says_so():
    x = torch.randn(1, 2, 128, 64)
    with pytest.raises(taylor_patch.TaylorPatchError, match="grid"):
        taylor_patch.attention(x, x, x, backend="near_far")
