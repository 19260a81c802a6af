#!/usr/bin/env bash
# transformers 4.57 reading a config.json that transformers 5 wrote.
#
# transformers 5 stores rotary settings as rope_parameters. One would expect that the release before reads them, or
# says that it can't.
# Seen: LlamaConfig of 4.57.1 keeps the unknown key and uses its defaults: rope_theta 10000 in place of 500000 and no
# scaling. The model loads, and its text falls apart with distance. No warning.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
for version in 4.57.1 5.23.0; do
  "${PYTHON:-python3}" -m venv --clear "$folder/$version"
done
"$folder/4.57.1/bin/pip" install -q transformers==4.57.1
"$folder/5.23.0/bin/pip" install -q transformers==5.23.0
cat >"$folder/read.py" <<'PYTHON'
import json
import sys

import transformers

scaling = {"rope_type": "linear", "factor": 4.0}
with open(sys.argv[1]) as file:
    config = transformers.LlamaConfig.from_dict(json.load(file))
rotary = getattr(config, "rope_parameters", None)
old = (getattr(config, "rope_theta", None), getattr(config, "rope_scaling", None))
print(f"transformers {transformers.__version__}: rope_theta {old[0]}, rope_scaling {old[1]}, rope_parameters {rotary}")
if transformers.__version__.startswith("4."):
    assert old == (10000.0, None)
    assert rotary == {"rope_theta": 500000.0, **scaling}  # stored, and read by nothing
else:
    assert rotary["rope_theta"] == 500000.0
    assert rotary["rope_type"] == "linear"
PYTHON
cat >"$folder/config.json" <<'JSON'
{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 128,
 "vocab_size": 128, "rope_parameters": {"rope_type": "linear", "rope_theta": 500000.0, "factor": 4.0}}
JSON
for version in 4.57.1 5.23.0; do
  "$folder/$version/bin/python" "$folder/read.py" "$folder/config.json"
done
