"""Every family, and what people do with them, in a real ComfyUI on the CPU: off is bit-identical; on is finite, repeats, and the numbers of
exact and of near_far calls are those that follow from the model."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from taylor_patch.errors import TaylorPatchError

from .conftest import latent, our_lines, starter, workflow

STEPS = 2
CROSS = "near_far: cross-attention with fewer keys than min_keys = 2048"
SMALL = "fewer tokens than min_tokens = 64"
ROWS, REFERENCE = "near_far: mask depends on the query row", "near_far: reference image tokens"
FULL = "the model asked for full precision"
BESIDE = {"latent": ["1", 3]}
AREA = {"width": 128, "height": 256, "x": 0, "y": 0, "strength": 1.0}
WINDOWS = {"context_length": 3, "context_overlap": 1, "context_schedule": "standard_static", "context_stride": 1, "closed_loop": False,
           "fuse_method": "pyramid", "dim": 2, "freenoise": False, "cond_retain_index_list": "", "split_conds_to_windows": False,
           "latent_retain_index_list": "", "causal_window_fix": False}

# Arguments of workflow(); evaluations; near_far calls and exact calls by reason, of all of them.
CASES = {
    "flux": ({}, 2, 6, {}),
    "flux2": ({}, 2, 6, {}),
    "chroma": ({}, 2, 6, {}),
    "sd15": ({}, 2, 14, {CROSS: 14}),
    "sdxl": ({}, 2, 8, {CROSS: 8}),
    "sd3": ({}, 2, 4, {}),
    "wan": ({}, 2, 4, {CROSS: 4}),
    "wan_i2v": ({}, 2, 4, {CROSS: 4, FULL: 4}),
    "wan_vace": ({}, 2, 6, {CROSS: 6}),
    "wan_animate": ({}, 2, 4, {CROSS: 4, FULL: 4}),
    "hunyuan_video": ({"cfg": 1.0}, 2, 6, {SMALL: 4}),
    "hunyuan_video_15": ({}, 2, 4, {SMALL: 4}),
    "qwen_image": ({}, 2, 4, {}),
    "lumina2": ({}, 2, 8, {SMALL: 4}),
    "z_image": ({}, 2, 8, {SMALL: 4}),
    "ltxv": ({}, 2, 4, {CROSS: 4}),
    "cosmos_predict2": ({}, 2, 4, {CROSS: 4}),
    "auraflow": ({}, 2, 6, {}),
    "hidream": ({}, 2, 4, {}),
    "krea2": ({}, 2, 4, {SMALL: 8}),
    "kandinsky5": ({}, 2, 4, {CROSS: 4, SMALL: 2}),
    "minimax_h3": ({"cfg": 1.0}, 2, 4, {}),
    "flux: Redux mask": ({"positive": ("TinyConditioningMask", BESIDE)}, 4, 6, {ROWS: 6}),
    "flux: Kontext reference": ({"positive": ("TinyReference", BESIDE)}, 4, 6, {REFERENCE: 6}),
    "qwen_image: edit reference": ({"positive": ("TinyReference", BESIDE)}, 4, 4, {REFERENCE: 4}),
    "flux: batch of 2 with cfg": ({"batch": 2}, 2, 6, {}),
    "wan: batch of 2 with cfg": ({"batch": 2}, 2, 4, {CROSS: 4}),
    "flux: Heun": ({"sampler": "heun"}, 3, 9, {}),
    "flux: DPM2": ({"sampler": "dpm_2"}, 3, 9, {}),
    "flux: regional prompt": ({"positive": ("ConditioningSetArea", AREA)}, 4, 12, {}),
    "sd15: ControlNet": ({"positive": ("TinyControlNet", BESIDE)}, 2, 14, {CROSS: 14}),
    "wan: context windows": ({"model": ("ContextWindowsManual", WINDOWS)}, 4, 8, {CROSS: 8}),
    "wan: Heun": ({"sampler": "heun"}, 3, 6, {CROSS: 6}),
}
NOT_IN = {"0.3.64": ("flux2", "hunyuan_video_15", "z_image", "krea2", "kandinsky5", "minimax_h3")}
# The wish for full precision came later.
OTHERWISE = {("0.3.64", case): (2, 4, {CROSS: 8}) for case in ("wan_i2v", "wan_animate")}


def flow(case):
    return workflow(case.partition(":")[0], **{"steps": STEPS, **CASES[case][0]})


@pytest.fixture(scope="module")
def version(checkout):
    return (checkout / "comfyui_version.py").read_text().split('"')[1]


@pytest.fixture(scope="module")
def cases(version):
    """Those that this version knows."""
    return [case for case in CASES if case.partition(":")[0] not in NOT_IN.get(version, ())]


@pytest.fixture(scope="module")
def servers(tmp_path_factory, checkout):
    return starter(tmp_path_factory.mktemp("families"), checkout)


def all_latents(server, cases):
    return {case: latent(server, flow(case)) for case in cases}


@pytest.fixture(scope="module")
def plain(servers, plain_python, cases):
    """Latents of a server that has no taylor_patch."""
    with servers(plain_python, name="plain") as server:
        return all_latents(server, cases)


@pytest.fixture(scope="module")
def off(servers, patched_python, cases):
    with servers(patched_python, {"TAYLOR_PATCH": "0"}, name="off") as server:
        return all_latents(server, cases)


# A given density and no limit of error: with random weights near_far would leave blocks to exact attention, as it should.
ON = {"TAYLOR_PATCH": "near_far", "TAYLOR_PATCH_MIN_TOKENS": "64", "TAYLOR_PATCH_QUALITY_LIMIT": "0",
      "TAYLOR_PATCH_BACKENDS__NEAR_FAR__DENSITY": "0.25"}


@pytest.fixture(scope="module")
def on(servers, patched_python, cases):
    """(first latents, second latents, the line of each first run)."""
    with servers(patched_python, ON, name="on") as server:
        first, lines = {}, {}
        for case in cases:
            first[case] = latent(server, flow(case))
            lines[case] = our_lines(server)[-1]
        return first, all_latents(server, cases), lines


def counts(line):
    """(evaluations, near_far calls, {reason: exact calls}) of a run's line."""
    evaluations, calls = int(re.search(r"(\d+) model evaluations", line)[1]), re.search(r"near_far (\d+)(?! s)", line)
    because = re.search(r"\(exact because: (.*?)\)(?:, |$)", line)
    reasons = dict(part.rsplit(": ", 1) for part in because[1].split("; ")) if because else {}
    return evaluations, int(calls[1]) if calls else 0, {reason: int(count) for reason, count in reasons.items()}


