"""What taylor_patch rests on in a ComfyUI checkout, read from its source: nothing of it is imported.

    python -m tests.comfyui.contract CHECKOUT...     write contract.json anew
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

STORED = Path(__file__).with_name("contract.json")
FUNCTIONS = {
    "comfy/ldm/modules/attention.py": ("attention_basic", "attention_sub_quad", "attention_split", "attention_pytorch", "attention_sage",
                                       "attention_flash", "attention_xformers", "register_attention_function"),
    "comfy/samplers.py": ("CFGGuider.outer_sample",),
    "comfy/model_base.py": ("BaseModel.apply_model",),
    "comfy/sampler_helpers.py": ("estimate_memory",),
    "comfy/model_management.py": ("free_memory", "is_oom"),
    "comfy/model_patcher.py": ("ModelPatcher.is_dynamic", "ModelPatcher.set_model_optimized_attention"),
    "comfy/model_prefetch.py": ("pause_malloc_graph",),
}
CLASSES = {"comfy/ldm/modules/attention.py": ("AttentionTensorContainer", "ComfyAttention")}
ATTENTION = ("optimized_attention", "optimized_attention_masked")


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])


def found(body, name):
    """The definition of "function" or "Class.method" in a list of statements, or None."""
    first, _, rest = name.partition(".")
    node = next((n for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == first), None)
    return found(node.body, rest) if node is not None and rest else node


def signature(function):
    """Parameters in order, as in "x", "mask=", "*args", "**kwargs"."""
    a = function.args
    names = [x.arg for x in (*a.posonlyargs, *a.args)]
    names[len(names) - len(a.defaults):] = [f"{name}=" for name in names[len(names) - len(a.defaults):]]
    return names + ([f"*{a.vararg.arg}"] if a.vararg else []) + [x.arg for x in a.kwonlyargs] + ([f"**{a.kwarg.arg}"] if a.kwarg else [])


def keywords(checkout):
    """Keywords that core code passes to optimized_attention and optimized_attention_masked; "**" where it hands on a dict."""
    used = set()
    for folder in ("comfy", "comfy_extras"):
        for path in (checkout / folder).rglob("*.py"):
            for node in ast.walk(parsed(path)):
                if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", None)) in ATTENTION:
                    used |= {k.arg or "**" for k in node.keywords}
    return sorted(used)


def describe(checkout):
    """{"version", "signatures", "methods", "keywords"} of a checkout."""
    signatures, methods = {}, {}
    for file, names in FUNCTIONS.items():
        body = parsed(checkout / file).body
        body = [*body, *(n for node in body if isinstance(node, ast.If | ast.Try) for n in ast.walk(node) if isinstance(n, ast.FunctionDef))]
        for name in names:
            node = found(body, name)
            signatures[f"{file}:{name}"] = None if node is None else signature(node)
    for file, names in CLASSES.items():
        for name in names:
            node = found(parsed(checkout / file).body, name)
            methods[name] = None if node is None else sorted(n.name for n in node.body if isinstance(n, ast.FunctionDef))
    version = next(node.value.value for node in parsed(checkout / "comfyui_version.py").body if isinstance(node, ast.Assign))
    return {"version": version, "signatures": signatures, "methods": methods, "keywords": keywords(checkout)}


if __name__ == "__main__":
    contracts = {d.pop("version"): d for d in (describe(Path(path)) for path in sys.argv[1:])}
    STORED.write_text(json.dumps(contracts, indent=1) + "\n")
