#!/usr/bin/env bash
# jax and jaxlib 0.10.2 on a CPU: each row of three times a matrix, and the sum of its squares, vmapped and jitted.
#
# One would expect the values of NumPy, whatever the number of rows.
# Seen: of 40,001 float32 rows of three the last 7,233 (those from index 32,768 on) hold the sums of other rows. With
# 32,768 rows or with 65,536 all are right, and eager values always are. No warning. Reported as jax#39103; 0.12.0.1 is
# right (on Python 3.12 and later). With XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type= all rows are right.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder" && "$folder/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
cat >"$folder/rows.py" <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
import numpy as np

reverse = jnp.eye(3)[::-1]  # of a row, which leaves the sum of its squares
wrong = {}
for rows in (32_768, 40_001, 65_536):
    x = np.random.default_rng(0).normal(size=(rows, 3)).astype(np.float32)
    right = (x.astype(np.float64) ** 2).sum(1)
    found = np.asarray(jax.jit(jax.vmap(lambda row: jnp.sum((reverse @ row) ** 2)))(x))
    off = np.flatnonzero(np.abs(found - right) > 1e-4 * right)
    wrong[rows] = len(off)
    print(f"{rows:,} rows: {len(off):,} wrong", f"from index {off[0]:,} on" if len(off) else "")
    if len(off):
        print(
            f"  sum of all: {found.sum() / right.sum() - 1:+.2%}; of the wrong rows: {found[off].sum() / right[off].sum() - 1:+.2%}"
        )
assert wrong[32_768] == wrong[65_536] == 0
assert (wrong[40_001] > 0) == (sys.argv[1] == "wrong"), wrong
PYTHON
export JAX_PLATFORMS=cpu
unset XLA_FLAGS
"$folder/bin/python" "$folder/rows.py" wrong
XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type= "$folder/bin/python" "$folder/rows.py" right
