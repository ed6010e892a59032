"""What is known about ComfyUI's model families: where the image lies in the sequence, and what else matters to attention.

docs/reference/families.md is made from this table. A family that is not in it is handled by what its calls say of themselves, or exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

Text = Literal["apart", "before", "after"]
"""Text tokens are keys of cross-attention only; or joined to the image's, before or after them."""


@dataclass(frozen=True)
class Family:
    """One row. names: patterns of what run.family_of says, class names of comfy.model_base. The rest beside `text` is for people."""

    title: str
    names: tuple[str, ...]
    text: Text
    patch: str
    keys: str
    """Where the block index comes from in ComfyUI 0.33; elsewhere calls are counted."""
    masks: str
    exact: str
    """Calls that near_far leaves to exact attention, beside cross-attention to few keys (a text)."""
    blocks: str = ""
    """The model's list of blocks, where heads are told by a module in there and not by the model."""


REFERENCES = ("ref_latents", "ref_latent", "image_cond")
"""Arguments of a model evaluation that put more image tokens into the sequence."""

COUNTED = "calls are counted"
WITH_REFERENCES = "runs with reference images"
REFINER = "text refiner"
KEYED = "block_index, block_type"

FAMILIES = (
    Family("Flux, LongCat-Image", ("Flux", "LongCatImage"), "before", "2x2", KEYED, "[B, N, N] with Redux's attention mask, else none",
           f"{WITH_REFERENCES} (Kontext); masks that depend on the row"),
    Family("Flux2", ("Flux2",), "before", "1x1", KEYED, "none", WITH_REFERENCES),
    Family("Chroma, Chroma Radiance", ("Chroma", "ChromaRadiance"), "before", "2x2; 16x16 pixels", KEYED, "none", WITH_REFERENCES),
    Family("SD3, SD3.5", ("SD3",), "before", "2x2", COUNTED, "none", "none; the image-only attention of SD3.5 medium has the image's grid"),
    Family("SDXL, SD 1.5, SD 2", ("SDXL", "SDXLRefiner", "SD15*", "SD2*"), "apart", "1, 2, 4, 8 by level",
           "calls are counted: block_index counts within a block", "none", "tokens merged or tiled by a node", "input_blocks"),
    Family("Wan 2.1, 2.2: t2v, i2v, VACE, Animate, S2V, HuMo, ...", ("WAN*",), "apart", "1x2x2", KEYED, "none",
           "tokens of references beside the video's; attention to an image's features, which Wan asks to be exact"),
    Family("HunyuanVideo, HunyuanVideo 1.5, HunyuanImage 2.1", ("HunyuanVideo*", "HunyuanImage21*"), "before", "1x2x2; 1x1x1; 1x1",
           KEYED, "(1, 1, Nk), hides padding of the text", f"{REFINER}; runs with a reference latent"),
    Family("Qwen-Image, Qwen-Image-Edit", ("QwenImage",), "before", "2x2", KEYED, "(B, 1, Nk), hides padding of the text", WITH_REFERENCES,
           "transformer_blocks"),
    Family("Lumina2, Z-Image", ("Lumina2", "ZImagePixelSpace"), "before", "2x2", KEYED, "none; 0.3.64: [B, Nk]",
           f"{REFINER}; {WITH_REFERENCES}; masks of a batch in 0.3.64"),
    Family("LTX-Video, LTX-AV", ("LTXV", "LTXAV"), "apart", "1x1x1", COUNTED, "text: (1, 1, 1, Nk); guides: exact, as LTX asks",
           "audio; frames with dropped tokens", "transformer_blocks"),
    Family("Cosmos-Predict2, Anima", ("CosmosPredict2", "Anima"), "apart", "1x2x2", "block_index", "none", "none"),
    Family("AuraFlow", ("AuraFlow",), "before", "2x2", COUNTED, "none", "none", "double_layers"),
    Family("HiDream-I1", ("HiDream",), "after", "2x2", COUNTED, "none", "runs with an image to edit (E1)"),
    Family("Krea2", ("Krea2",), "before", "2x2", "block_index, img_slice", "none", f"text fusion; {WITH_REFERENCES}", "blocks"),
    Family("Kandinsky5", ("Kandinsky5", "Kandinsky5Image"), "apart", "1x2x2", KEYED, "none", "text blocks",
           "visual_transformer_blocks"),
    Family("MiniMax-H3", ("MiniMaxH3",), "before", "1x2x2", COUNTED, "none", REFINER, "blocks"),
)


@dataclass(frozen=True)
class Layout:
    """How a model's self-attention sequence is put together.

    text None: not known. multiple: text and image are each padded to a multiple of so many tokens (Z-Image). listed: the family is in the
    table.
    """

    text: Text | None = None
    multiple: int = 1
    listed: bool = False


def family(name: str | None) -> Family | None:
    """The row for what run.family_of says."""
    return next((row for row in FAMILIES if name is not None and any(fnmatchcase(name, pattern) for pattern in row.names)), None)


def layout(name: str | None, diffusion_model: Any) -> Layout:
    """The layout of a model of this family, as its own attributes have it where versions differ."""
    row = family(name)
    if row is None:
        return Layout()
    text = row.text
    # HunyuanVideo had the text last until the blocks lost this attribute.
    if any(getattr(block, "flipped_img_txt", False) for block in list(getattr(diffusion_model, "double_blocks", ()))[:1]):
        text = "after"
    return Layout(text, getattr(diffusion_model, "pad_tokens_multiple", None) or 1, True)
