"""Each way in which a backend can break the contract gives its own finding."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

PLUGIN = """
import time
import torch
import taylor_patch

{top}

class Demo(taylor_patch.Backend):
    name = "demo"
    summary = "exact attention"
    gqa = False
    cross_attention = False
    {declaration}

    def workspace_nbytes(self, call):
        batch, heads, n_q, _ = call.q.shape
        {workspace}

    def run(self, call):
        {before}
        logits = call.q.float() @ call.k.float().transpose(-1, -2) * call.scale
        if call.key_mask is not None:
            logits = logits + call.key_mask[:, None, None]
        out = (torch.softmax(logits, -1) @ call.v.float()).to(call.q.dtype)
        {after}
        return out

    {method}

class Plugin:
    @staticmethod
    @taylor_patch.hookimpl
    def taylor_patch_register_backends():
        return [{registers}]
"""
WHOLE = {"top": "", "declaration": "", "workspace": "return 16 * batch * heads * n_q * call.k.shape[2] + 16 * call.q.numel()", "before": "pass",
         "after": "pass", "method": "", "registers": "Demo"}
# What is broken -> (the parts, the test that finds it, the finding).
BROKEN = {
    "import error": ({"top": "raise ImportError('no kernel library')"}, "test_loads", "cannot be loaded: ImportError: no kernel library"),
    "wrong object": ({"registers": "42"}, "test_loads", "it registered 42, which is neither a subclass"),
    "false capability": ({"before": "import dataclasses; call = dataclasses.replace(call, key_mask=None)"}, "test_key_mask",
                         "a key mask: relative error"),
    "writes into inputs": ({"before": "k = call.k; k -= k.mean(2, keepdim=True)"}, "test_inputs_are_unchanged", "writes into k"),
    "wrong shape": ({"after": "out = out[:, :, 1:]"}, "test_plainest_call", "the plainest call: returned [2, 2, 150, 64]"),
    "hangs on load": ({"top": "time.sleep(60)"}, "test_loads", "cannot be loaded: still loading after 5 s, at "),
    "newer api": ({"registers": "Demo]\n    taylor_patch_api = 3\n    more = ["}, "test_loads", "written for plugin API 3"),
    "other name": ({"declaration": "name = 'other'"}, "test_loads", "it registers other, not demo"),
    "no summary": ({"declaration": "summary = ''"}, "test_declaration", "has no summary"),
    "float64": ({"declaration": "dtypes = taylor_patch.Backend.dtypes | {torch.float64}"}, "test_declaration", "dtypes other than"),
    "refuses everything": ({"method": "def reasons_against(self, call): return ('not today',)"}, "test_plainest_call",
                           "refuses the plainest call (not today)"),
    "reasons are a text": ({"method": "def reasons_against(self, call): return 'no'"}, "test_plainest_call", "not a tuple of texts"),
    "never refuses": ({"declaration": "key_masks = False", "method": "def reasons_against(self, call): return ()"}, "test_key_mask",
                      "a key mask: not declared, but accepted"),
    "declared dtype refused": ({"method": "def reasons_against(self, call):\n        half = call.q.dtype == torch.float16\n"
                                          "        return super().reasons_against(call) + (('half',) if half else ())"},
                               "test_dtypes", "float16: declared, but refused (half)"),
    "ignores the scale": ({"before": "import dataclasses; call = dataclasses.replace(call, scale=0.125)"}, "test_scale",
                          "a scale that is not 1/sqrt(D): relative error"),
    "wrong heads": ({"declaration": "gqa = True", "before": "times = call.q.shape[1] // call.k.shape[1]; import dataclasses; "
                     "call = dataclasses.replace(call, k=call.k.repeat(1, times, 1, 1), v=call.v.repeat(1, times, 1, 1))"},
                    "test_gqa", "grouped-query attention: relative error"),
    "raises on other keys": ({"declaration": "cross_attention = True", "before": "assert call.q.shape == call.k.shape"},
                             "test_cross_attention", "cross-attention: accepted the call and then raised AssertionError"),
    "only contiguous": ({"before": "call.q.view(-1)"}, "test_layouts", "accepted the call and then raised RuntimeError"),
    "not finite": ({"after": "out[..., 0] = torch.nan"}, "test_plainest_call", "values that are not finite"),
    "unwritten output": ({"after": "out = torch.where(torch.empty_like(out).isnan(), 2 * out, out)"},
                         "test_every_output_is_written", "reads memory that it did not write"),
    "not deterministic": ({"after": "out = out + 1e-3 * torch.rand(())"}, "test_deterministic", "two runs differ"),
    "workspace too small": ({"workspace": "return 1024"}, "test_workspace", "bytes of temporary memory, workspace_nbytes says 1024"),
    "no workspace": ({"workspace": "return None"}, "test_workspace", "workspace_nbytes returned None"),
    "returns its input": ({"before": "return call.v"}, "test_result_is_its_own", "returns the memory of v"),
    "reads values": ({"workspace": "return int(call.q.abs().max()) + (1 << 24)"}, "test_reasons_and_workspace_read_shapes_only",
                     "reads the values of tensors"),
    "other result when compiled": ({"after": "out = out * (2 if torch.compiler.is_compiling() else 1)"},
                                   "test_compiles", "gives another result inside torch.compile"),
    "hidden keys": ({"after": "out = out + 0.02 * call.v.mean()"},
                    "test_hidden_keys_do_not_matter", "keys that the mask hides change the result"),
}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What one run of pytest prints for a sound backend and, of each broken one, the test that is to find it."""
    folder = tmp_path_factory.mktemp("broken")
    lines, wanted = ["from taylor_patch.testing import conformance"], ["test_all.py::TestSound"]
    for number, (parts, test, _) in enumerate([({}, "", ""), *BROKEN.values()]):
        (folder / f"plugin_{number}.py").write_text(PLUGIN.format(**{**WHOLE, **parts}))
        name = f"Test{number}" if number else "TestSound"
        lines.append(f'{name} = conformance("plugin_{number}:Plugin", "demo", load_seconds=5)')
        wanted += [f"test_all.py::{name}::{test}"] if number else []
    (folder / "test_all.py").write_text("\n".join(lines))
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rf", "--rootdir", folder, *wanted], cwd=folder,
                          env={**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "400"}, capture_output=True, text=True, timeout=300)
    return done.stdout + done.stderr


