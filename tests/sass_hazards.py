"""Compile the Taylor kernels for sm_90 without a GPU and look for registers that are overwritten under a running product.

A tensor-core product whose first factor lies in registers reads them while it runs. Run as a script: prints a line for each
kernel that packs new features into such registers before all products have been waited for; nothing where all is well.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from taylor_patch.backends.taylor import tuned
from taylor_patch.backends.taylor.kernels.accumulate import accumulate_kernel
from taylor_patch.backends.taylor.kernels.evaluate import evaluate_kernel

TYPES = {"pairs_ptr": "*i32", "leads_ptr": "*i32", "root": "fp32", "ratio": "fp32", "eps": "fp32", "most_bad": "fp32"}
TYPES |= dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "s_ptr", "out_ptr", "linear_ptr"), "*bf16")


def sass(kernel, constants, tile):
    """Disassembly of a kernel for bfloat16 on sm_90."""
    signature = {name: "constexpr" if name in constants else TYPES.get(name, "*fp32" if name.endswith("_ptr") else "i32")
                 for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
               if signature[name].startswith("*") or name.endswith(("_sn", "_sb", "_sh")) or name == "per_split"}
    built = triton.compile(ASTSource(kernel, signature, {name: constants[name] for name in kernel.arg_names if name in constants}, aligned),
                           target=GPUTarget("cuda", 90, 32), options={"num_warps": tile.warps, "num_stages": tile.stages})
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        return subprocess.run([tool, "--dump-sass", file.name], capture_output=True, text=True, check=True).stdout


def hazards(text):
    """Loops, as (first, last) addresses, in which a PACK writes what a product in flight reads. Each body is followed twice."""
    events, loops = [], []
    for line in text.splitlines():
        if not (address := re.search(r"/\*([0-9a-f]{4,5})\*/", line)):
            continue
        at = int(address[1], 16)
        if found := re.search(r"HGMMA\.\S+ R\d+, R(\d+)", line):
            events.append((at, "product", int(found[1])))
        elif found := re.search(r"WARPGROUP\.DEPBAR.* gsb0, 0x(\w+)", line):
            events.append((at, "wait", int(found[1], 16)))
        elif found := re.search(r"F2FP\S* R(\d+)", line):
            events.append((at, "pack", int(found[1])))
        elif (found := re.search(r"BRA 0x(\w+)", line)) and int(found[1], 16) < at:
            loops.append((int(found[1], 16), at))
    bad = set()
    for first, last in loops:
        running = set()
        for _, kind, value in [event for event in events if first <= event[0] < last] * 2:
            if kind == "product":
                running |= set(range(value, value + 4))
            elif kind == "wait" and value == 0:
                running.clear()
            elif kind == "pack" and value in running:
                bad.add((hex(first), hex(last)))
    return bad


def main():
    shared = dict(factor_ptr=None, leads_ptr=None, HEADS_KV=24, SUB=1, V_FIRST=0, EVEN=True, CENTER=True, HAS_FACTOR=False, PROBED=True,
                  DTYPE=tl.bfloat16, PRECISION="tf32")
    for width in (32, 64, 128):
        sizes = dict(D=width, DV=width, DV_ROW=width, DV_PAD=width)
        pairs = width // 8 * (width // 8 + 1) // 2
        for degree in (2, 3):
            tile = tuned.EVALUATE[9, 0][width]
            first = degree == 2
            constants = dict(shared, **sizes, GROUP=1, P=degree + 1, DEGREE=degree, BLOCKS=tile.blocks, BLOCK_M=tile.rows,
                             LINEAR_STEP=min(64, width), HERMITE=False, SCALED=False, FIRST=first, FOLD=first, LAST=first,
                             SPLIT_Z=True, q_sd=1, o_sd=1)
            if first:
                constants |= dict(numerator_ptr=None, denominator_ptr=None, variance_ptr=None)
            for found in hazards(sass(evaluate_kernel, constants, tile)):
                print("evaluate", width, degree, found)
            tile = tuned.choose("accumulate", (9, 0), degree, width, 2, 0)
            constants = dict(shared, **sizes, weight_ptr=None, inverse_ptr=None, DEGREE=degree, PAIRS=pairs, PAIRS_PAD=256, BLOCKS=tile.blocks,
                             BLOCK_N=tile.rows, HAS_WEIGHT=False, PARTIAL=False, SPLIT_Z=True, k_sd=1, v_sd=1)
            for found in hazards(sass(accumulate_kernel, constants, tile)):
                print("accumulate", width, degree, found)


if __name__ == "__main__":
    main()
