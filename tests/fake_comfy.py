"""A small stand-in for ComfyUI's modules, written from its contract: what is patched, and how it is called."""

import functools
import sys
import types

import torch.nn.functional as F

NAMES = ("comfy", "comfy.ldm", "comfy.ldm.modules", "comfy.ldm.modules.attention", "comfy.samplers", "comfy.model_base", "comfy.consumer")


class AttentionTensorContainer:
    def __init__(self, tensor):
        self.tensor = tensor

    def peek(self):
        if self.tensor is None:
            raise RuntimeError("attention tensor container has already been consumed")
        return self.tensor

    def take(self):
        tensor, self.tensor = self.peek(), None
        return tensor


def wrap_attn(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        outermost = "_inside_attn_wrapper" not in kwargs
        kwargs["_inside_attn_wrapper"] = True
        options = kwargs.get("transformer_options") or {}
        if isinstance(args[0], AttentionTensorContainer):
            args = tuple(x.take() for x in args[:3]) + args[3:]
        if outermost and "optimized_attention_override" in options:
            return options["optimized_attention_override"](function, *args, **kwargs)
        return function(*args, **kwargs)

    wrapper.container_function = None
    return wrapper


@wrap_attn
def attention_pytorch(query, key, value, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs):
    if not skip_reshape:
        query, key, value = (x if x.dim() == 4 else x.unflatten(-1, (heads, -1)) for x in (query, key, value))
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if mask is not None and mask.dim() == 3:
        mask = mask.unsqueeze(1)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=kwargs.get("scale"),
                                         enable_gqa=kwargs.get("enable_gqa", False))
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


class CFGGuider:
    def __init__(self, work):
        self.work = work

    def outer_sample(self, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, disable_pbar=False, seed=None):
        return self.work(sigmas)


def build():
    """Put the modules into sys.modules; returns (attention module, samplers, model_base, consumer)."""
    modules = {name: types.ModuleType(name) for name in NAMES}
    for module in modules.values():
        module.__spec__ = types.SimpleNamespace(_initializing=False, loader=None, parent="", name=module.__name__)
    attention = modules["comfy.ldm.modules.attention"]
    attention.AttentionTensorContainer = AttentionTensorContainer
    attention.attention_pytorch = attention_pytorch
    attention.optimized_attention = attention.optimized_attention_masked = attention_pytorch
    modules["comfy.consumer"].optimized_attention = attention_pytorch
    # Classes are made anew, so that one test's wrappers do not stay for the next.
    modules["comfy.samplers"].CFGGuider = type("CFGGuider", (CFGGuider,), {"outer_sample": CFGGuider.outer_sample})

    class BaseModel:
        def __init__(self, work, diffusion_model=None):
            self.work, self.diffusion_model = work, diffusion_model

        def apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
            return self.work(x, t, transformer_options or {})

    modules["comfy.model_base"].BaseModel = BaseModel
    modules["comfy.model_base"].Flux = type("Flux", (BaseModel,), {})
    sys.modules.update(modules)
    return attention, modules["comfy.samplers"], modules["comfy.model_base"], modules["comfy.consumer"]


def remove():
    for name in NAMES:
        sys.modules.pop(name, None)
