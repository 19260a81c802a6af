#!/usr/bin/env bash
# optax 0.2.8: contrib.scale_by_muon with one row of coefficients for each Newton-Schulz step.
#
# ns_coeffs may be rows of three numbers, one for each of ns_steps. One would expect that fewer rows than steps are
# refused, and that more rows are fine; the docstring says that ns_steps is ignored then.
# Seen: the check compares the other way around. Six rows for five steps are refused as "Not enough coeffs to perform 5
# steps"; three rows for five steps are taken without a word, and three iterations run. So Muon orthogonalizes less than
# it was told to.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder" && "$folder/bin/pip" install -q jax==0.10.2 optax==0.2.8
JAX_PLATFORMS=cpu "$folder/bin/python" - <<'PYTHON'
import jax
import numpy as np
from optax.contrib import scale_by_muon

ROW = (3.4445, -4.7750, 2.0315)  # of Jordan et al., 2024
gradient = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)


def update(rows: int, steps: int) -> np.ndarray:
    transform = scale_by_muon(ns_coeffs=(ROW,) * rows, ns_steps=steps)
    return np.asarray(jax.jit(transform.update)(gradient, transform.init(gradient))[0])


try:
    update(rows=6, steps=5)
except ValueError as error:
    print(f"6 rows, 5 steps: {error}")
    assert str(error) == "Not enough coeffs to perform 5 steps"
else:
    raise AssertionError("6 rows for 5 steps were taken")

same_as_three = np.abs(update(rows=3, steps=5) - update(rows=3, steps=3)).max()
as_told = np.abs(update(rows=3, steps=5) - update(rows=5, steps=5)).max()
print(f"3 rows, 5 steps: {same_as_three:.0e} from three steps, {as_told:.2f} from five")
assert same_as_three == 0 < 0.01 < as_told
PYTHON
