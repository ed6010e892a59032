"""Six ways to break what `taylor-patch plugins new demo-backend` writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from taylor_patch.cli import skeleton


@dataclass(frozen=True)
class Break:
    """`new` in the place of `old` in a file of the package; the test of the conformance suite that finds it, its finding, and what
    ComfyUI's log says."""

    file: str
    old: str
    new: str
    test: str
    finding: str
    log: str


BREAKS = {
    "import error": Break("__init__.py", "import taylor_patch\n", "import taylor_patch, no_such_kernel\n", "test_loads",
                          "ModuleNotFoundError: No module named 'no_such_kernel'", "No module named 'no_such_kernel'"),
    "wrong object": Break("__init__.py", "        return [", "        return [42, ", "test_loads",
                          "it registered 42, which is neither a subclass", "it registered 42, which is neither a subclass"),
    "false capability": Break("backend.py", "    gqa = False", "    gqa = True", "test_gqa",
                              "4 heads on 2, heads first: accepted the call and then raised", "attention calls: demo_backend"),
    "writes into inputs": Break("backend.py", "        k, v = ", "        call.k.sub_(call.k.mean(2, keepdim=True))\n        k, v = ",
                                "test_plainest_call", "writes into k", "attention calls: demo_backend"),
    "wrong shape": Break("backend.py", "return out", "return out[:, :, 1:]", "test_plainest_call", "the plainest call: returned [",
                         'backend "demo_backend" failed'),
    "hangs on load": Break("__init__.py", "import taylor_patch\n", "import time\n\nimport taylor_patch\ntime.sleep(600)\n", "test_loads",
                           "still loading after 3 s, at ", "still loading after 3 s, at "),
}
UNSEEN = ("false capability", "writes into inputs")
"""What ComfyUI cannot see in a Flux run: it has no grouped heads, and a shift of all keys changes no softmax. Only the suite finds it."""


def write_broken(kind: str, folder: Path) -> Path:
    """The skeleton of demo-backend in `folder`, broken in that way."""
    made, how = skeleton.write("demo-backend", folder), BREAKS[kind]
    path = made / "taylor_patch_demo_backend" / how.file
    text = path.read_text()
    assert text.count(how.old) == 1
    path.write_text(text.replace(how.old, how.new))
    return made
