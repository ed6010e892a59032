"""What Triton would compile near_far's kernels for, at several sizes, found without a GPU: launches are not done but looked at.

Run as a script, without Triton's interpreter: prints JSON, a list for each size of [kernel, constants and options, specialisation of the
other arguments]. Two launches share a compiled kernel where all of that is equal.
"""

import json
import math
import os

os.environ.pop("TRITON_INTERPRET", None)

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from taylor_patch.backends.near_far import op, plan
from taylor_patch.call import AttentionCall, TokenGrid

SIZES = [  # grid; text before it
    ((1, 64, 64), 512), ((1, 80, 48), 512), ((1, 72, 40), 256), ((1, 128, 128), 512), ((1, 104, 56), 192),  # whole blocks of tokens
    ((1, 128, 120), 64), ((1, 96, 176), 128),  # and so many that neighbours are near
    ((1, 61, 43), 77), ((1, 90, 51), 300), ((1, 75, 52), 96),  # blocks that are not full
    ((16, 24, 44), 0), ((8, 40, 24), 0), ((21, 45, 80), 226), ((13, 30, 52), 0),  # videos
]
BACKEND = make_backend(GPUTarget("cuda", 90, 32))


class Launches:
    """Stands in place of a kernel: kernel[grid](...) notes what would be compiled."""

    def __init__(self, kernel, seen):
        self.kernel, self.seen = kernel, seen
        self.bind = create_function_from_signature(kernel.signature, kernel.params, BACKEND)

    def __getitem__(self, grid):
        def launch(*args, **options):
            bound, specialisation, options = self.bind(*args, **options)
            kinds = dict(zip(bound, map(str, specialisation), strict=True))
            constants = {p.name: kinds.pop(p.name) for p in self.kernel.params if p.is_constexpr}
            self.seen.append([self.kernel.__name__, {**constants, **{f"option {name}": str(value) for name, value in options.items()}}, kinds])

        return launch


def main():
    plan.capability_of = lambda device: (9, 0)
    found = []
    kernels = {name: value for name, value in vars(op).items() if name.endswith("_kernel")}
    for grid, before in SIZES:
        seen = []
        for name, kernel in kernels.items():
            setattr(op, name, Launches(kernel, seen))
        tokens = math.prod(grid) + before
        q, k, v = (torch.empty(1, tokens, 24, 128, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
        call = AttentionCall(q, k, v, scale=128**-0.5, grid=TokenGrid(*grid, before))
        op.attend(call, 0.2)
        op.attend_aimed(call, op.attend_aimed(call, None)[1])
        found.append(seen)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
