#!/usr/bin/env bash
# numpy 2.4.6: ndarray.tofile and numpy.save to a file on a disk that is full by the last few kilobytes.
#
# One would expect an OSError, as from file.write and file.flush, where not all of an array could be written.
# Seen: neither raises. The end of the array waits in a buffer of C's stdio, and what the system answers when that is
# written, as it is closed, is not looked at: the file is short, without a word. A limit on the size of files (ulimit
# -f) stands for the disk here.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder" && "$folder/bin/pip" install -q numpy==2.4.6
"$folder/bin/python" - "$folder" <<'PYTHON'
import resource
import sys
from pathlib import Path

import numpy as np

folder, array = Path(sys.argv[1]), np.arange(10_000, dtype=np.float32)
most = array.nbytes - 1000
resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))

with open(folder / "tofile", "wb") as file:
    array.tofile(file)
np.save(folder / "save.npy", array)
try:
    with open(folder / "write", "wb") as file:
        file.write(array.data)
        file.flush()
except OSError as error:
    print(f"write: {error}")
else:
    raise AssertionError("file.write took it too")

sizes = [(folder / name).stat().st_size for name in ("tofile", "save.npy")]
print(f"tofile, save: {sizes} bytes of {array.nbytes:,}, and no error")
assert sizes == [most, most]
PYTHON
