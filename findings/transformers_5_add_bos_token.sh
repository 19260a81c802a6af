#!/usr/bin/env bash
# transformers 5.23 reading a tokenizer_config.json with add_bos_token beside a tokenizer.json.
#
# add_bos_token says whether a text begins with the token that begins texts. One would expect that it is read, as the
# release before reads it for a LlamaTokenizerFast.
# Seen: the two releases give other ids for the same files. 4.57.1 follows add_bos_token; 5.23.0 follows the
# post-processor of tokenizer.json, whatever add_bos_token says, and keeps the attribute. No warning.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
for version in 4.57.1 5.23.0; do "${PYTHON:-python3}" -m venv "$folder/$version"; done
"$folder/4.57.1/bin/pip" install -q transformers==4.57.1
"$folder/5.23.0/bin/pip" install -q transformers==5.23.0
cat >"$folder/read.py" <<'PYTHON'
import json
import sys
import tempfile
from pathlib import Path

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

BEGIN, END = ("<s>", 0), ("</s>", 1)
VOCABULARY = {"<s>": 0, "</s>": 1, "▁": 2, "a": 3, "b": 4, "ab": 5, "▁ab": 6}


def ids(post_processor: bool, add_bos_token: bool) -> list[int]:
    """The ids of the text "ab", a token of its own, by the files in a folder."""
    tokenizer = Tokenizer(models.BPE(VOCABULARY, [("a", "b"), ("▁", "ab")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if post_processor:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[BEGIN, END]
        )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(f"{folder}/tokenizer.json")
        config = {
            "tokenizer_class": "LlamaTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "add_bos_token": add_bos_token,
        }
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config))
        return transformers.AutoTokenizer.from_pretrained(folder)("ab")["input_ids"]


cases = [(post_processor, add_bos_token) for post_processor in (True, False) for add_bos_token in (True, False)]
for case in cases:
    print(f"transformers {transformers.__version__}: post-processor {case[0]}, add_bos_token {case[1]}: {ids(*case)}")
decides = int(transformers.__version__.startswith("4."))  # the second of the two in 4.57.1, the first in 5.23.0
assert [ids(*case) for case in cases] == [[0, 6] if case[decides] else [6] for case in cases]
PYTHON
for version in 4.57.1 5.23.0; do
  "$folder/$version/bin/python" "$folder/read.py"
done
