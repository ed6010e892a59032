"""Custom nodes for the tests: tiny models with seeded random weights, one for each family, built without a file."""

import dataclasses
import math
import zlib

import comfy.model_management
import comfy.model_patcher
import comfy.supported_models as supported
import torch
from comfy.ldm.flux.model import FluxParams

CONTEXT = 64


def flux():
    values = {"in_channels": 16, "out_channels": 16, "vec_in_dim": CONTEXT, "context_in_dim": CONTEXT, "hidden_size": 256, "mlp_ratio": 2.0,
              "num_heads": 2, "depth": 1, "depth_single_blocks": 2, "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2,
              "qkv_bias": True, "guidance_embed": False, "txt_ids_dims": []}
    names = {field.name for field in dataclasses.fields(FluxParams)}
    return supported.FluxSchnell({"image_model": "flux", **{k: v for k, v in values.items() if k in names}}), (1, 16, 32, 24)


def sd15():
    return supported.SD15({
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 64, "num_res_blocks": [1, 1], "channel_mult": [1, 1],
        "use_spatial_transformer": True, "context_dim": CONTEXT, "use_linear_in_transformer": False, "legacy": False,
        "adm_in_channels": None, "use_temporal_attention": False, "transformer_depth": [1, 1], "transformer_depth_output": [1] * 4,
        "transformer_depth_middle": 1}), (1, 4, 16, 16)


def wan():
    return supported.WAN21_T2V({"image_model": "wan2.1", "model_type": "t2v", "dim": 256, "num_heads": 2, "num_layers": 2, "ffn_dim": 512,
                                "text_dim": CONTEXT, "in_dim": 16, "out_dim": 16}), (1, 16, 5, 14, 12)


FAMILIES = {"flux": flux, "sd15": sd15, "wan": wan}


def fill(model):
    """Weights ~ N(0, 1/fan_in), norm gains 1, biases small; every tensor seeded by its name."""
    for name, value in model.state_dict().items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if value.dim() < 2:
            value.copy_(torch.ones_like(value) if name.endswith("weight") else torch.randn(value.shape, generator=generator) * 0.02)
        else:
            value.copy_(torch.randn(value.shape, generator=generator) / math.sqrt(value[0].numel()))


class TinyRandomModel:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"family": (list(FAMILIES), {})}}

    RETURN_TYPES = ("MODEL", "CONDITIONING", "CONDITIONING", "LATENT")
    FUNCTION = "make"
    CATEGORY = "_for_testing"

    def make(self, family):
        config, shape = FAMILIES[family]()
        config.set_inference_dtype(torch.float32, None)
        if family == "sd15":
            config.unet_config["num_head_channels"], config.unet_config["num_heads"] = -1, 2
        model = config.get_model({}, "").to("cpu")
        with torch.no_grad():
            fill(model.diffusion_model)
        patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
        patched = patcher(model, load_device=comfy.model_management.get_torch_device(),
                          offload_device=comfy.model_management.unet_offload_device())
        text = torch.randn(2, 1, 16, CONTEXT, generator=torch.Generator().manual_seed(1))
        conditionings = [[[x, {"pooled_output": x.mean(1)}]] for x in text]
        return patched, *conditionings, {"samples": torch.zeros(shape)}


NODE_CLASS_MAPPINGS = {"TinyRandomModel": TinyRandomModel}
