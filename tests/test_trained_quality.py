"""The demo's trained model, at 128 x 128 pixels on the CPU and 256 x 256 on a GPU: the errors that `quality` asks for, what the log
file says, and what the picture is worth."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import sympy
import torch

from taylor_patch import config, guard
from taylor_patch import engine as engines
from taylor_patch.backends.base import Fallback
from taylor_patch.backends.near_far import reference
from taylor_patch.backends.taylor.options import TaylorOptions
from taylor_patch.backends.taylor.plain import TaylorTorch
from taylor_patch.call import AttentionCall, TokenGrid
from taylor_patch.demo import host as demo
from taylor_patch.demo import model as demo_model
from taylor_patch.hooks.attention import replace

HOSTS = [pytest.param(("cpu", 128, 4), id="128 pixels, CPU"),
         pytest.param(("cuda", 256, 24), id="256 pixels, GPU", marks=[
             pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")])]
"""(device, pixels a side, steps)"""
SAMPLES, SAMPLED_KEYS, SORTED_LOGITS = 16, 64, 4096


def spread(total, count, seed):
    """`count` indices at the largest even distance that is prime, moved along by the seed: as docs/adr/0006 has it."""
    distance = max(1, sympy.prevprime(total // count + 1)) if total // count > 1 else 1
    return seed % (total - distance * (count - 1)) + distance * np.arange(count)


def figures(q, k, v, out, seed):
    """The figures of one call in float64 by numpy. q, k, v: [1, H, N, D]; out: [1, N, H * D]."""
    q, k, v, out = (x[0].double().cpu().numpy() for x in (q, k, v, out))
    heads, tokens, dim = q.shape
    rows, keys = spread(tokens, max(SAMPLES, -(-SAMPLES * 24 // heads)), seed), spread(tokens, SAMPLED_KEYS, seed)
    ours = out.reshape(tokens, heads, dim).transpose(1, 0, 2)[:, rows]
    logits = q[:, rows] @ k.transpose(0, 2, 1) / np.sqrt(dim)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    exact = weights / weights.sum(-1, keepdims=True) @ v
    error = np.linalg.norm(ours - exact) / np.linalg.norm(exact)
    some = (q[:, rows] @ k[:, keys].transpose(0, 2, 1) / np.sqrt(dim)).flatten()
    p01, p50, p99 = np.quantile(some[:: -(-some.size // SORTED_LOGITS) | 1], [0.01, 0.5, 0.99], method="nearest")
    return {"quality_raw": error, "quality_eff": error, "q_norm": np.linalg.norm(q[:, rows], axis=-1).mean(),
            "k_norm": np.linalg.norm(k[:, keys], axis=-1).mean(), "logit_p01": p01, "logit_p50": p50, "logit_p99": p99,
            "logit_max": np.abs(some).max()}


class Captured:
    """The patched attention, with the figures of every call computed from its q, k, v."""

    def __init__(self, wanted, steps):
        self.wanted, self.steps, self.attention = wanted, steps, replace(demo.exact_attention)
        self.numbers, self.found = Counter(), {}

    def __call__(self, q, k, v, heads, **kwargs):
        out = self.attention(q, k, v, heads, **kwargs)
        if self.wanted:
            step = round((1 - float(kwargs["transformer_options"]["sigmas"])) * self.steps)
            self.numbers[step] += 1
            self.found[step, self.numbers[step] - 1] = figures(q, k, v, out, 1009 * self.numbers[step] + 31 * step)
        return out


@pytest.fixture(scope="module", params=HOSTS)
def made(request, tmp_path_factory):
    """Quality -> (picture, lines of the log file, captured figures)."""
    device, size, steps = request.param
    folder, found = tmp_path_factory.mktemp("quality"), {}
    network, texts, vectors = demo_model.load(torch.device(device))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        for name in ("sdpa", *config.QUALITIES):
            log = folder / f"{name}.jsonl"
            settings = {"backend": "sdpa"} if name == "sdpa" else {"backend": "near_far", "quality": name}
            engine = engines.Engine({"taylor_patch": {**settings, "log_file": str(log), "quality_limit": 0.0}}, environ={})
            engines.use(engine)
            captured = Captured(name == "balanced", steps)
            picture, _ = demo.sample(demo.Flux(network), texts[17:18], vectors[17:18], size, steps, 0, engine, captured, lambda: None)
            found[name] = picture, [json.loads(line) for line in log.read_text().splitlines()], captured.found
    engines.reset()
    return found


def errors(lines):
    return [block["figures"]["quality_raw"] for line in lines if line["kind"] == "step" for block in line["blocks"] if block["figures"]]


@pytest.mark.parametrize("quality", ["lossless", "balanced", "fast"])
def test_the_recorded_error_is_under_what_was_asked_for(made, quality):
    found = errors(made[quality][1])
    assert len(found) >= 5 and np.quantile(found, 0.9) < config.QUALITIES[quality], found


def test_the_picture_is_the_better_the_less_error_is_allowed(made):
    psnr = [demo.psnr(made["sdpa"][0], made[quality][0]) for quality in config.QUALITIES]
    assert psnr == sorted(psnr, reverse=True) and psnr[0] > 36 and psnr[2] > 25, psnr


def test_the_log_file_has_what_q_k_v_give(made):
    _, lines, captured = made["balanced"]
    compared = 0
    for line in lines:
        for block in line.get("blocks", ()):
            if block["figures"]:
                expected = captured[line["step"], block["block"]]
                assert set(expected) == set(guard.FIGURES)
                assert block["figures"] == pytest.approx(expected, rel=0.01, abs=1e-3), (line["step"], block["block"])
                compared += 1
    steps = sum(line["kind"] == "step" for line in lines)
    assert compared >= 5 and len(captured) == 5 * steps


@pytest.fixture(scope="module")
def halfway():
    """q, k, v [1, 2, 48 * 48, D] of the image's tokens in three blocks, halfway through a run at 96 x 96 pixels."""
    network, texts, vectors = demo_model.load(torch.device("cpu"))
    calls = []

    def attention(q, k, v, heads, **kwargs):
        calls.append([x[:, :, -48 * 48 :] for x in (q, k, v)])
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    x = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for t in (1.0, 0.75, 0.5):
            calls.clear()
            x = x - 0.25 * network(x, torch.full((1,), t), texts[17:18], vectors[17:18], attention, {})
    return calls[:3]


