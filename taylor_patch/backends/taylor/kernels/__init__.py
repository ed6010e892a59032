"""Triton kernels of the global Taylor backends. Imported only where Triton is (see launch.py).

features.py     what several kernels share: rows of a state, coordinates, lead monomials, coefficients
moments.py      degrees 0 and 1
probe.py        denominators of a few queries, before features are made
accumulate.py   S and Z of the degrees from 2 on
evaluate.py     features of the queries times S and Z
statistics.py   statistics of denominators

Both passes are matrix products with a factor that is made on the fly. A block of 64 features is the outer product of two
tiles of 8 coordinates times a lead monomial (taylor_patch/features/tiles.py):

    accumulate   S[f, :] = sum_j psi_f(k_j) v_j          psi' [128, tokens] @ v [tokens, D]
    evaluate     out[i, :] = sum_f psi_f(q_i) S[f, :]    psi [queries, 64] @ S [64, D]

Tiles are spread to 64 columns by a product with a constant matrix of zeros and ones: exact, and its result lies in the
registers in the layout that the next product wants, so features never pass through shared memory. Accumulation is in
float32. A row of S ends in 16 columns for Z: its rounding to S's dtype, the rest of it, and zeros. The denominator is thus
one more product of the same features, exact to two roundings of Z. In degree 3 such a product took a quarter of evaluate's time, so
there Z lies apart, in float32, as [blocks / 8, 64, 8 leads], and denominators are made from 16 leads at a time.

Loops are said to run at least once (tl.assume): with a path around one, on which ordinary instructions set the sums to zero,
ptxas makes every tensor-core product wait for the one before it (its message C7515), which costs about half the speed.
"""
