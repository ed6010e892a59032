"""Custom nodes of benchmarks/comfyui.py: random conditioning, and sampling that is timed step by step under several configurations.

Copied into a server's custom_nodes, so it imports nothing of benchmarks.
"""

import itertools
import json
import statistics
import sys
import time
import traceback

import comfy.model_management as management
import comfy.sample
import torch


class BenchmarkConditioning:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"tokens": ("INT", {"default": 512}), "width": ("INT", {"default": 4096}), "pooled": ("INT", {"default": 0})}}

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "_for_testing"

    def make(self, tokens, width, pooled):
        generator = torch.Generator().manual_seed(1)
        text = torch.randn(1, tokens, width, generator=generator)
        return ([[text, {"pooled_output": torch.randn(1, pooled, generator=generator)} if pooled else {}]],)


class BenchmarkSampling:
    """Samples once for each of `variants` (JSON: name -> text of the configuration file, written to `config` before) and writes what was
    measured, a failure's text included, to `figures`, the latents to figures + ".pt"."""

    @classmethod
    def INPUT_TYPES(cls):
        texts = {name: ("STRING", {}) for name in ("variants", "config", "figures")}
        return {"required": {"model": ("MODEL",), "positive": ("CONDITIONING",), "latent": ("LATENT",), "steps": ("INT", {"default": 4}),
                             "limit_gib": ("FLOAT", {"default": 0.0}), **texts}}

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "measure"
    CATEGORY = "_for_testing"

    def measure(self, model, positive, latent, steps, limit_gib, variants, config, figures):
        samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
        noise = comfy.sample.prepare_noise(samples, 7)
        device = model.load_device
        if limit_gib and device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(limit_gib * 2**30 / torch.cuda.get_device_properties(device).total_memory, device)
        found, latents = {}, {}
        for name, text in json.loads(variants).items():
            with open(config, "w") as file:
                file.write(text)
            management.unload_all_models()
            management.soft_empty_cache()
            try:
                found[name], latents[name] = self.once(model, positive, samples, noise, steps, device)
            except Exception as error:
                found[name] = {"error": f"{type(error).__name__}: {error}"[:2000], "where": traceback.format_exc()[-1500:]}
                if management.processing_interrupted():
                    raise
            with open(figures, "w") as file:
                json.dump(found, file)
        torch.save(latents, figures + ".pt")
        return ({"samples": samples.cpu()},)

    def once(self, model, positive, samples, noise, steps, device):
        """(figures, latent) of one sampling run."""
        cuda = device.type == "cuda"
        marks, used = [], []

        def at_step(step, x0, x, total):
            if cuda:
                torch.cuda.synchronize(device)
                free, whole = torch.cuda.mem_get_info(device)
                used.append(whole - free)
            marks.append(time.perf_counter())

        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        out = comfy.sample.sample(model, noise, steps, 1.0, "euler", "simple", positive, positive, samples, denoise=1.0, seed=7,
                                  callback=at_step, disable_pbar=True)
        last_run = None
        ours = sys.modules.get("taylor_patch.engine")
        if ours is not None and ours.current() is not None:
            last_run = ours.current().last_run
        seconds = [after - before for before, after in itertools.pairwise(marks)]
        return {
            "step_seconds": statistics.median(seconds), "steps_seconds": [round(value, 5) for value in seconds],
            "first_step_seconds": round(marks[0] - started, 3),
            "allocated_mib": torch.cuda.max_memory_allocated(device) >> 20 if cuda else None,
            "reserved_mib": torch.cuda.max_memory_reserved(device) >> 20 if cuda else None,
            "device_used_mib": max(used) >> 20 if cuda else None,
            "dynamic": bool(getattr(model, "is_dynamic", bool)()), "model_mib": model.model_size() >> 20,
            "loaded_mib": model.loaded_size() >> 20, "finite": bool(out.isfinite().all()),
            **({} if last_run is None else {"calls": dict(last_run.calls), "exact_because": dict(last_run.fallbacks),
                                            "quality": last_run.quality}),
        }, out.float().cpu()


NODE_CLASS_MAPPINGS = {"BenchmarkConditioning": BenchmarkConditioning, "BenchmarkSampling": BenchmarkSampling}
