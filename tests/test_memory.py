"""What the memory hook adds to ComfyUI's estimate."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from taylor_patch import engine as engines
from taylor_patch.memory import Workspaces
from tests.test_hooks import HEADS, SPARSE, qkv

SHAPE = (1, 16, 64, 64)


class Flux:
    """Named as ComfyUI's; 32 x 32 = 1,024 image tokens at SHAPE."""

    def __init__(self, **attributes):
        self.diffusion_model = SimpleNamespace(patch_size=2, **attributes)


def estimate(comfy, model, shape=SHAPE, dynamic=False):
    patcher = SimpleNamespace(model=model, is_dynamic=lambda: dynamic, load_device=torch.device("cpu"))
    return comfy.modules["comfy.sampler_helpers"].estimate_memory(patcher, shape, {})


def test_prediction_from_the_latent(comfy, configure, caplog):
    configure(SPARSE)
    engines.engine()
    caplog.set_level("INFO")
    model = Flux(num_heads=4, hidden_size=512)
    required, minimum = estimate(comfy, model)
    assert required - 1000 == minimum - 500 > 2**20
    assert "MiB are kept free for the attention of Flux" in caplog.text
    assert estimate(comfy, model, (1, 16, 128, 128))[0] > 2 * required
    assert estimate(comfy, model, (1, 16, 1, 64, 64))[0] == required


@pytest.mark.parametrize(("text", "model", "dynamic"), [
    (SPARSE, Flux(num_heads=4, hidden_size=512), True),
    (SPARSE, Flux(), False),
    (SPARSE.replace("[backends", "memory_reserve = false\n[backends"), Flux(num_heads=4, hidden_size=512), False),
    ('[taylor_patch]\nbackend = "sdpa"\n', Flux(num_heads=4, hidden_size=512), False),
    ("", Flux(num_heads=4, hidden_size=512), False),
], ids=["dynamic", "heads-unknown", "switched-off", "exact", "auto-has-nothing"])
def test_nothing_is_added(comfy, configure, text, model, dynamic):
    configure(text)
    assert estimate(comfy, model, dynamic=dynamic) == (1000, 500)


def test_factor(comfy, configure):
    model = Flux(num_heads=4, hidden_size=512)
    added = []
    for factor in (1.0, 2.0):
        configure(SPARSE.replace("[backends", f"memory_reserve_factor = {factor}\n[backends"))
        added.append(estimate(comfy, model)[0] - 1000)
    assert added[1] == 2 * added[0]


def test_a_run_that_was_seen_counts_more_than_the_prediction(comfy, configure):
    configure(SPARSE)
    q, k, v = qkv()
    latent = (1, 4, 32, 32)
    comfy.sample(lambda o: comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=o), latent=latent)
    stated = engines.current().workspaces.of("Flux", latent)
    assert stated and estimate(comfy, Flux(num_heads=4, hidden_size=512), latent)[0] == 1000 + int(stated * 1.1)
    assert engines.current().workspaces.of("Flux", (1, 16, 8, 8)) is None


def test_a_hook_that_fails_leaves_the_estimate(comfy, configure, caplog):
    configure(SPARSE)
    assert comfy.modules["comfy.sampler_helpers"].estimate_memory(None, SHAPE, {}) == (1000, 500)
    assert "no memory is reserved (AttributeError" in caplog.text


def test_a_backend_that_does_not_state_its_workspace_still_answers(comfy, configure, monkeypatch):
    configure(SPARSE)

    def unknown(call):
        raise NotImplementedError("not stated")

    monkeypatch.setattr(engines.engine().router.backends["near_far"], "workspace_nbytes", unknown, raising=False)
    q, k, v = qkv()
    comfy.sample(lambda o: comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=o))
    assert engines.current().last_run.calls == {"near_far": 1}
    assert engines.current().workspaces.of("Flux", (1, 4, 32, 32)) is None


def test_records_are_bounded_and_keep_the_largest():
    peaks = Workspaces()
    for size in range(100):
        peaks.record("Flux", (1, 4, size, size), 10)
    assert peaks.of("Flux", (1, 4, 0, 0)) is None and peaks.of("Flux", (2, 4, 99, 99)) == 10
    peaks.record("Flux", (1, 4, 99, 99), 5)
    assert peaks.of("Flux", (1, 4, 99, 99)) == 10
    peaks.record("Flux", None, 5)
