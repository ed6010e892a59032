"""torch.compile over a transformer that calls ComfyUI's attention: decisions at run time, few graph breaks, no recompiles."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch._dynamo.utils import counters

from tests.test_hooks import DIM, HEADS, SPARSE, TEXT, TOKENS, last

BLOCKS, STEPS = 3, (5.0, 4.0, 3.0, 2.0, 1.0, 0.0)
# Block 1 is exact above sigma 3, and everything is exact in the first two steps.
CHANGING = SPARSE.replace("[backends", "start_percent = 0.4\n[backends") + \
    '[[rules]]\nwhen = { layers = "1", sigma = ">=3" }\nbackend = "sdpa"\n'


class Block(torch.nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(HEADS * DIM, 3 * HEADS * DIM), torch.nn.Linear(HEADS * DIM, HEADS * DIM)
        self.attention = attention

    def forward(self, x, transformer_options):
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + self.out(self.attention(q, k, v, HEADS, transformer_options=transformer_options))


class Transformer(torch.nn.Module):
    def __init__(self, attention):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(Block(attention) for _ in range(BLOCKS))

    def forward(self, x, transformer_options):
        transformer_options = transformer_options.copy()
        for index, block in enumerate(self.blocks):
            transformer_options["block_index"] = index
            x = block(x, transformer_options)
        return x


@torch.compiler.disable
def sage_kernel(q, k, v):
    """Where a compiled attention function of ComfyUI's leaves the graph, as sageattention does."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def attention_sage(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return sage_kernel(q, k, v).transpose(1, 2).flatten(2)


def sampled(comfy, attention, compiled=True, options=None, per_block=False):
    """(the model's result of each step, frames compiled after each step, graph breaks)."""
    torch._dynamo.reset()
    counters.clear()
    model, frames = Transformer(attention), []
    x = torch.randn(1, TOKENS + TEXT, HEADS * DIM, generator=torch.Generator().manual_seed(1))
    if per_block:
        model.blocks = torch.nn.ModuleList(torch.compile(block, backend="eager", options=options) for block in model.blocks)
    run = torch.compile(model, backend="eager", options=options) if compiled and not per_block else model

    def body(o):
        out = run(x, o)
        frames.append(counters["frames"]["total"])
        return out

    with torch.inference_mode():
        outs = comfy.sample(body, sigmas=STEPS)
    return outs, frames, sum(counters["graph_break"].values())


def routed(route):
    return CHANGING.replace("[backends", f'hook = "{route}"\n[backends', 1)


@pytest.mark.parametrize("route", ["module", "override"])
@pytest.mark.parametrize("per_block", [False, True], ids=["whole-model", "per-block"])
def test_compiled_is_as_eager_while_decisions_change(comfy, configure, route, per_block):
    configure(routed(route))
    eager, _, _ = sampled(comfy, comfy.attention.optimized_attention, compiled=False)
    counts = last().calls, last().fallbacks
    outs, frames, _ = sampled(comfy, comfy.attention.optimized_attention, per_block=per_block)
    assert (last().calls, last().fallbacks) == counts
    assert counts == ({"near_far": 8, "exact": 7}, {"before start_percent": 6, 'backend = "sdpa"': 1})
    assert all(torch.equal(a, b) for a, b in zip(outs, eager, strict=True))
    # The way after a backend's answer is traced when it is first taken, in the third step; then nothing more is.
    assert frames[0] == frames[1] and frames[2] <= frames[1] + 2 and frames[2] == frames[3] == frames[4], frames


@pytest.mark.parametrize("route", ["module", "override"])
def test_graph_breaks_are_not_more_than_those_of_sage(comfy, configure, route):
    configure(routed(route))
    _, _, ours = sampled(comfy, comfy.attention.optimized_attention)
    _, _, sage = sampled(comfy, comfy.attention.wrap_attn(attention_sage))
    assert 0 < ours <= sage


def test_guards_on_transformer_options_are_not_needed(comfy, configure):
    """ComfyUI's TorchCompileModel drops them, which makes constants of all that a graph read there."""
    configure(routed("module"))
    eager, _, _ = sampled(comfy, comfy.attention.optimized_attention, compiled=False)
    counts = Counter(last().fallbacks)
    dropped = []

    def drop(entries):
        keep = ["transformer_options" not in entry.name for entry in entries]
        dropped.append(keep.count(False))
        return keep

    outs, _, _ = sampled(comfy, comfy.attention.optimized_attention, options={"guard_filter_fn": drop})
    assert sum(dropped) and Counter(last().fallbacks) == counts
    assert all(torch.equal(a, b) for a, b in zip(outs, eager, strict=True))
