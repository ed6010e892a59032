"""Custom nodes for the tests: tiny models with seeded random weights, one for each family, built without a file."""

import math
import zlib

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import torch
from comfy import controlnet
from comfy.cldm.cldm import ControlNet

from .families import FAMILIES, KNOWN


def fill(model):
    """Weights ~ N(0, 1/fan_in), norm gains 1, biases small; every tensor seeded by its name."""
    for name, value in model.state_dict().items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if value.dim() < 2:
            value.copy_(torch.ones_like(value) if name.endswith(("weight", "scale")) else torch.randn(value.shape, generator=generator) * 0.02)
        else:
            value.copy_(torch.randn(value.shape, generator=generator) / math.sqrt(value[0].numel()))


def conditioning(tiny, seed):
    """ComfyUI's conditioning of `tiny` with random text."""
    text = torch.randn(2, 1, tiny.text, tiny.width, generator=torch.Generator().manual_seed(1))[seed]
    return [[text, {"pooled_output": text.mean(1), **tiny.more}]]


class TinyRandomModel:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"family": (KNOWN, {})}, "optional": {"batch": ("INT", {"default": 1}), "size": ("INT", {"default": 1})}}

    RETURN_TYPES = ("MODEL", "CONDITIONING", "CONDITIONING", "LATENT")
    FUNCTION = "make"
    CATEGORY = "_for_testing"

    def make(self, family, batch=1, size=1):
        tiny = FAMILIES[family]()
        model = tiny.model()
        with torch.no_grad():
            fill(model.diffusion_model)
        patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
        patched = patcher(model, load_device=comfy.model_management.get_torch_device(),
                          offload_device=comfy.model_management.unet_offload_device())
        _, channels, *sizes = tiny.latent
        sizes[-1] *= size
        samples = torch.zeros(batch, channels, *sizes)
        if tiny.sound:
            from comfy.nested_tensor import NestedTensor

            samples = NestedTensor((samples, torch.zeros(tiny.sound)))
        return patched, conditioning(tiny, 0), conditioning(tiny, 1), {"samples": samples}


class TinyConditioningMask:
    """Adds to a conditioning what Redux' style node adds: an attention mask over text and image that differs from row to row."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"conditioning": ("CONDITIONING",), "latent": ("LATENT",)}}

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "add"
    CATEGORY = "_for_testing"

    def add(self, conditioning, latent):
        text, extra = conditioning[0]
        *_, h, w = latent["samples"].shape
        tokens = text.shape[1] + h // 2 * (w // 2)
        mask = torch.zeros(1, tokens, tokens)
        mask[:, : text.shape[1] // 2, text.shape[1] :] = math.log(0.5)
        return ([[text, {**extra, "attention_mask": mask, "attention_mask_img_shape": (h // 2, w // 2)}]],)


class TinyReference:
    """A reference image beside the picture, as ReferenceLatent adds it for Flux Kontext."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"conditioning": ("CONDITIONING",), "latent": ("LATENT",)}}

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "add"
    CATEGORY = "_for_testing"

    def add(self, conditioning, latent):
        text, extra = conditioning[0]
        reference = torch.randn(1, *latent["samples"].shape[1:], generator=torch.Generator().manual_seed(2))
        return ([[text, {**extra, "reference_latents": [reference]}]],)


class TinyControlNet:
    """A ControlNet for the tiny SD 1.5, with a random picture for it to follow."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"conditioning": ("CONDITIONING",), "latent": ("LATENT",)}}

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "add"
    CATEGORY = "_for_testing"

    def add(self, conditioning, latent):
        unet = {name: value for name, value in FAMILIES["sd15"]().unet.items() if name not in ("out_channels", "transformer_depth_output")}
        network = ControlNet(**unet, hint_channels=3, num_heads=2)
        with torch.no_grad():
            fill(network)
        control = controlnet.ControlNet(network, load_device=comfy.model_management.get_torch_device())
        h, w = latent["samples"].shape[-2:]
        control.set_cond_hint(torch.rand(1, 3, 8 * h, 8 * w, generator=torch.Generator().manual_seed(6)), 1.0)
        text, extra = conditioning[0]
        return ([[text, {**extra, "control": control, "control_apply_to_uncond": True}]],)


SAMPLING = {"model": ("MODEL",), "positive": ("CONDITIONING",), "negative": ("CONDITIONING",), "latent_image": ("LATENT",),
            "seed": ("INT", {}), "steps": ("INT", {}), "cfg": ("FLOAT", {}), "sampler_name": ("STRING", {}), "scheduler": ("STRING", {}),
            "denoise": ("FLOAT", {})}


def sampled(samples, model, positive, negative, seed, steps, cfg, sampler_name, scheduler, denoise, callback=None):
    """`samples` after a sampling run of its own."""
    noise = comfy.sample.prepare_noise(samples, seed)
    return comfy.sample.sample(model, noise, steps, cfg, sampler_name, scheduler, positive, negative, samples, denoise=denoise, seed=seed,
                               callback=callback, disable_pbar=True)


class TinyTiledSampler:
    """KSampler on tiles, as node packs for large pictures have it: a run for each, of other shapes, joined where they overlap."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": SAMPLING}

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "sample"
    CATEGORY = "_for_testing"

    def sample(self, latent_image, **settings):
        samples = latent_image["samples"]
        width, out = samples.shape[-1], torch.zeros_like(samples)
        for first, last in ((0, width // 2), (width // 3 // 2 * 2, width)):
            out[..., first:last] = sampled(samples[..., first:last].contiguous(), **settings)
        return ({"samples": out},)


class TinyNestedSampler:
    """KSampler with a run of another model in the callback of its first step; both results."""

    @classmethod
    def INPUT_TYPES(cls):
        inner = {"inner_model": ("MODEL",), "inner_positive": ("CONDITIONING",), "inner_negative": ("CONDITIONING",),
                 "inner_latent": ("LATENT",)}
        return {"required": {**SAMPLING, **inner}}

    RETURN_TYPES = ("LATENT", "LATENT")
    FUNCTION = "sample"
    CATEGORY = "_for_testing"

    def sample(self, latent_image, inner_model, inner_positive, inner_negative, inner_latent, **settings):
        found = []

        def callback(step, *rest):
            if step == 0:
                inner = {**settings, "model": inner_model, "positive": inner_positive, "negative": inner_negative}
                found.append(sampled(inner_latent["samples"], **inner))

        return {"samples": sampled(latent_image["samples"], **settings, callback=callback)}, {"samples": found[0]}


class TinyPicture:
    """The first of latents that go together, for SaveLatent."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"latent": ("LATENT",)}}

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "take"
    CATEGORY = "_for_testing"

    def take(self, latent):
        samples = latent["samples"]
        return ({"samples": samples.unbind()[0] if getattr(samples, "is_nested", False) else samples},)


NODE_CLASS_MAPPINGS = {kind.__name__: kind for kind in (
    TinyRandomModel, TinyConditioningMask, TinyReference, TinyControlNet, TinyTiledSampler, TinyNestedSampler, TinyPicture)}
