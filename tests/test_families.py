"""The table of families: token grids at the sizes that people run, and everything beside that exact by a reason that says why."""

from __future__ import annotations

from types import SimpleNamespace as Model

import pytest

from taylor_patch.call import TokenGrid
from taylor_patch.families import FAMILIES, Layout, family, layout
from taylor_patch.grid import infer, patch_sizes

P2, P122 = Model(patch_size=2), Model(patch_size=(1, 2, 2))
FLIPPED = Model(patch_size=[1, 2, 2], double_blocks=[Model(flipped_img_txt=True)])
COSMOS = Model(patch_spatial=2, patch_temporal=1)
Z_IMAGE = Model(patch_size=2, pad_tokens_multiple=32)
UNET = Model()
SQUARE, BIG = (1, 16, 128, 128), (1, 16, 256, 256)  # 1024x1024 and 2048x2048
WAN_720P = (1, 16, 21, 90, 160)
DEEP = {"block": ("middle", 0), "activations_shape": [2, 1280, 32, 32]}

GRIDS = {  # family, model, latent, tokens, transformer_options, grid
    "flux-1024": ("Flux", P2, SQUARE, 4096 + 512, {}, TokenGrid(1, 64, 64, 512)),
    "flux-2048": ("Flux", P2, BIG, 16384 + 512, {}, TokenGrid(1, 128, 128, 512)),
    "flux-2048-single": ("Flux", P2, BIG, 16896, {"img_slice": [512, 16896], "block_type": "single"}, TokenGrid(1, 128, 128, 512)),
    "flux-redux": ("Flux", P2, SQUARE, 4096 + 512 + 729, {}, TokenGrid(1, 64, 64, 1241)),
    "flux2-1024": ("Flux2", Model(patch_size=1), (1, 128, 64, 64), 4608, {}, TokenGrid(1, 64, 64, 512)),
    "chroma": ("Chroma", P2, SQUARE, 4096 + 300, {}, TokenGrid(1, 64, 64, 300)),
    "chroma-radiance": ("ChromaRadiance", Model(patch_size=16), (1, 3, 1024, 1024), 4352, {}, TokenGrid(1, 64, 64, 256)),
    "sd3.5-large": ("SD3", P2, SQUARE, 4250, {}, TokenGrid(1, 64, 64, 154)),
    "sd3.5-medium-image-only": ("SD3", P2, SQUARE, 4096, {}, TokenGrid(1, 64, 64)),
    "sdxl-outer": ("SDXL", UNET, (2, 4, 128, 128), 4096, {}, TokenGrid(1, 64, 64)),
    "sdxl-inner": ("SDXL", UNET, (2, 4, 128, 128), 1024, DEEP, TokenGrid(1, 32, 32)),
    "sd1.5": ("SD15", UNET, (2, 4, 64, 64), 4096, {}, TokenGrid(1, 64, 64)),
    "wan-t2v-480p": ("WAN21", P122, (1, 16, 21, 60, 104), 32760, {}, TokenGrid(21, 30, 52)),
    "wan-t2v-720p": ("WAN21", P122, WAN_720P, 75600, {"grid_sizes": (21, 45, 80)}, TokenGrid(21, 45, 80)),
    "wan-frames-joined": ("WAN21", P122, WAN_720P, 79200, {"grid_sizes": (22, 45, 80)}, TokenGrid(22, 45, 80)),
    "wan-vace": ("WAN21_Vace", P122, WAN_720P, 75600, {}, TokenGrid(21, 45, 80)),
    "wan2.2-5b": ("WAN22", P122, (1, 48, 31, 44, 80), 27280, {}, TokenGrid(31, 22, 40)),
    "wan2.2-animate": ("WAN22_Animate", P122, (1, 16, 21, 60, 104), 32760, {}, TokenGrid(21, 30, 52)),
    "hunyuan-video": ("HunyuanVideo", Model(patch_size=[1, 2, 2]), (1, 16, 33, 90, 160), 119056, {}, TokenGrid(33, 45, 80, 256)),
    "hunyuan-video-text-last": ("HunyuanVideo", FLIPPED, (1, 16, 33, 90, 160), 119056, {}, TokenGrid(33, 45, 80)),
    "hunyuan-video-1.5": ("HunyuanVideo15", Model(patch_size=[1, 1, 1]), (1, 32, 31, 45, 80), 111850, {}, TokenGrid(31, 45, 80, 250)),
    "hunyuan-image": ("HunyuanImage21", Model(patch_size=[1, 1]), (1, 64, 64, 64), 4096 + 200, {}, TokenGrid(1, 64, 64, 200)),
    "qwen-image": ("QwenImage", P2, (1, 16, 1, 128, 128), 4096 + 37, {"block_type": "double"}, TokenGrid(1, 64, 64, 37)),
    "lumina2": ("Lumina2", P2, SQUARE, 4096 + 99, {}, TokenGrid(1, 64, 64, 99)),
    "lumina2-noise-refiner": ("Lumina2", P2, SQUARE, 4096, {}, TokenGrid(1, 64, 64)),
    "z-image": ("Lumina2", Z_IMAGE, SQUARE, 4224, {}, TokenGrid(1, 64, 64, 128)),
    "z-image-padded": ("Lumina2", Z_IMAGE, (1, 16, 104, 150), 3904 + 96, {}, TokenGrid(1, 52, 75, 96)),
    "z-image-padded-refiner": ("Lumina2", Z_IMAGE, (1, 16, 104, 150), 3904, {}, TokenGrid(1, 52, 75)),
    "ltxv": ("LTXV", Model(patchifier=Model(patch_size=(1, 1, 1))), (1, 128, 20, 22, 32), 14080, {}, TokenGrid(20, 22, 32)),
    "cosmos-predict2": ("CosmosPredict2", COSMOS, (1, 16, 1, 128, 128), 4096, {"block_index": 3}, TokenGrid(1, 64, 64)),
    "auraflow": ("AuraFlow", P2, SQUARE, 4096 + 264, {}, TokenGrid(1, 64, 64, 264)),
    "hidream": ("HiDream", P2, SQUARE, 4096 + 384, {}, TokenGrid(1, 64, 64)),
    "krea2": ("Krea2", Model(patch=2), SQUARE, 4196, {"img_slice": [100, 4196]}, TokenGrid(1, 64, 64, 100)),
    "kandinsky5": ("Kandinsky5", P122, (1, 16, 31, 64, 64), 31744, {}, TokenGrid(31, 32, 32)),
    "minimax-h3": ("MiniMaxH3", P122, (1, 24, 21, 48, 84), 200 + 160 + 21168, {}, TokenGrid(21, 24, 42, 360)),
}

