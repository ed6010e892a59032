"""The embedded host: a small trained Flux-architecture model and its sampler, calling attention as ComfyUI does."""
