"""Both routes in a real ComfyUI, beside nodes that want the attention for themselves, and compiled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from taylor_patch.demo.comfyui.server import Server

from .conftest import NODES, latent, our_lines, workflow

BESIDE = Path(__file__).with_name("beside_nodes")
FIXED = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
OVERRIDDEN = "a node's attention override"
# A fixed density: what random weights need for a wanted error is exact attention.
CONFIG = ('[taylor_patch]\nbackend = "near_far"\nmin_tokens = 64\nquality_limit = 0\nhook = "{}"\n'
          "[backends.near_far]\ndensity = 0.1\n[backends.taylor_torch]\nP = 2\n")


def patched(family, way=None):
    """The workflow with a node between model and sampler: one of beside_nodes, or ComfyUI's own ModelAttentionBackend."""
    flow = workflow(family)
    if way is not None:
        kind, inputs = ("ModelAttentionBackend", {"attention": "pytorch attention"}) if way == "core" else ("PatchBeside", {"way": way})
        flow["9"] = {"class_type": kind, "inputs": {"model": ["1", 0], **inputs}}
        flow["2"]["inputs"]["model"] = ["9", 0]
    return flow


@pytest.fixture(scope="module")
def plain(tmp_path_factory, checkout, plain_python):
    """Latents of a server that has no taylor_patch, with a node's attention."""
    with Server(checkout, tmp_path_factory.mktemp("plain"), plain_python, nodes=[NODES, BESIDE], env=FIXED) as server:
        ways = ["replaces", "core"] if has_core_node(checkout) else ["replaces"]
        return {way: latent(server, patched("flux", way)) for way in ways}


def has_core_node(checkout):
    return "class ModelAttentionBackend" in (checkout / "comfy_extras" / "nodes_model_advanced.py").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def running(tmp_path_factory, checkout, patched_python):
    """(server, set the route, counts of the last run's line)."""
    folder = tmp_path_factory.mktemp("patched")
    config = folder / "taylor_patch.toml"
    config.write_text(CONFIG.format("module"))

    def counts():
        line = [line for line in our_lines(server) if "model evaluations" in line][-1]
        return line[line.index("attention calls: ") + len("attention calls: "):]

    env = {**FIXED, "TAYLOR_PATCH": "1", "TAYLOR_PATCH_CONFIG": str(config)}
    with Server(checkout, folder / "server", patched_python, nodes=[NODES, BESIDE], env=env) as server:
        yield server, lambda route: config.write_text(CONFIG.format(route) + f"# {route}\n"), counts


# 3 steps: 3 blocks of Flux; 2 blocks of Wan with cross-attention in each.
OURS = {"flux": "near_far 9, ", "wan": "exact 6, near_far 6 (exact because: near_far: cross-attention with fewer keys than min_keys = 2048: 6)"}


@pytest.mark.parametrize("family", OURS)
def test_both_routes_make_the_same_picture(running, family):
    server, route, counts = running
    made = []
    for name in ("module", "override"):
        route(name)
        made.append(latent(server, patched(family)))
        assert counts().startswith(OURS[family]), counts()
    assert torch.equal(*made)


@pytest.mark.parametrize("name", ["module", "override"])
@pytest.mark.parametrize("way", ["replaces", "core"])
def test_a_node_wins_and_leaves_again(running, plain, checkout, name, way):
    if way == "core" and not has_core_node(checkout):
        pytest.skip("this ComfyUI has no ModelAttentionBackend")
    server, route, counts = running
    route(name)
    before = latent(server, patched("flux"))
    theirs = latent(server, patched("flux", way))
    assert torch.equal(theirs, plain[way]) and counts() == f"exact 9 (exact because: {OVERRIDDEN}: 9)"
    assert torch.equal(latent(server, patched("flux")), before) and counts().startswith(OURS["flux"])
    assert not torch.equal(before, theirs)


@pytest.mark.parametrize("name", ["module", "override"])
def test_a_node_that_chains(running, name):
    """By the override route it asks us for the calls that it leaves alone; by the module route the whole model is its."""
    server, route, counts = running
    route(name)
    made = latent(server, patched("wan", "chains"))
    assert bool(made.isfinite().all())
    expected = {"module": f"exact 12 (exact because: {OVERRIDDEN}: 12)",
                "override": f"exact 6, near_far 6 (exact because: {OVERRIDDEN}: 6)"}[name]
    assert counts().startswith(expected), counts()


@pytest.mark.parametrize("name", ["module", "override"])
def test_a_backend_chosen_by_its_name_in_the_registry(running, name):
    server, route, counts = running
    route(name)
    made = latent(server, patched("flux", "taylor_torch"))
    assert bool(made.isfinite().all()) and counts().startswith("taylor_torch 9, "), counts()
    assert not torch.equal(made, latent(server, patched("flux")))


@pytest.mark.parametrize("name", ["module", "override"])
@pytest.mark.parametrize("family", OURS)
def test_compiled(running, name, family):
    """torch.compile with the backend "eager": the counts of the run that is not compiled, and its picture."""
    server, route, counts = running
    route(name)
    eager = latent(server, patched(family))
    made = latent(server, patched(family, "compiled"))
    assert counts().startswith(OURS[family]), counts()
    torch.testing.assert_close(made, eager, atol=1e-4, rtol=1e-4)
