"""One module per ComfyUI module that is patched; each has install(module) and uninstall()."""
