"""near_far against a dense float64 oracle written from the formula."""

import math

import pytest
import torch

import taylor_patch
from taylor_patch.backends.near_far import reference
from taylor_patch.backends.tiles import tile_index
from taylor_patch.call import TokenGrid


def dense(q, k, v, grid, near):
    """q times scale, all [N, D] float64; near [blocks, blocks]: every query against every key and block mean, in N x N."""
    index, filled = tile_index(grid)
    block_of = torch.full((q.shape[0],), -1)
    for b in range(index.shape[0]):
        block_of[index[b][filled[b]] + grid.start] = b
    members = [(block_of == b).nonzero().flatten() for b in range(index.shape[0])]
    mean_k, mean_v = (torch.stack([x[m].mean(0) for m in members]) for x in (k, v))
    n = grid.tokens
    cov = [sum((k[m] - k[m].mean(0)).T @ (x[m] - x[m].mean(0)) for m in members) / n for x in (k, v)]
    trace = torch.tensor([((k[m] - k[m].mean(0)) ** 2).sum() / len(m) for m in members], dtype=torch.float64)
    counts = torch.tensor([len(m) for m in members], dtype=torch.float64)
    spread = trace / ((trace * counts).sum() / n)
    out = torch.empty_like(q)
    for i in range(q.shape[0]):
        own = block_of[i]
        seen = torch.ones(q.shape[0], dtype=torch.bool) if own < 0 else (block_of < 0) | near[own][block_of.clamp_min(0)]
        weight = (q[i] @ k.T).exp() * seen
        numerator, mass = weight @ v, weight.sum()
        if own >= 0:
            far = (counts * (mean_k @ q[i] + 0.5 * spread * (q[i] @ cov[0] @ q[i])).exp()) * ~near[own]
            numerator = numerator + far @ (mean_v + q[i] @ cov[1])
            mass = mass + far.sum()
        out[i] = numerator / mass
    return out


GRIDS = {"image": TokenGrid(1, 16, 16, 5), "ragged": TokenGrid(1, 13, 9), "video": TokenGrid(5, 6, 7, 3), "frames": TokenGrid(3, 5, 7)}


@pytest.mark.parametrize("head_dim", [40, 128])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_equals_the_dense_oracle(grid, head_dim):
    gen = torch.Generator().manual_seed(1)
    tokens = grid.start + grid.tokens + 4
    q, k, v = (torch.randn(tokens, head_dim, generator=gen, dtype=torch.float64) for _ in range(3))
    q = q / math.sqrt(head_dim)
    head = reference.Head(q, k, v, grid)
    near = reference.route(head, 0.3)
    assert not near.all()
    out = head.attend(near)
    expected = dense(q, k, v, grid, near)
    assert (out - expected).norm() / expected.norm() < 1e-12


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


def test_refuses_without_a_grid_and_says_so():
    x = torch.randn(1, 2, 128, 64)
    with pytest.raises(taylor_patch.TaylorPatchError, match="grid"):
        taylor_patch.attention(x, x, x, backend="near_far")