@pytest.mark.parametrize("key_grid", [TokenGrid(1, 48, 48), None], ids=["keys with a grid", "keys in a line"])
def test_cross_attention_between_trained_tensors_meets_the_target(halfway, key_grid):
    """The upper half of the picture looks at all of it."""
    found, densities = [], []
    for q, k, v in halfway:
        call = AttentionCall(q[:, :, : 24 * 48], k, v, q.shape[-1] ** -0.5, grid=TokenGrid(1, 24, 48), key_grid=key_grid, target_error=0.1)
        out, settled = reference.attend_aimed(call, None)
        exact = torch.nn.functional.scaled_dot_product_attention(call.q.double(), k.double(), v.double())
        found += ((out - exact).norm(dim=(2, 3)) / exact.norm(dim=(2, 3))).flatten().tolist()
        densities += settled.setting[:, 0].tolist()
    # Nine heads in ten meet it; of these six one may miss it a little.
    assert sorted(found)[-2] < 0.1 and max(found) < 0.12 and np.mean(densities) < 0.3, (found, densities)


def test_error_aimed_series_of_a_trained_model_meet_the_target_or_are_exact(halfway):
    """With 2,304 keys of 128 coordinates P 2 alone has fewer features. It meets an error of .9 in some block, and .03 in none."""
    found = {}
    for target in (0.03, 0.9):
        for number, (q, k, v) in enumerate(halfway):
            call = AttentionCall(q, k, v, q.shape[-1] ** -0.5, target_error=target)
            try:
                out = TaylorTorch(TaylorOptions(error_aimed=True)).run(call)
            except Fallback:
                continue
            exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
            found[target, number] = float((out - exact).norm() / exact.norm())
    assert all(error < target for (target, _), error in found.items()), found
    assert {target for target, _ in found} == {0.9}, found
