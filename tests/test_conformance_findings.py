"""Each way in which a backend can break the contract gives its own finding."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PLUGIN = """
import dataclasses
import time
import torch
import taylor_patch
from taylor_patch.backends.base import Fallback, note_not_finite

{top}

class Demo(taylor_patch.Backend):
    name = "demo"
    summary = "exact attention"
    {declaration}

    def __init__(self, options=None):
        super().__init__(options)
        self.kept = {{}}

    def workspace_nbytes(self, call):
        batch, heads, n_q, _ = call.q.shape
        {workspace}

    def run(self, call):
        {before}
        k, v = (x.repeat_interleave(call.q.shape[1] // x.shape[1], 1).float() for x in (call.k, call.v))
        logits = call.q.float() @ k.transpose(-1, -2) * call.scale
        if call.key_mask is not None:
            logits = logits + call.key_mask[:, None, None]
        out = (torch.softmax(logits, -1) @ v).to(call.q.dtype)
        {after}
        return out

    {method}

class Plugin:
    @staticmethod
    @taylor_patch.hookimpl
    def taylor_patch_register_backends():
        return [{registers}]
"""
WHOLE = {"top": "", "declaration": "", "workspace": "return 16 * batch * heads * n_q * call.k.shape[2] + 64 * call.q.numel()", "before": "pass",
         "after": "pass", "method": "", "registers": "Demo"}


def replaced(**fields):
    """Lines of run() that work on another call; the fields are expressions of `call`."""
    return f"call = dataclasses.replace(call, {', '.join(f'{name}={value}' for name, value in fields.items())})"


def wrong_where(condition):
    """Lines of run() that give zeros to calls of one kind."""
    return f"out = torch.zeros_like(out) if {condition} else out"


CACHED = "c = self.kept.setdefault({key}, (call.k.clone(), call.v.clone())); " + replaced(k="c[0]", v="c[1]")
GQA, CROSS = "call.k.shape[1] != call.q.shape[1]", "call.k.shape[2] != call.q.shape[2]"
SMOOTHED = "k -= k.mean(2, keepdim=True)"
# What is broken -> (the parts, the test that finds it, the finding).
BROKEN = {
    # The import and the declaration.
    "import error": ({"top": "raise ImportError('no kernel library')"}, "test_loads", "cannot be loaded: ImportError: no kernel library"),
    "wrong object": ({"registers": "42"}, "test_loads", "it registered 42, which is neither a subclass"),
    "hangs on load": ({"top": "time.sleep(60)"}, "test_loads", "load_seconds= sets the limit"),
    "newer api": ({"registers": "Demo]\n    taylor_patch_api = 3\n    more = ["}, "test_loads", "written for plugin API 3"),
    "other name": ({"declaration": "name = 'other'"}, "test_loads", "it registers other, not demo"),
    "no summary": ({"declaration": "summary = ''"}, "test_declaration", "summary = '' is not a text"),
    "float64": ({"declaration": "dtypes = taylor_patch.Backend.dtypes | {torch.float64}"}, "test_declaration", "is not a frozenset of some of"),
    "one head dim": ({"declaration": "head_dims = 64"}, "test_loads", "Demo.head_dims = 64: it has to be a range"),
    "one device": ({"declaration": "devices = 'cpu'"}, "test_loads", "Demo.devices = 'cpu': it has to be"),
    "a word for a flag": ({"declaration": "gqa = 'no'"}, "test_declaration", "gqa = 'no' is not True or False"),
    "unavailable is a text": ({"method": "def unavailable(self): return 'no GPU'"}, "test_declaration",
                              "unavailable returned 'no GPU', not a tuple"),
    "unavailable raises": ({"method": "def unavailable(self): raise OSError('no driver')"}, "test_declaration",
                           "unavailable raised OSError: no driver"),
    "refuses everything": ({"method": "def reasons_against(self, call): return ('not today',)"}, "test_plainest_call",
                           "refuses the plainest call (not today)"),
    "reasons are a text": ({"method": "def reasons_against(self, call): return 'no'"}, "test_plainest_call",
                           "reasons_against returned 'no', not a tuple of texts"),
    "reasons raise": ({"method": "def reasons_against(self, call): raise KeyError('sm_80')"}, "test_plainest_call",
                      "reasons_against raised KeyError"),
    "reasons of the block": ({"method": "def reasons_against(self, call):\n        odd = (call.block or 0) % 2\n"
                                        "        return super().reasons_against(call) + (('odd block',) if odd else ())"},
                             "test_reasons_are_the_same_for_every_block", "reasons_against depends on call.block"),
    "reads values": ({"workspace": "return int(call.q.abs().max()) + (1 << 24)"}, "test_reasons_and_workspace_read_shapes_only",
                     "reads the values of tensors"),
    "never refuses": ({"declaration": "key_masks = False", "method": "def reasons_against(self, call): return ()"}, "test_key_mask",
                      "a key mask: not declared, but accepted"),
    "declared dtype refused": ({"method": "def reasons_against(self, call):\n        half = call.q.dtype == torch.float16\n"
                                          "        return super().reasons_against(call) + (('half',) if half else ())"},
                               "test_dtypes", "float16: declared, but refused (half)"),
    # The plainest call.
    "wrong shape": ({"after": "out = out[:, :, 1:]"}, "test_plainest_call", "the plainest call: returned [2, 2, 150, 64]"),
    "not finite": ({"after": "out[..., 0] = torch.nan"}, "test_plainest_call", "the plainest call: returned values that are not finite"),
    "leaves Python": ({"before": "raise SystemExit(3)"}, "test_plainest_call", "accepted the call and then raised SystemExit: 3"),
    "falls back always": ({"before": "raise Fallback('too sharp')"}, "test_plainest_call", "accepted the call and then fell back (too sharp)"),
    "requires grad": ({"after": "out.requires_grad_()"}, "test_plainest_call", "returned a tensor that requires grad"),
    "notes what is not so": ({"after": "note_not_finite(out, torch.ones(()))"}, "test_plainest_call", "notes values that are not finite"),
    # Sizes, strides, heads and grids.
    "rows above 512": ({"after": "out[:, :, 512:] = 0"}, "test_long_sequences", "1095 queries and keys: relative error"),
    "keys above 512 of few queries": ({"before": "if call.k.shape[2] > 4 * call.q.shape[2]: "
                                                 + replaced(k="call.k[:, :, :512]", v="call.v[:, :, :512]")},
                                      "test_long_sequences", "151 queries and 1101 keys: relative error"),
    "rows above 512 of few keys": ({"after": wrong_where("out.shape[2] > 4 * call.k.shape[2]")},
                                   "test_long_sequences", "1095 queries and 117 keys: relative error"),
    "ignores the scale": ({"before": replaced(scale="0.125")}, "test_scale", "a scale that is not 1/sqrt(D): relative error"),
    "only contiguous": ({"before": "call.q.view(-1)"}, "test_layouts", "accepted the call and then raised RuntimeError"),
    "strides of k for v": ({"after": wrong_where("call.v.stride() != call.k.stride()")}, "test_unlike_layouts",
                           "v alone a part of packed q, k and v, [B, N, 3, H, D], float32: relative error"),
    "strides in bfloat16": ({"after": wrong_where("out.dtype == torch.bfloat16 and not call.k.is_contiguous()")}, "test_unlike_layouts",
                            "k alone a part of packed q, k and v, [B, N, 3, H, D], bfloat16: relative error"),
    "third batch entry": ({"after": "out[2:] = 0"}, "test_batches_and_heads", "three batch entries: relative error"),
    "odd numbers of heads": ({"after": wrong_where("out.shape[1] % 2")}, "test_batches_and_heads", "three heads: relative error"),
    "wrong heads": ({"before": "times = call.q.shape[1] // call.k.shape[1]; "
                               + replaced(k="call.k.repeat(1, times, 1, 1)", v="call.v.repeat(1, times, 1, 1)")},
                    "test_gqa", "grouped-query attention, 4 heads on 2, heads first: relative error"),
    "groups of 2 only": ({"after": wrong_where("call.q.shape[1] > 2 * call.k.shape[1] > 2")}, "test_gqa",
                         "6 heads on 2, heads first: relative error"),
    "one key head": ({"after": wrong_where(f"{GQA} and call.k.shape[1] == 1")}, "test_gqa", "3 heads on 1, heads first: relative error"),
    "strides of key heads": ({"after": wrong_where(f"{GQA} and not call.k.is_contiguous()")}, "test_gqa",
                             "4 heads on 2, tokens first, [B, N, H, D]: relative error"),
    "raises on other keys": ({"before": "assert call.q.shape == call.k.shape or call.q.shape[1] != call.k.shape[1]"}, "test_cross_attention",
                             "cross-attention: accepted the call and then raised AssertionError"),
    "one key": ({"after": wrong_where(f"call.k.shape[2] == 1 and {CROSS}")}, "test_cross_attention",
                "cross-attention to one key: relative error"),
    "the queries' grid for keys": ({"before": f"call.k[:, :, call.grid.tokens - 1] if {CROSS} and call.grid is not None else 0"},
                                   "test_cross_attention_with_a_grid",
                                   "cross-attention with the grid of queries: accepted the call and then raised"),
    "the keys' grid for queries": ({"after": wrong_where("call.key_grid is not None")}, "test_cross_attention_with_a_grid",
                                   "cross-attention with the grid of keys: relative error"),
    "text after the grid": ({"after": wrong_where("call.grid is not None and call.grid.start == 0 and call.grid.tokens < out.shape[2]")},
                            "test_text_after_the_grid", "7 tokens after the grid: relative error"),
    # Masks.
    "false capability": ({"before": replaced(key_mask="None")}, "test_key_mask", "a key mask: relative error"),
    "mask of the first entry": ({"before": replaced(key_mask="None if call.key_mask is None else call.key_mask[:1]")},
                                "test_hidden_keys_do_not_matter",
                                "keys that the mask hides change the result by"),
    "hidden keys": ({"after": "out = out + 0.02 * call.v.nan_to_num().mean() * (call.key_mask is not None)"}, "test_hidden_keys_do_not_matter",
                    "keys that the mask hides change the result"),
    "a mask for every entry": ({"before": replaced(key_mask="call.key_mask if call.key_mask is None else torch.stack([call.key_mask[b] "
                                                            "for b in range(len(call.q))])")},
                               "test_other_key_masks", "one for all entries of the batch, [1, N_kv]: accepted the call and then raised"),
    "no bias above 0": ({"before": replaced(key_mask="None if call.key_mask is None else call.key_mask.clamp(max=0)")}, "test_other_key_masks",
                        "a key mask: a bias above 0: relative error"),
    "-10000 for infinity": ({"before": replaced(key_mask="None if call.key_mask is None else call.key_mask.clamp(min=-1e4)")},
                            "test_other_key_masks", "a bias of 1000 on every key, -20000 in the next entry: relative error"),
    "hidden by infinity only": ({"before": replaced(key_mask="None if call.key_mask is None else call.key_mask * (call.key_mask > -1e30)"
                                                             ".where(call.key_mask.isfinite(), torch.ones(())).float()")},
                                "test_other_key_masks", "a key mask: keys hidden by the most negative number: relative error"),
    "no mask with gqa": ({"before": f"if {GQA}: " + replaced(key_mask="None")}, "test_key_mask_with",
                         "a key mask with grouped-query attention: relative error"),
    "no mask in cross-attention": ({"before": f"if {CROSS}: " + replaced(key_mask="None")}, "test_key_mask_with",
                                   "a key mask with cross-attention: relative error"),
    "no mask in float16": ({"before": "if call.q.dtype == torch.float16: " + replaced(key_mask="None")}, "test_key_mask_with",
                           "a key mask with float16: relative error"),
    "no mask in bfloat16": ({"before": "if call.q.dtype == torch.bfloat16: " + replaced(key_mask="None")}, "test_key_mask_with",
                            "a key mask with bfloat16: relative error"),
    # Values.
    "exp without the maximum": ({"after": "w = logits.exp(); out = (w @ v / w.sum(-1, keepdim=True)).to(out.dtype)"},
                                "test_large_logits_are_finite",
                                "large logits: returned values that are not finite"),
    "clamped logits": ({"after": "out = out if call.key_mask is not None else (torch.softmax(logits.clamp(-1, 1), -1) @ v).to(out.dtype)"},
                       "test_large_logits_are_accurate", "large logits: relative error"),
    "notes finite always": ({"after": "note_not_finite(out, torch.zeros(()))"}, "test_what_is_noted_holds",
                            "notes with 0 that every value is finite"),
    "unwritten output": ({"after": "out = torch.where(torch.empty_like(out).isnan(), 2 * out, out)"},
                         "test_every_output_is_written", "reads memory that it did not write"),
    "not deterministic": ({"after": "out = out + 1e-3 * torch.rand(())"}, "test_deterministic", "two runs differ"),
    "other result when compiled": ({"after": "out = out * (2 if torch.compiler.is_compiling() else 1)"},
                                   "test_compiles", "gives another result inside torch.compile"),
    # What a call leaves behind.
    "writes into inputs": ({"before": f"k = call.k.contiguous(); {SMOOTHED}"}, "test_plainest_call", "the plainest call: writes into k"),
    "writes, not deterministic": ({"declaration": "deterministic = False", "before": "call.v.contiguous().clamp_(-1, 1)"}, "test_plainest_call",
                                  "the plainest call: writes into v"),
    "writes into bfloat16": ({"before": f"k = call.k.to(torch.bfloat16); {SMOOTHED}"}, "test_dtypes", "bfloat16: writes into k"),
    "writes into tokens first": ({"before": f"k = call.k.transpose(1, 2).contiguous().transpose(1, 2); {SMOOTHED}"}, "test_layouts",
                                 "q, k and v tokens first, [B, N, H, D]: writes into k"),
    "writes into key heads": ({"before": f"k = call.k if {GQA} else call.k.clone(); {SMOOTHED}"}, "test_gqa",
                              "4 heads on 2, heads first: writes into k"),
    "writes in cross-attention": ({"before": f"k = call.k if {CROSS} else call.k.clone(); {SMOOTHED}"}, "test_cross_attention",
                                  "cross-attention: writes into k"),
    "writes into the mask": ({"before": "m = call.key_mask if call.key_mask is None else call.key_mask.contiguous().clamp_(-5e4)"},
                             "test_key_mask", "a key mask: writes into key_mask"),
    "writes at the second call": ({"before": "self.kept[len(self.kept)] = 1; k = call.k.clone() if len(self.kept) < 2 else call.k; "
                                             + SMOOTHED},
                                  "test_deterministic", "the same call again: writes into k"),
    "returns its input": ({"before": "if call.q.shape == call.v.shape and call.v.shape[2] == 1: return call.v"}, "test_result_is_its_own",
                          "one token: returns the memory of v"),
    "one output for all": ({"after": "out = self.kept.setdefault((out.shape, out.dtype), torch.empty_like(out)).copy_(out)"},
                           "test_result_stays",
                           "writes into the result of the last one"),
    "caches k and v by shape": ({"before": CACHED.format(key="(call.k.shape, call.k.stride(), call.k.dtype)")}, "test_nothing_stale",
                                "values of seed 1 after those of seed 0, of the same shape: relative error"),
    "caches k by shape": ({"before": replaced(k="self.kept.setdefault((call.k.shape, call.k.dtype), call.k.clone())")}, "test_nothing_stale",
                          "seed 1 after those of seed 0, of the same shape: relative error 0."),
    "caches by address": ({"before": CACHED.format(key="(call.k.data_ptr(), call.k._version, call.k.shape)")}, "test_nothing_stale",
                          "other values in the memory of an earlier call: relative error"),
    "caches the mask by shape": ({"before": replaced(key_mask="None if call.key_mask is None else self.kept.setdefault(call.key_mask.shape, "
                                                              "call.key_mask.clone())")},
                                 "test_nothing_stale[with a key mask]",
                                 "values of seed 1 after those of seed 0, of the same shape: relative error 0."),
    "keeps its inputs": ({"before": "self.kept[0] = call"}, "test_nothing_is_kept_alive", "keeps q, k, v in memory after the call"),
    "keeps its results": ({"after": "self.kept[len(self.kept)] = out"}, "test_nothing_is_kept_alive",
                          "keeps the result in memory after the call"),
    "seeds": ({"before": "torch.manual_seed(0)"}, "test_random_state_is_unchanged", "seeds PyTorch's own random generator"),
    "workspace too small": ({"workspace": "return 1024"}, "test_workspace", "bytes of temporary memory, workspace_nbytes says 1024"),
    "no workspace": ({"workspace": "return None"}, "test_workspace", "workspace_nbytes returned None"),
    "workspace raises": ({"workspace": "return 1 // 0"}, "test_workspace", "workspace_nbytes raised ZeroDivisionError"),
}


def pytest_says(folder, *words):
    """What pytest prints in a process of its own, with this checkout and the modules of `folder`."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "COLUMNS": "400"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", folder, *words]
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=300)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What one run of pytest prints for a sound backend and, of each broken one, the test that is to find it: a line for each finding."""
    folder = tmp_path_factory.mktemp("broken")
    lines, wanted = ["from taylor_patch.testing import conformance"], ["test_all.py::TestSound"]
    for number, (parts, test, _) in enumerate([({}, "", ""), *BROKEN.values()]):
        (folder / f"plugin_{number}.py").write_text(PLUGIN.format(**{**WHOLE, **parts}))
        name = f"Test{number}" if number else "TestSound"
        lines.append(f'{name} = conformance("plugin_{number}:Plugin", "demo", load_seconds=5)')
        wanted += [f"test_all.py::{name}::{test}"] if number else []
    (folder / "test_all.py").write_text("\n".join(lines))
    return pytest_says(folder, "-rf", *wanted)


def test_a_sound_backend_passes(report):
    assert "TestSound" not in report and "TestConformance" not in report, report
    assert not re.search("Traceback|During handling|^ERROR|[0-9] error", report, re.MULTILINE), report
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
from taylor_patch.testing import conformance
from taylor_patch.testing.suite import attempt

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
    attempt.device_error = lambda device: "AcceleratorError: CUDA error: misaligned address" if asked else None

TestDemo = conformance(Plugin, "demo")
TestOther = conformance("taylor_patch.plugins:BuiltinBackends", "sdpa")
"""


def test_a_broken_device_is_the_finding_of_one_test_only(tmp_path):
    (tmp_path / "test_all.py").write_text(BREAKS_THE_DEVICE)
    wanted = [f"test_all.py::{test}" for test in ("TestDemo::test_dtypes", "TestDemo::test_layouts", "TestDemo::test_gqa",
                                                  "TestOther::test_plainest_call")]
    said = pytest_says(tmp_path, "-rfEs", *wanted)
    name = "test_layouts[data that is not aligned]"
    assert f"FAILED test_all.py::TestDemo::{name}" in said, said
    assert "accepted the call and then raised RuntimeError: AcceleratorError: CUDA error: misaligned address" in said
    assert f'backend "demo": {name} left device cpu unusable for the rest of the process' in said
    assert f"not run: test_all.py::TestDemo::{name} left device cpu unusable" in said
    assert re.search(r"1 failed, 7 passed, 2 skipped, 1 error", said), said
