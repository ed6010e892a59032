"""Run in a ComfyUI checkout by test_memory.py: a forward pass with its attention's memory got in one of three ways.

The model's weights lie on the CPU and are offloaded to "meta", where nothing can be computed: what is moved is missed. The last line
printed is JSON.
"""

import json
import sys

sys.path.insert(0, "")
from comfy.cli_args import args

args.cpu = True

import comfy.ldm.modules.attention as attention  # noqa: E402
import comfy.model_base  # noqa: E402
import comfy.model_management as mm  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.sampler_helpers  # noqa: E402
import torch  # noqa: E402

from taylor_patch.engine import engine  # noqa: E402
from taylor_patch.hooks.memory import free_before_run  # noqa: E402
from taylor_patch.run import describe, evaluation  # noqa: E402

HEADS, WIDTH, SHAPE, CPU = 2, 64, (1, 16, 64, 64), torch.device("cpu")


class Diffusion(torch.nn.Module):
    """Four blocks of attention at the width of WIDTH; patch size 2, so 1,024 tokens."""

    patch_size, num_heads, hidden_size = 2, HEADS, WIDTH

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(comfy.ops.disable_weight_init.Linear(WIDTH, WIDTH) for _ in range(8))
        for block in self.blocks:
            torch.nn.init.eye_(block.weight)
            torch.nn.init.zeros_(block.bias)

    def forward(self, x, options, before_attention):
        for block in self.blocks:
            x = block(x)
            before_attention(x)
            x = attention.optimized_attention(x, x, x, HEADS, transformer_options=options)
        return x


class Flux(torch.nn.Module):
    """What ComfyUI's model placement asks of a model."""

    def __init__(self):
        super().__init__()
        self.diffusion_model = Diffusion()

    def memory_required(self, shape, cond_shapes=None):
        return 1 << 20

    def extra_conds_shapes(self, **kwargs):
        return {}


def main(way):
    torch.manual_seed(0)
    model = Flux()
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=torch.device("meta"))
    required, minimum = comfy.sampler_helpers.estimate_memory(patcher, SHAPE, {})
    more_than_there_is = mm.get_free_memory(CPU) + 4 * patcher.model_size()

    def in_forward(x):
        if way == "in-forward":
            mm.free_memory(more_than_there_is, x.device)

    error = None
    with torch.inference_mode(), engine().run([1.0, 0.0]) as run:
        free_before_run(patcher, SHAPE)
        mm.load_models_gpu([patcher], memory_required=required, minimum_memory_required=minimum)
        try:
            with evaluation(describe(run, model, SHAPE, 1.0)):
                out = model.diffusion_model(torch.randn(1, 1024, WIDTH), {"sigmas": torch.ones(1)}, in_forward)
            finite = bool(out.isfinite().all())
        except Exception as raised:
            error, finite = f"{type(raised).__name__}: {raised}", False
    moved = sum(p.device != CPU for p in model.parameters())
    print(json.dumps({"reserved": [required - (1 << 20), minimum - (1 << 20)], "moved": moved, "error": error, "finite": finite,
                      "loaded": len(mm.current_loaded_models), "calls": engine().last_run.calls, "fallbacks": engine().last_run.fallbacks}))


main(sys.argv[1])
