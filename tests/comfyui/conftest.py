"""A real ComfyUI with and without taylor_patch installed.

COMFYUI_PATH: checkouts, separated as in PATH. COMFYUI_PYTHON: an interpreter in which ComfyUI runs and taylor_patch is not
installed (this one where the variable is not set). The wheel is installed into a virtual environment on top of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from safetensors.torch import load

from taylor_patch.demo.comfyui.picture import NODES as DEMO_NODES
from taylor_patch.demo.comfyui.server import Server

ROOT = Path(__file__).parents[2]
NODES = Path(__file__).with_name("nodes")
CHECKOUTS = [Path(path) for path in os.environ.get("COMFYUI_PATH", "").split(os.pathsep) if path]


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.comfyui)
            if not CHECKOUTS:
                item.add_marker(pytest.mark.skip(reason="COMFYUI_PATH names no ComfyUI checkout"))


@pytest.fixture(scope="session", params=CHECKOUTS or [None], ids=lambda path: path.name if path else "none")
def checkout(request):
    return request.param


@pytest.fixture(scope="session")
def plain_python():
    return os.environ.get("COMFYUI_PYTHON", sys.executable)


VERSIONS = """
import importlib.util, json, platform, torch
triton = importlib.util.find_spec("triton") and __import__("triton").__version__
print(json.dumps({"python": platform.python_version(), "torch": str(torch.__version__), "triton": triton or None}))
"""


@pytest.fixture(scope="session")
def versions(plain_python):
    """Of Python, torch and Triton where ComfyUI runs, as JSON."""
    return subprocess.run([plain_python, "-c", VERSIONS], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="session")
def patched_python(tmp_path_factory, plain_python, wheel):
    """An interpreter that sees all of `plain_python` and has the wheel installed."""
    folder = tmp_path_factory.mktemp("comfyui-venv")
    subprocess.run([plain_python, "-m", "venv", folder], check=True)
    paths = subprocess.run([plain_python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], check=True,
                           capture_output=True, text=True).stdout.strip()
    version = f"python{sysconfig.get_python_version()}" if plain_python == sys.executable else Path(paths).parent.name
    (folder / "lib" / version / "site-packages" / "below.pth").write_text(f"import site; site.addsitedir({paths!r})\n")
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel], check=True)
    return str(python)


def workflow(family, steps=3, cfg=3.0, seed=5, sampler="euler", batch=1, size=1, positive=None, model=None):
    """positive, model: (node, its other inputs) that changes the positive conditioning, or the model. size: factor on the latent's width."""
    inputs = {"model": ["6" if model else "1", 0], "positive": ["4" if positive else "1", 0 if positive else 1], "negative": ["1", 2],
              "latent_image": ["1", 3], "seed": seed, "steps": steps, "cfg": cfg, "sampler_name": sampler, "scheduler": "simple",
              "denoise": 1.0}
    flow = {"1": {"class_type": "TinyRandomModel", "inputs": {"family": family, "batch": batch, "size": size}},
            "2": {"class_type": "KSampler", "inputs": inputs},
            "3": {"class_type": "SaveLatent", "inputs": {"samples": ["5", 0], "filename_prefix": "latents/test"}},
            "5": {"class_type": "TinyPicture", "inputs": {"latent": ["2", 0]}}}
    if positive:
        flow["4"] = {"class_type": positive[0], "inputs": {"conditioning": ["1", 1], **positive[1]}}
    if model:
        flow["6"] = {"class_type": model[0], "inputs": {"model": ["1", 0], **model[1]}}
    return flow


def starter(folder, checkout):
    """start(python, env, at=checkout): a Server with the test's nodes; one thread, so that latents repeat bit for bit."""
    def make(python, env=None, at=None, name="server", launcher=()):
        return Server(at or checkout, folder / name, python, nodes=[NODES, DEMO_NODES], launcher=launcher,
                      env={"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **(env or {})})

    return make


@pytest.fixture
def start(tmp_path, checkout):
    """See starter."""
    return starter(tmp_path, checkout)


def latent(server, flow):
    return load(server.run(flow))["latent_tensor"]


def our_lines(server):
    """What taylor_patch said, one entry a line."""
    return [line[line.index("taylor_patch:"):] for line in server.log.splitlines() if "taylor_patch:" in line]
