"""taylor_torch against the polynomial of the logits, evaluated densely in float64."""

import math

import pytest
import torch

from taylor_patch.backends.base import Fallback
from taylor_patch.backends.taylor.options import TaylorOptions
from taylor_patch.backends.taylor.plain import TaylorTorch
from taylor_patch.call import AttentionCall


def dense(q, k, v, scale, terms, hermite):
    k = k - k.mean(2, keepdim=True)
    x = scale * q @ k.transpose(-1, -2)
    if hermite:
        covariance = k.transpose(-1, -2) @ k / k.shape[2]
        s2 = (((scale * q) @ covariance) * scale * q).sum(-1, keepdim=True)
        s = s2.sqrt()
        y = x / s
        polynomials = [torch.ones_like(y), y]
        while len(polynomials) < terms:
            polynomials.append(y * polynomials[-1] - (len(polynomials) - 1) * polynomials[-2])
        weight = sum(s**p / math.factorial(p) * polynomials[p] for p in range(terms))
    else:
        weight = sum(x**p / math.factorial(p) for p in range(terms))
    return weight @ v / weight.sum(-1, keepdim=True)


@pytest.mark.parametrize("coefficients", ["taylor", "hermite"])
@pytest.mark.parametrize("terms", [1, 2, 3, 4])
def test_equals_the_polynomial(terms, coefficients):
    gen = torch.Generator().manual_seed(terms)
    q = torch.randn(1, 2, 37, 16, generator=gen, dtype=torch.float64)
    k, v = (torch.randn(1, 2, 51, 16, generator=gen, dtype=torch.float64) for _ in range(2))
    options = TaylorOptions(P=terms, coefficients=coefficients, fused_feature_chunk_size=100, block_size_q=16, block_size_k=20,
                            fallback_on_negative=False)
    out = TaylorTorch(options).run(AttentionCall(q, k, v, 0.25))
    expected = dense(q, k, v, 0.25, terms, coefficients == "hermite")
    assert (out - expected).norm() / expected.norm() < 1e-10


def test_refusal_states_the_number_of_features():
    x = torch.randn(1, 1, 200, 128)
    reasons = TaylorTorch(TaylorOptions(P=5)).reasons_against(AttentionCall(x, x, x, 1.0))
    assert any("R = 12082785" in reason and "370000" in reason and "P 5" in reason for reason in reasons)


def test_negative_denominators_fall_back():
    x = torch.randn(1, 1, 200, 16, generator=torch.Generator().manual_seed(0)) * 6
    with pytest.raises(Fallback, match="denominators"):
        TaylorTorch(TaylorOptions(P=4)).run(AttentionCall(x, x.clone().neg(), x, 1.0))