EXACT = {  # family, model, latent, tokens, reference, transformer_options, words of the reason
    "kontext": ("Flux", P2, SQUARE, 512 + 2 * 4096, True, {}, "reference image"),
    "kontext-single": ("Flux", P2, SQUARE, 512 + 2 * 4096, True, {"img_slice": [512, 8704]}, "reference image"),
    "qwen-edit": ("QwenImage", P2, SQUARE, 100 + 2 * 4096, False, {"reference_image_num_tokens": [4096]}, "reference image"),
    "krea2-reference": ("Krea2", Model(patch=2), SQUARE, 8292, False,
                        {"img_slice": [100, 8292], "reference_image_num_tokens": [4096]}, "reference image"),
    "krea2-text-fusion": ("Krea2", Model(patch=2), SQUARE, 12, False, {}, "fewer tokens"),
    "wan-reference-frame": ("WAN21", P122, WAN_720P, 75600 + 3600, False, {"grid_sizes": (21, 45, 80)}, "beside the image's"),
    "wan-s2v": ("WAN22_S2V", P122, WAN_720P, 75600 + 5000, False, {}, "beside the image's"),
    "hunyuan-refiner": ("HunyuanVideo", P122, (1, 16, 33, 90, 160), 256, False, {}, "fewer tokens"),
    "z-image-context-refiner": ("Lumina2", Z_IMAGE, SQUARE, 128, False, {}, "fewer tokens"),
    "kandinsky-text": ("Kandinsky5", P122, (1, 16, 31, 64, 64), 256, False, {}, "fewer tokens"),
    "h3-refiner": ("MiniMaxH3", P122, (1, 24, 21, 48, 84), 200, False, {}, "fewer tokens"),
    "ltx-dropped": ("LTXV", Model(patchifier=Model(patch_size=(1, 1, 1))), (1, 128, 20, 22, 32), 14000, False, {}, "fewer tokens"),
    "merged-tokens": ("SDXL", UNET, (2, 4, 128, 128), 1024, False,
                      {"block": ("input", 4), "activations_shape": [2, 640, 64, 64]}, "merged or tiled"),
    "packed-latent": ("LTXAV", P122, (1, 1, 90000), 14080, False, {}, "no image or video latent"),
}


@pytest.mark.parametrize("case", GRIDS)
def test_the_grid_at_real_sizes(case):
    name, model, latent, tokens, options, expected = GRIDS[case]
    assert infer(tokens, latent, patch_sizes(model), layout(name, model), False, options) == (expected, "")
    assert expected.start + expected.tokens <= tokens


@pytest.mark.parametrize("case", EXACT)
def test_everything_else_is_exact_for_a_known_reason(case):
    name, model, latent, tokens, reference, options, words = EXACT[case]
    found, reason = infer(tokens, latent, patch_sizes(model), layout(name, model), reference, options)
    assert found is None and words in reason and "unknown" not in reason


def test_every_family_has_a_case():
    tested = {family(name) for name, *_ in GRIDS.values()}
    assert tested == set(FAMILIES)


def test_names_belong_to_one_family():
    names = [name.replace("*", "x") for row in FAMILIES for name in row.names]
    for name in names:
        assert len([row for row in FAMILIES if family(name) is row]) == 1


def test_a_family_that_is_not_listed_has_no_layout():
    assert family("GenmoMochi") is None and family(None) is None
    assert layout("GenmoMochi", P2) == Layout()
    found, reason = infer(4500, SQUARE, patch_sizes(P2), Layout(), False, {})
    assert found is None and reason.startswith("token grid unknown:")


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_the_batch_does_not_matter(batch):
    assert infer(4608, (batch, *SQUARE[1:]), patch_sizes(P2), layout("Flux", P2), False, {})[0] == TokenGrid(1, 64, 64, 512)


def test_context_windows_and_regions_follow_the_latent_of_the_evaluation():
    assert infer(7 * 3600, (1, 16, 7, 90, 160), patch_sizes(P122), layout("WAN21", P122), False, {})[0] == TokenGrid(7, 45, 80)
    assert infer(512 + 2048, (1, 16, 64, 128), patch_sizes(P2), layout("Flux", P2), False, {})[0] == TokenGrid(1, 32, 64, 512)
