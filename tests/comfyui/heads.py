"""Run in a ComfyUI checkout by test_memory.py: what memory.heads_of finds in the tiny models of that version, as one line of JSON.

argv: the folder of the tiny models' module.
"""

import json
import sys

sys.path[:0] = ["", sys.argv[1]]
from comfy.cli_args import args  # noqa: E402

args.cpu = True

from families import FAMILIES, KNOWN  # noqa: E402

from taylor_patch.memory import heads_of  # noqa: E402
from taylor_patch.run import family_of  # noqa: E402

models = {name: FAMILIES[name]().model() for name in KNOWN}
print(json.dumps({name: heads_of(family_of(model), model.diffusion_model) for name, model in models.items()}))
