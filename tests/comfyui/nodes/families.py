"""Tiny models of ComfyUI's own classes: configuration, latent and conditioning of each family. `KNOWN` has those of this ComfyUI."""

import dataclasses

import comfy.supported_models as supported
import torch

CONTEXT = 64


@dataclasses.dataclass
class Tiny:
    """config: name of a class of comfy.supported_models. latent: shape. width, text: of the conditioning; more: further entries of it.
    sound: shape of a second latent that goes with it. instead: what stands in place of the class's own entries in `unet`."""

    config: str
    unet: dict
    latent: tuple
    width: int = CONTEXT
    text: int = 16
    more: dict = dataclasses.field(default_factory=dict)
    sound: tuple | None = None
    instead: dict = dataclasses.field(default_factory=dict)

    def model(self):
        """ComfyUI's BaseModel in float32 on the CPU, its weights not set."""
        config = getattr(supported, self.config)(dict(self.unet))
        config.set_inference_dtype(torch.float32, None)
        config.unet_config.update(self.instead)
        return config.get_model({}, "").to("cpu")


def params(values, owner):
    """Those of `values` that this version's dataclass knows."""
    names = {field.name for field in dataclasses.fields(owner)}
    return {name: value for name, value in values.items() if name in names}


def flux(config="FluxSchnell", **changes):
    from comfy.ldm.flux.model import FluxParams

    values = {"in_channels": 16, "out_channels": 16, "vec_in_dim": CONTEXT, "context_in_dim": CONTEXT, "hidden_size": 256, "mlp_ratio": 2.0,
              "num_heads": 2, "depth": 1, "depth_single_blocks": 2, "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2,
              "qkv_bias": True, "guidance_embed": False, "txt_ids_dims": [], **changes}
    return Tiny(config, {"image_model": "flux", **params(values, FluxParams)}, (1, 16, 32, 24))


def flux2():
    from dataclasses import replace

    tiny = flux("Flux2", in_channels=128, out_channels=128, patch_size=1, axes_dim=[32, 32, 32, 32], theta=2000, global_modulation=True,
                mlp_silu_act=True, qkv_bias=False, ops_bias=False, txt_ids_dims=[3], vec_in_dim=None, default_ref_method="index")
    return replace(tiny, unet={**tiny.unet, "image_model": "flux2"}, latent=(1, 128, 16, 12))


def chroma():
    from comfy.ldm.chroma.model import ChromaParams

    values = {"in_channels": 64, "out_channels": 64, "context_in_dim": CONTEXT, "hidden_size": 256, "mlp_ratio": 2.0, "num_heads": 2,
              "depth": 1, "depth_single_blocks": 2, "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True, "in_dim": 64,
              "out_dim": 256, "hidden_dim": 128, "n_layers": 1, "txt_ids_dims": [], "vec_in_dim": None}
    return Tiny("Chroma", {"image_model": "chroma", **params(values, ChromaParams)}, (1, 16, 32, 24))


def sd15():
    return Tiny("SD15", {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 64, "num_res_blocks": [1, 1], "channel_mult": [1, 1],
        "use_spatial_transformer": True, "context_dim": CONTEXT, "use_linear_in_transformer": False, "legacy": False,
        "adm_in_channels": None, "use_temporal_attention": False, "transformer_depth": [1, 1], "transformer_depth_output": [1] * 4,
        "transformer_depth_middle": 1}, (1, 4, 16, 16), instead={"num_head_channels": -1, "num_heads": 2})


def sdxl():
    return Tiny("SDXL", {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 64, "num_res_blocks": [1, 1], "channel_mult": [1, 2],
        "use_spatial_transformer": True, "context_dim": CONTEXT, "use_linear_in_transformer": True, "legacy": False,
        "num_classes": "sequential", "adm_in_channels": CONTEXT + 6 * 256, "use_temporal_attention": False, "transformer_depth": [0, 1],
        "transformer_depth_output": [0, 0, 1, 1], "transformer_depth_middle": 1}, (1, 4, 32, 24))


