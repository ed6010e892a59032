"""The page at /taylor_patch of ComfyUI's own server: what runs, the last run, and the switches that the configuration file holds."""