def tell(record_property, version, versions, case):
    """For benchmarks/compatibility.py: what a result is of."""
    record_property("comfyui", version)
    record_property("versions", versions)
    record_property("case", case)


@pytest.mark.parametrize("case", CASES)
class TestCase:
    @pytest.fixture(autouse=True)
    def known(self, case, cases, version, versions, record_property):
        tell(record_property, version, versions, case)
        if case not in cases:
            pytest.skip(f"ComfyUI {version} has no such model")

    def test_off_is_bit_identical(self, case, plain, off):
        assert bool(plain[case].isfinite().all()) and float(plain[case].std()) > 0.01
        assert torch.equal(off[case], plain[case])

    def test_on_is_finite_and_repeats(self, case, plain, on):
        first, second, _ = on
        assert bool(first[case].isfinite().all()) and torch.equal(first[case], second[case])
        assert not torch.equal(first[case], plain[case])

    def test_counts(self, case, on, version, record_property):
        line = on[2][case]
        record_property("calls", json.dumps(counts(line)))
        assert counts(line) == OTHERWISE.get((version, case), CASES[case][1:])
        assert "unknown" not in line


def post(server, path, content=None):
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", json.dumps(content or {}).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        reply.read()


def tiled():
    made = workflow("flux", steps=STEPS, size=2)
    made["2"]["class_type"] = "TinyTiledSampler"
    return made


def nested(result):
    """The outer run's latent (0) or that of the run inside it (1)."""
    made = workflow("flux", steps=STEPS)
    made["7"] = {"class_type": "TinyRandomModel", "inputs": {"family": "wan"}}
    inner = {"inner_model": ["7", 0], "inner_positive": ["7", 1], "inner_negative": ["7", 2], "inner_latent": ["7", 3]}
    made["2"] = {"class_type": "TinyNestedSampler", "inputs": {**made["2"]["inputs"], **inner}}
    made["5"]["inputs"]["latent"] = ["2", result]
    return made


def test_runs_for_tiles_and_a_run_inside_another(servers, patched_python, version, versions, record_property):
    """Tiles of other shapes within one prompt, and another model's run in a callback: each is counted and repeats, and the run inside and
    the one around it are what they are alone."""
    tell(record_property, version, versions, "tiled sampler, run inside a run")
    with servers(patched_python, ON, name="tiles") as server:
        alone = {family: latent(server, workflow(family, steps=STEPS)) for family in ("flux", "wan")}
        before = len(our_lines(server))
        first, second = latent(server, tiled()), latent(server, tiled())
        inner, outer = latent(server, nested(1)), latent(server, nested(0))
        lines = [line for line in our_lines(server)[before:] if "model evaluations" in line]
    assert first.shape[-1] == 2 * alone["flux"].shape[-1] and bool(first.isfinite().all()) and float(first.std()) > 0.01
    assert torch.equal(first, second)
    assert torch.equal(outer, alone["flux"]) and torch.equal(inner, alone["wan"])
    assert [counts(line) for line in lines] == [(2, 6, {})] * 4 + [(2, 4, {CROSS: 4}), (2, 6, {})] * 2, lines


def test_runs_after_one_another(servers, patched_python, on, version, versions, record_property):
    """An interrupt in mid-run, a model switch, another size, and two prompts in the queue: every run is as if it were alone."""
    tell(record_property, version, versions, "interrupt, model switch, other size, two prompts queued")
    expected, ours = on[0], {**ON, "TAYLOR_PATCH_LOG": "step"}
    with servers(patched_python, ours, name="sequence") as server, ThreadPoolExecutor(2) as pool:
        long = pool.submit(latent, server, workflow("flux", steps=500, size=4))
        end = time.monotonic() + 120
        while "step 1," not in server.log:
            assert time.monotonic() < end
            time.sleep(0.05)
        post(server, "/interrupt")
        with pytest.raises(TaylorPatchError, match="interrupted"):
            long.result()
        assert torch.equal(latent(server, flow("flux")), expected["flux"])
        assert torch.equal(latent(server, flow("wan")), expected["wan"])
        wide = latent(server, workflow("flux", steps=STEPS, size=2))
        assert torch.equal(latent(server, flow("flux")), expected["flux"])
        queued = list(pool.map(lambda case: latent(server, flow(case)), ["flux: batch of 2 with cfg", "sd15"]))
        assert torch.equal(queued[0], expected["flux: batch of 2 with cfg"]) and torch.equal(queued[1], expected["sd15"])
        lines = [line for line in our_lines(server) if "model evaluations" in line]
    assert bool(wide.isfinite().all()) and wide.shape[-1] == 2 * expected["flux"].shape[-1]
    assert len(lines) == 7 and "ended by InterruptProcessingException" in lines[0]
    assert [counts(line)[:2] for line in lines[1:5]] == [(2, 6), (2, 4), (2, 6), (2, 6)]
