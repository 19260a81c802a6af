#!/usr/bin/env bash
# jax and jaxlib 0.10.2 on a CPU: each row of three times a matrix, and the sum of its squares, vmapped and jitted.
#
# One would expect the values of NumPy, whatever the number of rows.
# Seen: of 40,001 float32 rows of three the last 7,233 (from index 32,768 to the end) hold the sum of the row 128 before
# them, without a warning. With 32,768 rows or with 65,536 all are right, and so are eager values of all three. With
# XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type= all rows are right. Reported as jax#39103.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder" && "$folder/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
cat >"$folder/rows.py" <<'PYTHON'
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np

warnings.simplefilter("error")
reverse = jnp.eye(3)[::-1]  # of a row, which leaves the sum of its squares
squares = jax.vmap(lambda row: jnp.sum((reverse @ row) ** 2))


def wrong(found, right) -> np.ndarray:
    return np.flatnonzero(np.abs(found - right) > 1e-4 * right)


for rows in (32_768, 40_001, 65_536):
    x = np.random.default_rng(0).normal(size=(rows, 3)).astype(np.float32)
    right = (x.astype(np.float64) ** 2).sum(1)
    found, eager = np.asarray(jax.jit(squares)(x)), np.asarray(squares(x))
    off = wrong(found, right)
    print(f"{rows:,} rows: {len(off):,} wrong", f"from index {off[0]:,}" if len(off) else "")
    assert not len(wrong(eager, right))
    seen = range(32_768, 40_001) if sys.argv[1] == "wrong" and rows == 40_001 else range(0)
    assert list(off) == list(seen)
    assert not len(wrong(found[off], right[off - 128]))
PYTHON
export JAX_PLATFORMS=cpu
unset XLA_FLAGS
"$folder/bin/python" "$folder/rows.py" wrong
XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type= "$folder/bin/python" "$folder/rows.py" right
