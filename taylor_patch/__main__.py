"""python -m taylor_patch: the same commands as `taylor-patch`."""

from taylor_patch.cli import main

main(prog_name="taylor-patch")
