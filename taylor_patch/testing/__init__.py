"""The conformance suite for backends: one line in a test file of the plugin.

    from taylor_patch.testing import conformance

    TestConformance = conformance("my_attention:Plugin", "my_attention")

It needs pytest, no GPU, and a few seconds. docs/conformance.md tells what each test asks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["conformance"]


def conformance(plugin: Any, backend: str, *, options: Mapping[str, Any] | None = None, device: str = "cpu", max_error: float = 0.02,
                load_seconds: float = 30.0, keys_multiple_of: int = 1) -> type:
    """A test class that holds the contract of docs/writing-a-backend.md against one backend.

    plugin: what the entry point names ("package.module:Plugin"), or the plugin object.
    backend: name of one of its backends.
    options: as under [backends.NAME]; lower a minimum of tokens or keys here (most calls have about 150, cross-attention 117 keys), and
    numbers of rows or keys that are worked on at once, so that the loop over them runs more than once (the longest calls have 1,095).
    device: where to run, "cpu" or "cuda".
    max_error: relative L2 error against float64 that float32 may have on easy inputs (logits with a standard deviation of 0.15, keys
    and values smooth over the image); 0.01 is added for float16 and 0.02 for bfloat16. At most 0.02 is asked on large logits too.
    load_seconds: time in which the plugin and the backend have to be imported.
    keys_multiple_of: where the backend refuses other numbers of keys, the calls have such ones; other numbers it must still refuse
    or do right.
    """
    from taylor_patch.testing.suite import Conformance, Subject

    subject = Subject(plugin, backend, dict(options or {}), device, max_error, load_seconds, keys_multiple_of)
    return type(f"Conformance_{backend}", (Conformance,), {"subject": subject, "__doc__": f'The contract, held against backend "{backend}".'})
