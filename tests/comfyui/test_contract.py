"""The checkouts are what contract.json says, and all that it says is known to the hooks."""

from __future__ import annotations

import json

import pytest

from taylor_patch.hooks.attention import ARGUMENTS, WISHES
from taylor_patch.hooks.contract import PARAMETERS

from . import contract


@pytest.fixture(scope="module")
def stored():
    return json.loads(contract.STORED.read_text())


def test_the_checkout_is_as_stored(checkout, stored):
    here = contract.describe(checkout)
    version = here.pop("version")
    assert version in stored, f"ComfyUI {version} is new: look at what differs, then run python -m tests.comfyui.contract"
    assert here == stored[version]


def test_the_checkout_is_what_the_hooks_expect(checkout):
    here = contract.describe(checkout)
    for name, parameters in here["signatures"].items():
        if name.startswith("comfy/ldm/modules/attention.py:attention_") and parameters:
            renamed = {"query": "q", "key": "k", "value": "v"}
            plain = [renamed.get(p.rstrip("="), p.rstrip("=")) for p in parameters]
            assert plain == [*PARAMETERS, "**kwargs"], name
    # num_heads stands in code of SD3's that is never called.
    assert set(here["keywords"]) - {"**", "num_heads"} <= ARGUMENTS | WISHES
    leading = {"comfy/samplers.py:CFGGuider.outer_sample": ["self", "noise", "latent_image", "sampler", "sigmas"],
               "comfy/model_base.py:BaseModel.apply_model": ["self", "x", "t"],
               "comfy/sampler_helpers.py:estimate_memory": ["model", "noise_shape"],
               "comfy/model_management.py:free_memory": ["memory_required", "device"]}
    for name, expected in leading.items():
        assert here["signatures"][name][: len(expected)] == expected
    container = here["methods"]["AttentionTensorContainer"]
    assert container is None or {"peek", "take"} <= set(container)