def sd3():
    return Tiny("SD3", {"in_channels": 16, "patch_size": 2, "depth": 2, "input_size": None, "adm_in_channels": CONTEXT,
                        "pos_embed_max_size": 32, "num_patches": 1024, "qk_norm": "rms", "pos_embed_scaling_factor": None,
                        "context_embedder_config": {"target": "torch.nn.Linear",
                                                    "params": {"in_features": CONTEXT, "out_features": 128}}}, (1, 16, 32, 24))


def wan(kind="t2v", config="WAN21_T2V", **changes):
    return Tiny(config, {"image_model": "wan2.1", "model_type": kind, "dim": 256, "num_heads": 2, "num_layers": 2, "ffn_dim": 512,
                         "text_dim": CONTEXT, "in_dim": 16, "out_dim": 16, **changes}, (1, 16, 5, 14, 12))


def wan_i2v():
    tiny = wan("i2v", "WAN21_I2V", in_dim=36)
    generator = torch.Generator().manual_seed(3)
    vision = type("Vision", (), {"penultimate_hidden_states": torch.randn(1, 257, 1280, generator=generator)})()
    return dataclasses.replace(tiny, more={
        "clip_vision_output": vision, "concat_latent_image": torch.randn(1, 16, 5, 14, 12, generator=generator),
        "concat_mask": torch.ones(1, 1, 5, 14, 12)})


def wan_vace():
    return wan("vace", "WAN21_Vace", vace_layers=1, vace_in_dim=96)


def wan_animate():
    return wan("animate", "WAN22_Animate", in_dim=36, motion_encoder_dim=64)


def hunyuan_video():
    from comfy.ldm.hunyuan_video.model import HunyuanVideoParams

    values = {"in_channels": 16, "out_channels": 16, "vec_in_dim": CONTEXT, "context_in_dim": CONTEXT, "hidden_size": 256, "mlp_ratio": 2.0,
              "num_heads": 2, "depth": 1, "depth_single_blocks": 2, "axes_dim": [16, 56, 56], "theta": 256, "patch_size": [1, 2, 2],
              "qkv_bias": True, "guidance_embed": False, "byt5": False, "meanflow": False, "use_cond_type_embedding": False,
              "vision_in_dim": None, "meanflow_sum": False}
    mask = torch.ones(1, 16, dtype=torch.long)
    mask[:, 12:] = 0
    return Tiny("HunyuanVideo", {"image_model": "hunyuan_video", **params(values, HunyuanVideoParams)}, (1, 16, 5, 14, 12),
                more={"attention_mask": mask})


def hunyuan_video_15():
    tiny = hunyuan_video()
    vision = type("Vision", (), {"last_hidden_state": torch.randn(1, 20, 1152, generator=torch.Generator().manual_seed(7))})()
    changes = {"in_channels": 65, "out_channels": 32, "vec_in_dim": None, "depth": 2, "depth_single_blocks": 0, "patch_size": [1, 1, 1],
               "use_cond_type_embedding": True, "vision_in_dim": 1152}
    return dataclasses.replace(tiny, config="HunyuanVideo15", unet={**tiny.unet, **changes}, latent=(1, 32, 5, 7, 6),
                               more={"clip_vision_output": vision})


def qwen_image():
    mask = torch.ones(1, 16, dtype=torch.long)
    mask[:, 12:] = 0
    return Tiny("QwenImage", {"image_model": "qwen_image", "in_channels": 64, "num_layers": 2, "num_attention_heads": 2,
                              "joint_attention_dim": CONTEXT}, (1, 16, 1, 32, 24), more={"attention_mask": mask})


def lumina2(config="Lumina2", **changes):
    return Tiny(config, {"image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 192, "cap_feat_dim": CONTEXT, "n_layers": 2,
                         "qk_norm": True, "n_heads": 2, "n_kv_heads": 1, "axes_dims": [32, 32, 32], "axes_lens": [300, 512, 512], **changes},
                (1, 16, 32, 24), more={"attention_mask": torch.ones(1, 16, dtype=torch.long)})


def z_image():
    tiny = lumina2("ZImage", dim=256, n_kv_heads=2, axes_dims=[32, 48, 48], rope_theta=256.0, ffn_dim_multiplier=8 / 3,
                   z_image_modulation=True, time_scale=1000.0, pad_tokens_multiple=32)
    return dataclasses.replace(tiny, latent=(1, 16, 26, 30))


