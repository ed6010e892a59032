"""Custom nodes that do to a model what other packages' and ComfyUI's own nodes do to its attention."""

import comfy.ldm.modules.attention as attention
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper

SLOT = "optimized_attention_override"


@attention.wrap_attn
def attention_of_the_node(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs):
    """A node pack's own attention function."""
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def replaces(model):
    """As KJNodes' patches do: no chaining, the function beneath ComfyUI's decorator."""
    def override(func, *args, **kwargs):
        return attention_of_the_node.__wrapped__(*args, **kwargs)

    model.model_options["transformer_options"][SLOT] = override


def chains(model):
    """As ComfyUI's sparse attention does: put in before each evaluation, on top of what is there, for some calls (here: cross-attention)."""
    def before(apply_model, arguments):
        options = arguments["c"]["transformer_options"]
        previous = options.get(SLOT)

        def override(func, *args, **kwargs):
            if args[0].shape != args[1].shape:
                return attention_of_the_node.__wrapped__(*args, **kwargs)
            return func(*args, **kwargs) if previous is None else previous(func, *args, **kwargs)

        options[SLOT] = override
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    model.set_model_unet_function_wrapper(before)


def from_registry(name):
    """As ComfyUI's ModelAttentionBackend does with the names that it knows."""
    def patch(model):
        function = attention.get_attention_function(name)
        if hasattr(model, "set_model_optimized_attention"):
            model.set_model_optimized_attention(function)
        else:
            model.model_options["transformer_options"][SLOT] = lambda _, *args, **kwargs: function(*args, **kwargs)

    return patch


def compiled(model):
    """As ComfyUI's TorchCompileModel does, but for the backend, which needs no compiler here."""
    options = {"guard_filter_fn": lambda entries: ["transformer_options" not in entry.name for entry in entries]}
    set_torch_compile_wrapper(model=model, backend="eager", options=options)


WAYS = {"replaces": replaces, "chains": chains, "taylor_torch": from_registry("taylor_torch"), "compiled": compiled}


class PatchBeside:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "way": (list(WAYS), {})}}

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "_for_testing"

    def patch(self, model, way):
        model = model.clone()
        WAYS[way](model)
        return (model,)


NODE_CLASS_MAPPINGS = {"PatchBeside": PatchBeside}
