#!/usr/bin/env bash
# orbax-checkpoint 0.12.8: a pytree with a key that contains a dot.
#
# One would expect that a tree comes back as it was saved, or that a key which can be confused with a path is refused.
# Seen: {"a.b": x, "a": {"b": y}} is saved without a word, and both leaves come back with the value of one of them. Keys
# with dots are common: they are the parameter names of PyTorch.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder" && "$folder/bin/pip" install -q jax==0.10.2 orbax-checkpoint==0.12.8
JAX_PLATFORMS=cpu "$folder/bin/python" -W ignore - "$folder/checkpoint" <<'PYTHON'
import sys

import numpy as np
import orbax.checkpoint as ocp

tree = {"a.b": np.full(3, 1.0), "a": {"b": np.full(3, 2.0)}}
checkpointer = ocp.Checkpointer(ocp.StandardCheckpointHandler())
checkpointer.save(sys.argv[1], args=ocp.args.StandardSave(tree))
found = checkpointer.restore(sys.argv[1], args=ocp.args.StandardRestore(tree))
first, second = float(found["a.b"][0]), float(found["a"]["b"][0])
print(f"saved 1 and 2; restored {first:g} and {second:g}")
assert first == second
PYTHON