def test_a_sound_backend_passes(report):
    assert "TestSound" not in report and "TestConformance" not in report, report
    assert re.search(r"\d\d passed", report) and re.search("demo: .*error float32 .*, workspace [0-9]+ KiB of", report), report


@pytest.mark.parametrize("kind", BROKEN)
def test_finding(report, kind):
    number = list(BROKEN).index(kind) + 1
    _, test, finding = BROKEN[kind]
    failed = [line for line in report.splitlines() if line.startswith(f"FAILED test_all.py::Test{number}::{test}")]
    assert any('backend "demo": ' in line and finding in line for line in failed), failed or report


def test_findings_differ():
    found = [finding for _, _, finding in BROKEN.values()]
    assert len(set(found)) == len(found)


BREAKS_THE_DEVICE = """
import pytest
import taylor_patch
import torch
from taylor_patch.testing import conformance, suite

asked = []

class Demo(taylor_patch.Backend):
    name, summary = "demo", "leaves the device unusable where rows do not begin at 16 bytes"

    def workspace_nbytes(self, call):
        return 1 << 30

    def run(self, call):
        if call.q.data_ptr() % 16:
            asked.append(call)
        return taylor_patch.attention(call.q, call.k, call.v, mask=call.key_mask, scale=call.scale, backend="sdpa")

class Plugin:
    @staticmethod
    @taylor_patch.hookimpl
    def taylor_patch_register_backends():
        return [Demo]

@pytest.fixture(autouse=True, scope="session")
def a_device_that_breaks():
    suite.device_error = lambda device: "AcceleratorError: CUDA error: misaligned address" if asked else None

TestDemo = conformance(Plugin, "demo")
TestOther = conformance("taylor_patch.plugins:BuiltinBackends", "sdpa")
"""


def test_a_broken_device_is_the_finding_of_one_test_only(tmp_path):
    (tmp_path / "test_all.py").write_text(BREAKS_THE_DEVICE)
    wanted = [f"test_all.py::{test}" for test in ("TestDemo::test_dtypes", "TestDemo::test_layouts", "TestDemo::test_gqa",
                                                  "TestOther::test_plainest_call")]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rfEs", "--rootdir", tmp_path, *wanted],
                          cwd=tmp_path, env={**os.environ, "COLUMNS": "400"}, capture_output=True, text=True, timeout=300)
    name = "test_layouts[data that is not aligned]"
    assert f"FAILED test_all.py::TestDemo::{name}" in done.stdout, done.stdout + done.stderr
    assert "accepted the call and then raised RuntimeError: AcceleratorError: CUDA error: misaligned address" in done.stdout
    assert f'backend "demo": {name} left device cpu unusable for the rest of the process' in done.stdout
    assert f"not run: test_all.py::TestDemo::{name} left device cpu unusable" in done.stdout
    assert re.search(r"1 failed, 7 passed, 2 skipped, 1 error", done.stdout), done.stdout
