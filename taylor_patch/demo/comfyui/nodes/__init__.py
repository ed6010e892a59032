"""A custom node for the demo: the trained model as ComfyUI's own Flux, with its conditioning and an empty picture.

Copied into a server's custom_nodes, so it imports nothing of taylor_patch.
"""

import dataclasses

import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import torch
from comfy.ldm.flux.model import FluxParams
from safetensors.torch import load_file


class Pixels(comfy.latent_formats.LatentFormat):
    """The model works on RGB in -1 to 1."""

    latent_channels = 3


class TaylorPatchDemoModel:
    """Loads the demo's weights (float8 with a float32 scale per row beside them)."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"weights": ("STRING", {}), "picture": ("INT", {"default": 17, "min": 0, "max": 20}),
                             "size": ("INT", {"default": 128, "min": 16, "max": 1024, "step": 2})}}

    RETURN_TYPES = ("MODEL", "CONDITIONING", "LATENT")
    FUNCTION = "load"
    CATEGORY = "_for_testing"

    def load(self, weights, picture, size):
        raw = load_file(weights)
        state = {name: value.float() * raw[f"{name}::scale"] if f"{name}::scale" in raw else value.float()
                 for name, value in raw.items() if not name.endswith("::scale")}
        text, vector = state.pop("cond.txt")[picture : picture + 1], state.pop("cond.y")[picture : picture + 1]
        model = self.patcher(state, text.shape[-1])
        return model, [[text, {"pooled_output": vector}]], {"samples": torch.zeros(1, 3, size, size)}

    def patcher(self, state, context):
        hidden = state["img_in.weight"].shape[0]
        head_dim = state["single_blocks.0.norm.query_norm.scale"].shape[0]
        double, single = (len({name.split(".")[1] for name in state if name.startswith(kind)}) for kind in ("double_blocks", "single_blocks"))
        known = {
            "in_channels": 3, "out_channels": 3, "vec_in_dim": context, "context_in_dim": context, "hidden_size": hidden, "mlp_ratio": 4.0,
            "num_heads": hidden // head_dim, "depth": double, "depth_single_blocks": single, "axes_dim": [16, 56, 56], "theta": 10000,
            "patch_size": 2, "qkv_bias": True, "guidance_embed": False, "txt_ids_dims": []}
        names = {field.name for field in dataclasses.fields(FluxParams)}  # newer versions have more of them
        config = comfy.supported_models.FluxSchnell({"image_model": "flux", **{k: v for k, v in known.items() if k in names}})
        config.latent_format = Pixels()
        config.set_inference_dtype(torch.float32, None)
        offload = comfy.model_management.unet_offload_device()
        model = config.get_model(state, "").to(offload)
        model.load_model_weights(state, "")
        patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
        return patcher(model, load_device=comfy.model_management.get_torch_device(), offload_device=offload)


NODE_CLASS_MAPPINGS = {"TaylorPatchDemoModel": TaylorPatchDemoModel}
