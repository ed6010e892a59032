"""A small stand-in for the parts of ComfyUI that taylor_patch touches."""

from __future__ import annotations

import functools
import sys
from types import ModuleType

import torch
import torch.nn.functional as F


class AttentionTensorContainer:
    """Holds one tensor that may be taken once."""

    def __init__(self, value):
        self.value = value

    def peek(self):
        assert self.value is not None, "peek at an empty container"
        return self.value

    def take(self):
        assert self.value is not None, "taken twice"
        value, self.value = self.value, None
        return value


CONTRACTS = ("0.3.64", "0.33.0", "0.34")
"""What ComfyUI's functions agree on, by the version that brought it; of 0.34 and later, preferred_attention is known by reading."""


def make_wrap_attn(contract="0.33.0"):
    """ComfyUI's decorator of attention functions: containers since 0.33.0, preferred_attention since 0.34."""
    def wrap_attn(func):
        @functools.wraps(func)
        def wrapper(*args, **kwargs):
            preferred = kwargs.pop("preferred_attention", None) if contract == "0.34" else None
            held = args[:3] if args and isinstance(args[0], AttentionTensorContainer) else ()

            def taken():
                return (*(x.take() for x in held), *args[len(held):])

            if "_inside_attn_wrapper" not in kwargs:
                kwargs["_inside_attn_wrapper"] = True
                override = (kwargs.get("transformer_options") or {}).get("optimized_attention_override")
                if override is not None:
                    if held and hasattr(override, "container_function"):
                        return override.container_function(*args, **kwargs)
                    return override(func, *taken(), **kwargs)
                if preferred is not None and preferred.function is not None:
                    return preferred.function(*args, **kwargs)
            if held and wrapper.container_function is not None:
                return wrapper.container_function(*args, **kwargs)
            return func(*taken(), **kwargs)

        if contract != "0.3.64":
            wrapper.container_function = None
        return wrapper

    return wrap_attn


def attention_pytorch(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False,
                      skip_output_reshape=False, **kwargs):
    def split(x, count):
        if skip_reshape:
            return x
        return (x if x.dim() == 4 else x.unflatten(-1, (count, -1))).transpose(1, 2)

    gqa = kwargs.get("enable_gqa", False)
    q = split(q, heads)
    if gqa and not skip_reshape and k.dim() == 3:
        k, v = (split(x, x.shape[-1] // q.shape[-1]) for x in (k, v))
    else:
        k, v = split(k, heads), split(v, heads)
    if mask is not None:
        mask = mask[None, None] if mask.dim() == 2 else mask[:, None] if mask.dim() == 3 else mask
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=kwargs.get("scale"), enable_gqa=gqa)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


NAMES = ("comfy", "comfy.ldm", "comfy.ldm.modules", "comfy.ldm.modules.attention", "comfy.samplers",
         "comfy.model_base", "comfy.sampler_helpers", "fake_consumer")


def build(contract="0.33.0") -> dict[str, ModuleType]:
    """Fresh modules by name, not yet in sys.modules."""
    modules = {name: ModuleType(name) for name in NAMES}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)

    attention = modules["comfy.ldm.modules.attention"]
    if contract != "0.3.64":
        attention.AttentionTensorContainer = AttentionTensorContainer
    attention.wrap_attn = make_wrap_attn(contract)
    attention.optimized_attention = attention.optimized_attention_masked = attention.wrap_attn(attention_pytorch)
    attention.REGISTERED_ATTENTION_FUNCTIONS = registered = {"pytorch": attention.optimized_attention}
    attention.register_attention_function = registered.setdefault

    class CFGGuider:
        def __init__(self, model, model_options=None):
            self.model = model
            self.model_options = {"transformer_options": {}} if model_options is None else model_options

        def outer_sample(self, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None,
                         disable_pbar=False, seed=None, latent_shapes=None):
            x = noise
            for step, sigma in enumerate(sigmas[:-1]):
                options = {**self.model_options["transformer_options"], "sigmas": sigma.reshape(1)}
                x = sampler(self.model, x, sigma.reshape(1), options)
                if callback is not None:
                    callback(step)
            return x

    modules["comfy.samplers"].CFGGuider = CFGGuider

    class BaseModel:
        def __init__(self, diffusion_model):
            self.diffusion_model = diffusion_model

        def apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={},  # noqa: B006
                        **kwargs):
            return self.diffusion_model(x, t, transformer_options)

    class Flux(BaseModel):
        pass

    modules["comfy.model_base"].BaseModel, modules["comfy.model_base"].Flux = BaseModel, Flux
    modules["comfy.sampler_helpers"].estimate_memory = lambda model, noise_shape, conds: (1000.0, 500.0)
    consumer = modules["fake_consumer"]
    consumer.optimized_attention = attention.optimized_attention
    return modules


class Diffusion:
    """A diffusion model whose forward pass is `body(options)`; patch size 2, as Flux."""

    patch_size = 2

    def __init__(self, body):
        self.body = body
        self.double_blocks = [None] * 2

    def __call__(self, x, t, options):
        return self.body(options)


class Host:
    """The installed stand-in, with shortcuts for tests."""

    def __init__(self, contract="0.33.0"):
        self.modules = build(contract)
        self.attention = self.modules["comfy.ldm.modules.attention"]
        self.samplers = self.modules["comfy.samplers"]
        self.model_base = self.modules["comfy.model_base"]
        self.consumer = self.modules["fake_consumer"]
        self.original = self.attention.optimized_attention
        self.outer_sample = self.samplers.CFGGuider.__dict__["outer_sample"]
        self.apply_model = self.model_base.BaseModel.__dict__["apply_model"]
        self._saved = {name: sys.modules.get(name) for name in NAMES}
        sys.modules.update(self.modules)

    def remove(self):
        for name, module in self._saved.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module

    def sample(self, body, latent=(1, 4, 32, 32), sigmas=(1.0, 0.0), model_options=None, prompts=(None,), **kwargs):
        """Run `body(options)` once a step inside a sampling run; the results of all steps. prompts: a step evaluates each of them by itself
        (cond_or_uncond)."""
        results = []

        def sampler(model, x, sigma, options):
            for which in prompts:
                own = options if which is None else {**options, "cond_or_uncond": which}
                results.append(model.apply_model(x, sigma, transformer_options=own))
            return x

        guider = self.samplers.CFGGuider(self.model_base.Flux(Diffusion(body)), model_options)
        guider.outer_sample(torch.zeros(latent), None, sampler, torch.tensor(sigmas), **kwargs)
        return results
