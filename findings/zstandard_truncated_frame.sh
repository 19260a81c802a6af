#!/usr/bin/env bash
# zstandard 0.25.0 (python-zstandard): reading a file that ends in the middle of a frame.
#
# One would expect an error, as gzip, bz2 and lzma of the standard library raise EOFError there.
# Seen: stream_reader returns what could be decoded, then b"", as at the end of a whole file. A download that broke off
# reads as a shorter text. decompress() of the same bytes raises.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder" && "$folder/bin/pip" install -q zstandard==0.25.0
"$folder/bin/python" - <<'PYTHON'
import bz2
import gzip
import io
import lzma
import random

import zstandard

words = [f"word{number}" for number in range(5000)]
text = " ".join(random.Random(0).choices(words, k=200_000)).encode()
whole = zstandard.ZstdCompressor().compress(text)
cut = whole[: len(whole) // 2]

with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(cut)) as reader:
    read = reader.read()  # no error here
    assert reader.read(1) == b""  # nor here: this looks like the end
print(f"zstandard: {len(read):,} of {len(text):,} bytes, no error")
assert 0 < len(read) < len(text)
assert text.startswith(read)

try:
    zstandard.ZstdDecompressor().decompress(cut)
except zstandard.ZstdError as error:
    print(f"decompress: {error}")
else:
    raise AssertionError("decompress took a truncated frame")

for module in (gzip, bz2, lzma):
    packed = module.compress(text)
    try:
        module.open(io.BytesIO(packed[: len(packed) // 2])).read()
    except EOFError as error:
        print(f"{module.__name__}: EOFError: {error}")
    else:
        raise AssertionError(f"{module.__name__} read a truncated file")
PYTHON
