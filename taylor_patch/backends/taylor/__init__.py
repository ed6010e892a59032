"""Global Taylor attention: one Taylor series for all keys, linear in the number of tokens. Backends taylor_torch, triton_full, triton_fused.

options.py        the options of all three
base.py           what all three share: gates, refusals, normalisation of rows, what too many bad denominators lead to
denominators.py   denominators, their statistics, weights of masked keys
polynomial.py     what a backend computes, by the polynomial of a few rows' logits
auto_tune.py      the search for options in the first steps of a run
error_aimed.py    the choice of P and coefficients by the error asked for
plain.py          taylor_torch, in plain PyTorch
gpu.py            triton_full and triton_fused
plan.py           sizes of a call's work on the GPU, from shapes alone
tuned.py          tile sizes of the kernels
launch.py         launches of the kernels, and the operator of torch; imports Triton
kernels/          the kernels; imports Triton

Features and their tiles are in taylor_patch/features/. Nothing is imported here.
"""
