"""Compare our compiled train step with MaxText's, on the same topologies.

    python -m llm_jax plan llama2_7b --topology v5e:4x4      # to see one of them in full
    python scripts/bench_plan.py [ROW ...]                   # all: about 100 seconds each on two quiet cores

Needs `pip install "jax[tpu]"`, and no TPU. MaxText 0.2.5 was measured in November 2026 with JAX 0.12.0.1 and libtpu
0.0.52: AdamW, float32 state, bfloat16 compute, full rematerialization, rows of 2048 tokens, splash attention. GB are
1e9 bytes a device; "sent" is per step; cycles are the compiler's estimate, kernels not included.
"""

import sys

from llm_jax import runtime
from llm_jax.config import override
from llm_jax.plan.plan import plan, versions
from llm_jax.plan.topology import parse_topology
from llm_jax.runs.start import load_recipe

# Name: topology, recipe, changes; then MaxText's GB of arguments, temporaries, peak and sent, and Mcycles.
ROWS = {
    "7b": ("v5e:4x4", "llama2_7b", [], (5.054, 3.701, 8.719, 40.58, 1546)),
    "7b-tensor": ("v5e:4x4", "llama2_7b", ["mesh.fsdp=4", "mesh.tensor=4"], (5.055, 3.741, 8.704, 29.75, 1247)),
    "7b-batch": ("v5e:4x4", "llama2_7b", ["data.batch_size=64"], (5.054, 7.248, 12.138, 40.68, 5987)),
    "7b-v5p": ("v5p:2x2x1", "llama2_7b", ["data.batch_size=8"], (20.215, 11.926, 32.131, 29.59, 1257)),
    "1b": ("v5e:4x4", "llama_1b", ["data.batch_size=64"], (0.829, 2.683, 3.462, 6.35, 1399)),
}
COLUMNS = ("arguments", "temporary", "peak", "sent", "Mcycles")


def main(names: list[str]) -> None:
    runtime.start(topology=parse_topology("v5e:4x4"))
    print(f"ours: {', '.join(versions())}; MaxText 0.2.5: jax 0.12.0.1, libtpu 0.0.52")
    print(f"{'':12}" + "".join(f"{column:>22}" for column in COLUMNS) + "      (ours / MaxText)")
    for name in names:
        topology, recipe, changes, theirs = ROWS[name]
        found = plan(override(load_recipe(recipe), changes), parse_topology(topology))
        sent = sum(one.bytes for one in found.traffic or [])
        ours = (*(x / 1e9 for x in (found.arguments, found.temporary, found.peak, sent)), found.cycles / 1e6)
        pairs = (f"{a:.3f} / {b:.3f}" if b < 100 else f"{a:.0f} / {b}" for a, b in zip(ours, theirs, strict=True))
        print(f"{name:12}" + "".join(f"{pair:>22}" for pair in pairs), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(ROWS))
