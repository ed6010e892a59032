"""near_far with an error instead of a density, through the hooks: what is settled when, and where it gives up."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from taylor_patch import engine as engines
from taylor_patch.backends.near_far import aim, plan, reference
from taylor_patch.backends.targets import sigma_bin

HEADS, DIM, SIDE, TEXT = 2, 16, 32, 8
AUTO = '[taylor_patch]\nbackend = "near_far"\nquality_limit = 0\nquality = 0.1\n'


def qkv(noise):
    """Smooth over the image; [1, TEXT + SIDE^2, HEADS * DIM]."""
    gen = torch.Generator().manual_seed(0)
    made = []
    for _ in range(3):
        field = F.interpolate(torch.randn(1, HEADS * DIM, 4, 4, generator=gen), (SIDE, SIDE), mode="bilinear").flatten(2).transpose(1, 2)
        x = torch.cat([torch.randn(1, TEXT, HEADS * DIM, generator=gen), 2 * field], 1)
        made.append(x + noise * torch.randn(x.shape, generator=gen))
    return made


def sample(comfy, inputs, sigmas, blocks=2):
    def body(options):
        for block in range(blocks):
            comfy.attention.optimized_attention(*inputs, HEADS, transformer_options={**options, "block_index": block})

    comfy.sample(body, sigmas=sigmas, latent=(1, 16, 2 * SIDE, 2 * SIDE))
    return engines.current().last_run


@pytest.fixture
def probes(monkeypatch):
    """(block, sigma) of every call that was probed."""
    seen = []
    original = reference.attend_aimed

    def attend_aimed(call, settled):
        if settled is None:
            seen.append((call.block, round(call.sigma, 3)))
        return original(call, settled)

    monkeypatch.setattr(reference, "attend_aimed", attend_aimed)
    return seen


def test_a_block_is_probed_once_a_sigma_bin_and_again_in_the_next_run(comfy, configure, probes):
    configure(AUTO)
    inputs = qkv(0.1)
    assert sigma_bin(1.0) == sigma_bin(0.9) + 1 == sigma_bin(0.8) + 1 and sigma_bin(14.6) == 14 and sigma_bin(0.0) == 0
    last = sample(comfy, inputs, (1.0, 0.9, 0.8, 0.0))
    assert probes == [(0, 1.0), (1, 1.0), (0, 0.9), (1, 0.9)] and last.calls == {"near_far": 6}
    probes.clear()
    sample(comfy, inputs, (0.9, 0.8, 0.0))
    assert probes == [(0, 0.9), (1, 0.9)]


def test_cross_attention_is_probed_for_each_shape_and_meets_the_target(comfy, configure, probes):
    configure(AUTO + "[backends.near_far]\nmin_keys = 200\n")
    q, k, v = qkv(0.1)
    found = []

    def body(options):
        for n_q in (TEXT + SIDE * SIDE, 600):
            arguments = q[:, :n_q], k[:, TEXT:], v[:, TEXT:], HEADS  # to the image, whose grid is known
            out = comfy.attention.optimized_attention(*arguments, transformer_options={**options, "block_index": 0})
            exact = comfy.original(*arguments)
            found.append(float((out - exact).norm() / exact.norm()))

    comfy.sample(body, sigmas=(0.9, 0.8, 0.0), latent=(1, 16, 2 * SIDE, 2 * SIDE))
    assert probes == [(0, 0.9), (0, 0.9)] and engines.current().last_run.calls == {"near_far": 4}
    assert min(found) > 0.001 and max(found) < 0.1, found


def test_the_records_have_the_density(comfy, configure):
    configure(AUTO)
    found = []
    original = engines.Engine.record
    try:
        engines.Engine.record = lambda self, run, step: (found.append(step), original(self, run, step))[1]
        sample(comfy, qkv(0.1), (1.0, 0.5, 0.0))
    finally:
        engines.Engine.record = original
    densities = [block.observed["density"] for step in found for block in step.blocks]
    assert len(densities) == 4 and all(min(aim.DENSITIES) * 0.999 <= density <= 0.5 for density in densities)


def test_blocks_that_would_be_no_faster_are_exact_and_looked_at_again(comfy, configure, probes):
    configure(AUTO)
    last = sample(comfy, qkv(3.0), [1 - 0.01 * step for step in range(7)] + [0.0], blocks=1)
    # The first evaluation finds out; the next ones are exact; then the block is tried again.
    again = engines.LOOK_AGAIN
    assert last.calls == {"near_far": 2, "exact": 5} and again == 4
    ((reason, count),) = last.fallbacks.items()
    assert count == 5 and "the error asked for needs more than 55% of the blocks exact, which is no faster" in reason
    assert plan.LARGEST_DENSITY < 1
