#!/usr/bin/env bash
# orbax-checkpoint 0.12.8: one bit of the file that holds an array changes after the checkpoint was written.
#
# One would expect that restore notices: a checkpoint outlives disks, copies and object stores, and the format could
# keep a checksum beside the data.
# Seen: of 40 checkpoints, each with one bit of its largest file flipped, all restore without an error, and each gives
# other numbers.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder" && "$folder/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 orbax-checkpoint==0.12.8
JAX_PLATFORMS=cpu "$folder/bin/python" -W ignore - "$folder/checkpoint" <<'PYTHON'
import sys
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

FLIPS = 40
random = np.random.default_rng(0)
weights = random.normal(size=(512, 512)).astype(np.float32)
folder = Path(sys.argv[1])
checkpointer = ocp.Checkpointer(ocp.StandardCheckpointHandler())
checkpointer.save(folder, args=ocp.args.StandardSave({"w": weights}))
largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
whole = largest.read_bytes()

silent = raised = 0
for index in random.integers(0, len(whole), FLIPS):
    changed = bytearray(whole)
    changed[index] ^= 1 << int(random.integers(8))
    largest.write_bytes(changed)
    try:
        found = checkpointer.restore(folder, args=ocp.args.StandardRestore({"w": weights}))["w"]
    except Exception as error:
        raised += 1
        print(f"byte {index:,}: {type(error).__name__}")
    else:
        silent += not np.array_equal(found, weights)
print(f"{FLIPS} flips in a file of {len(whole):,} bytes: {raised} raised, {silent} gave other numbers without a word")
assert silent == FLIPS
PYTHON
