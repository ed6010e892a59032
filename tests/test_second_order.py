"""The second-order term of the far field's value: its directions, what it is worth, and that its kernels compute it."""

import pytest
import torch

from taylor_patch.backends.near_far import blocks, reference
from taylor_patch.call import TokenGrid


def covariance(rank, dim, decay):
    """[D, D] float64 of trace 1 with eigenvalues that fall by `decay`, and its eigenvectors [D, rank]."""
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0][:, :rank]
    values = decay ** torch.arange(rank, dtype=torch.float64)
    return basis * (values / values.sum()) @ basis.T, basis


@pytest.mark.parametrize("dim", [16, 40, 128])
def test_directions_span_the_leading_eigenvectors(dim):
    matrix, basis = covariance(dim, dim, 0.6)
    found = blocks.leading_directions(matrix)
    assert torch.allclose(found.T @ found, torch.eye(blocks.RANK, dtype=torch.float64), atol=1e-9)
    assert float((found.T @ basis[:, :4]).square().sum(0).min()) > 0.99
    held = float((found.T @ matrix @ found).trace() / (basis[:, : blocks.RANK].T @ matrix @ basis[:, : blocks.RANK]).trace())
    assert 0.99 < held <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_directions_beyond_the_rank_are_zero(rank, dtype):
    matrix = covariance(rank, 64, 0.9)[0].to(dtype) if rank else torch.zeros(64, 64, dtype=dtype)
    found = blocks.leading_directions(matrix)
    lengths = found.norm(dim=0)
    assert torch.allclose(lengths[:rank], torch.ones(rank, dtype=dtype), atol=1e-5) and bool((lengths[rank:] == 0).all())


def curved(dtype=torch.float64, tokens=1024, dim=64, mean_square=0.0):
    """q (times scale), k, v [N, D] whose values are a square of what tells neighbouring keys apart, on a 32 x 32 grid."""
    gen = torch.Generator().manual_seed(2)
    q, k = (torch.randn(tokens, dim, generator=gen, dtype=torch.float64) for _ in range(2))
    k[:, 3:] *= 0.1
    v = (k[:, :1] ** 2 - mean_square) * torch.randn(1, dim, generator=gen, dtype=torch.float64)
    return 0.3 * q.to(dtype), k.to(dtype), v.to(dtype)


def far_error(head, exact):
    """Relative L2 with only the own blocks near."""
    out = head.attend(torch.eye(head.q_blocks.shape[0], dtype=torch.bool))
    return float((out - exact).norm() / exact.norm())


@pytest.mark.parametrize("mean_square", [0.0, 1.0])
def test_it_takes_most_of_the_error_of_curved_values(mean_square):
    q, k, v = curved(mean_square=mean_square)
    head = reference.Head(q, k, v, TokenGrid(1, 32, 32))
    exact = torch.softmax(q @ k.T, -1) @ v
    with_term = far_error(head, exact)
    head.blocks.third.zero_()
    assert with_term < 0.5 * far_error(head, exact)


def test_a_constant_taken_from_the_squares_changes_nothing():
    q, k, v = curved()
    made = reference.Head(q, k, v, TokenGrid(1, 32, 32)).blocks
    dk, dv = (k_or_v - mean[:, None] for k_or_v, mean in ((made.k, made.mean_k), (made.v, made.mean_v)))
    w = (dk @ made.directions).flatten(0, 1)
    square = blocks.squares(w) - blocks.squares(w).mean(0)
    assert torch.allclose(square.T @ dv.flatten(0, 1) / len(w), made.third, atol=1e-12)