def ltxv():
    return Tiny("LTXV", {"image_model": "ltxv", "in_channels": 128, "cross_attention_dim": 128, "attention_head_dim": 64,
                         "num_attention_heads": 2, "caption_channels": CONTEXT, "num_layers": 2}, (1, 128, 5, 8, 6),
                more={"attention_mask": torch.ones(1, 16, dtype=torch.long), "frame_rate": 25})


def cosmos_predict2():
    return Tiny("CosmosT2IPredict2", {
        "image_model": "cosmos_predict2", "max_img_h": 64, "max_img_w": 64, "max_frames": 16, "in_channels": 16, "out_channels": 16,
        "patch_spatial": 2, "patch_temporal": 1, "model_channels": 256, "concat_padding_mask": True, "crossattn_emb_channels": CONTEXT,
        "pos_emb_cls": "rope3d", "pos_emb_learnable": True, "min_fps": 1, "max_fps": 30, "use_adaln_lora": True, "adaln_lora_dim": 32,
        "num_blocks": 2, "num_heads": 2, "extra_per_block_abs_pos_emb": False, "rope_enable_fps_modulation": False}, (1, 16, 1, 32, 24))


def auraflow():
    return Tiny("AuraFlow", {"in_channels": 4, "dim": 256, "n_layers": 3, "n_double_layers": 1, "n_heads": 1, "global_conddim": 256,
                             "cond_seq_dim": CONTEXT, "max_seq": 32 * 32}, (1, 4, 32, 24))


def hidream():
    return Tiny("HiDream", {
        "image_model": "hidream", "attention_head_dim": 128, "axes_dims_rope": [64, 32, 32], "caption_channels": [CONTEXT, CONTEXT],
        "max_resolution": [64, 64], "in_channels": 16, "llama_layers": [0, 1, 1], "num_attention_heads": 2, "num_routed_experts": 2,
        "num_activated_experts": 1, "num_layers": 1, "num_single_layers": 1, "out_channels": 16, "patch_size": 2, "text_emb_dim": CONTEXT},
        (1, 16, 32, 24), more={"conditioning_llama3": torch.randn(1, 2, 12, CONTEXT, generator=torch.Generator().manual_seed(4))})


def krea2():
    return Tiny("Krea2", {"image_model": "krea2", "features": 256, "tdim": 64, "txtdim": 128, "heads": 2, "kvheads": 1, "multiplier": 2,
                          "layers": 2, "txtlayers": 2, "txtheads": 1, "txtkvheads": 1}, (1, 16, 1, 32, 24), width=256)


def kandinsky5():
    return Tiny("Kandinsky5", {
        "image_model": "kandinsky5", "model_dim": 128, "ff_dim": 256, "time_dim": 64, "in_text_dim": CONTEXT, "in_text_dim2": CONTEXT,
        "visual_embed_dim": 132, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (16, 24, 24)}, (1, 16, 5, 14, 12))


def minimax_h3():
    return Tiny("MiniMaxH3", {
        "image_model": "minimax_h3", "hidden_size": 128, "num_layers": 2, "token_refiner_num_layers": 1, "num_attention_heads": 2,
        "attention_head_dim": 128, "ffn_hidden_size": 128, "text_dim": CONTEXT, "time_embed_hidden_size": 64, "time_embed_dim": 64},
        (1, 24, 5, 14, 12), sound=(1, 32, 2, 10))


FAMILIES = {make.__name__: make for make in (
    flux, flux2, chroma, sd15, sdxl, sd3, wan, wan_i2v, wan_vace, wan_animate, hunyuan_video, hunyuan_video_15, qwen_image, lumina2, z_image,
    ltxv, cosmos_predict2, auraflow, hidream, krea2, kandinsky5, minimax_h3)}

CONFIGS = {"flux2": "Flux2", "hunyuan_video_15": "HunyuanVideo15", "z_image": "ZImage", "krea2": "Krea2",
           "kandinsky5": "Kandinsky5", "minimax_h3": "MiniMaxH3"}
"""Families that ComfyUI 0.3.64 has not -> the class that tells."""

KNOWN = [name for name in FAMILIES if hasattr(supported, CONFIGS.get(name, "Flux"))]
