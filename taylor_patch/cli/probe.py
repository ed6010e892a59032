"""Imports ComfyUI's modules in a process of its own, with taylor_patch on, and prints as JSON what was patched. Run by `doctor`."""

from __future__ import annotations

import importlib
import json
import sys


def main() -> None:
    """Run in ComfyUI's folder. The last line printed is {"failure", "hooks", "patched", "others"}; others are sentences."""
    sys.path.insert(0, "")
    from comfy.cli_args import args  # type: ignore[import-not-found]

    from taylor_patch import startup

    if startup.failure is not None:
        print(json.dumps({"failure": startup.failure, "hooks": {}, "patched": [], "others": []}))
        return
    args.cpu = True  # nothing here needs the GPU, which a running ComfyUI may be using
    from taylor_patch import api

    api.install()
    for target in startup.HOOKS:
        if target == "server":  # it imports all of ComfyUI, for a page that nothing depends on
            continue
        importlib.import_module(target)
    from taylor_patch.hooks.attention import patched
    from taylor_patch.hooks.chain import strangers

    print(json.dumps({"failure": startup.failure, "hooks": startup.fired, "patched": patched(), "others": strangers()}))


main()
