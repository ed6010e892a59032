"""Several sampling runs at once, and one run whose evaluations are spread over threads, as ComfyUI does with several GPUs."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch

from taylor_patch import engine as engines
from taylor_patch.run import describe, evaluation
from tests.test_hooks import HEADS, SPARSE, qkv

RULES = SPARSE.replace("[backends", "start_percent = 0.5\n[backends") + '[[rules]]\nwhen = { tokens = ">=400" }\nbackend = "taylor_torch"\n'
KINDS = {"small": ((1, 4, 32, 32), 264, (8.0, 6.0, 4.0, 2.0, 0.0)), "large": ((1, 4, 40, 40), 408, (0.9, 0.6, 0.3, 0.0))}


@pytest.mark.parametrize("route", ["module", "override"])
def test_two_runs_at_once(comfy, configure, monkeypatch, route):
    """Other sigmas, latents and tokens in each thread, call by call in turn: counts and values as when each runs alone."""
    configure(RULES.replace("[backends", f'hook = "{route}"\n[backends', 1))
    inputs = {kind: qkv(tokens=tokens) for kind, (_, tokens, _) in KINDS.items()}
    summaries = []
    monkeypatch.setattr(engines.engine().registry, "notify", lambda hook, summary=None, **rest: summaries.append(summary))

    def work(kind, wait):
        latent, _, sigmas = KINDS[kind]

        def body(o):
            outs = []
            for _ in range(3):
                wait()
                outs.append(comfy.attention.optimized_attention(*inputs[kind], HEADS, transformer_options=o))
            return torch.stack(outs)

        return comfy.sample(body, latent=latent, sigmas=sigmas)

    def counts():
        found = [(s.steps, s.evaluations, s.calls, s.fallbacks) for s in sorted(summaries, key=lambda s: s.steps)]
        summaries.clear()
        return found

    alone, expected = {}, []
    for kind in ("large", "small"):
        alone[kind] = work(kind, lambda: None)
        expected += counts()
    assert [(steps, calls) for steps, _, calls, _ in expected] == [(3, {"exact": 3, "taylor_torch": 6}), (4, {"exact": 6, "near_far": 6})]

    barrier = threading.Barrier(2, timeout=60)

    def in_turn():
        with suppress(threading.BrokenBarrierError):  # the other run has ended
            barrier.wait()

    def together(kind):
        try:
            return work(kind, in_turn)
        finally:
            barrier.abort()

    with ThreadPoolExecutor(2) as pool:
        running = {kind: pool.submit(together, kind) for kind in KINDS}
        outs = {kind: future.result(120) for kind, future in running.items()}
    assert counts() == expected
    for kind in KINDS:
        assert len(outs[kind]) == len(alone[kind]) and all(torch.equal(a, b) for a, b in zip(outs[kind], alone[kind], strict=True))


def test_one_run_over_two_threads(comfy, configure):
    """Evaluations of the same run at the same time: every call is counted, and each knows its own number."""
    configure(SPARSE)
    q, k, v = qkv(tokens=264)
    model = comfy.model_base.Flux(None)
    barrier = threading.Barrier(2, timeout=60)
    calls, rounds = 200, 2

    def worker(run):
        numbers = []
        for _ in range(rounds):
            with evaluation(describe(run, model, (1, 4, 32, 32), 1.0)) as e:
                barrier.wait()
                for _ in range(calls):
                    comfy.attention.optimized_attention(q, k[:, :9], v[:, :9], HEADS, transformer_options={"sigmas": torch.ones(1)})
                numbers.append(e.calls)
        return numbers

    with engines.engine().run([1.0, 0.0]) as run, ThreadPoolExecutor(2) as pool:
        numbers = [future.result(120) for future in [pool.submit(worker, run) for _ in range(2)]]
    assert numbers == [[calls] * rounds] * 2
    last = engines.current().last_run
    assert last.calls == {"exact": 4 * calls} and last.evaluations == 4
    assert last.fallbacks == {"near_far: cross-attention with fewer keys than min_keys = 2048": 4 * calls}
