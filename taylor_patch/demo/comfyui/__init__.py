"""The demo inside a real ComfyUI: a headless server, and a node that loads the trained model."""
