"""Compare our compiled train step with MaxText's, on the same topologies.

    python -m llm_jax plan llama2_7b --topology v5e:4x4      # to see one of them in full
    python scripts/bench_plan.py [ROW ...]                   # the five rows that were tuned, or those named
    python scripts/bench_plan.py --grid                      # twelve that were not

Needs `pip install "jax[tpu]"`, and no TPU. A row takes 1 to 3 minutes of a core. The last line is JSON.

MaxText 0.2.5's numbers are stored here; `scripts/maxtext_plan.py ROW` made those of the grid, with JAX 0.12.0.1 and
libtpu 0.0.52. Both sides: AdamW, float32 state, bfloat16 compute, full rematerialization, splash attention, rows of
2048 tokens unless a row says otherwise. GB are 1e9 bytes a device; "sent" is a step's, and "alone" is what is sent with
nothing computed beside it; cycles are the compiler's estimate, kernels not included.
"""

import json
import sys
from collections.abc import Mapping

from llm_jax import runtime
from llm_jax.config import override
from llm_jax.plan import hlo
from llm_jax.plan.plan import Figures, figures, versions
from llm_jax.plan.topology import parse_topology
from llm_jax.runs.start import load_recipe
from llm_jax.train.config import RunConfig
from llm_jax.train.program import Program

COLUMNS = ("arguments", "temporary", "peak", "sent", "alone", "Mcycles")
# Name: topology, recipe, changes; then MaxText's COLUMNS, None where unknown.
Row = tuple[str, str, list[str], tuple[float | None, ...]]
ROWS: dict[str, Row] = {
    "7b": ("v5e:4x4", "llama2_7b", [], (5.054, 3.701, 8.719, 40.58, None, 1546)),
    "7b-tensor": (
        "v5e:4x4",
        "llama2_7b",
        ["mesh.fsdp=4", "mesh.tensor=4"],
        (5.055, 3.741, 8.704, 29.75, None, 1247),
    ),
    "7b-batch": ("v5e:4x4", "llama2_7b", ["data.batch_size=64"], (5.054, 7.248, 12.138, 40.68, None, 5987)),
    "7b-v5p": ("v5p:2x2x1", "llama2_7b", ["data.batch_size=8"], (20.215, 11.926, 32.131, 29.59, None, 1257)),
    "1b": ("v5e:4x4", "llama_1b", ["data.batch_size=64"], (0.829, 2.683, 3.462, 6.35, None, 1399)),
}

# Of model, batch a chip, topology and kind of mesh, each pair of values is in one row or more.
CHIPS = {"v5e:4x4": 16, "v6e:2x4": 8, "v5p:2x2x1": 4}
TENSOR = {"v5e:4x4": (4, 4), "v6e:2x4": (2, 4), "v5p:2x2x1": (2, 2)}  # fsdp, tensor
MODELS = {
    "1b": ("llama_1b", []),
    # Llama 3.2 3B, from its released config.
    "3b": (
        "llama_1b",
        ["model.d_model=3072", "model.n_layers=28", "model.n_heads=24", "model.vocab_size=128256", "model.tied=true"],
    ),
    "7b": ("llama2_7b", []),
}
UNKNOWN = (None,) * len(COLUMNS)  # MaxText's step is not compiled yet
# Model, topology, rows a chip, whether `tensor` splits; MaxText's COLUMNS.
TWELVE = [
    ("1b", "v5e:4x4", 1, True, (0.828, 0.892, 1.677, 6.794, 2.810, 247)),
    ("1b", "v6e:2x4", 2, False, (1.657, 1.833, 3.479, 6.508, 1.378, 254)),
    ("1b", "v5p:2x2x1", 4, True, (3.313, 3.115, 6.398, 7.659, 7.615, 436)),
    ("1b", "v5e:4x4", 8, False, UNKNOWN),
    ("3b", "v6e:2x4", 1, False, (4.821, 3.155, 7.961, 19.567, 4.478, 278)),
    ("3b", "v5p:2x2x1", 2, True, (9.639, 5.808, 15.418, 12.796, 12.724, 589)),
    ("3b", "v5e:4x4", 4, False, (2.412, 7.410, 9.759, 19.111, 0.999, 3120)),
    ("3b", "v6e:2x4", 8, True, (4.821, 13.171, 17.850, 97.303, 96.397, 1918)),
    ("7b", "v5p:2x2x1", 1, False, UNKNOWN),
    ("7b", "v5e:4x4", 2, True, UNKNOWN),
    ("7b", "v6e:2x4", 4, True, UNKNOWN),
    ("7b", "v5p:2x2x1", 8, False, UNKNOWN),
]


def grid() -> dict[str, Row]:
    """Return the twelve rows by name, such as `3b-v6e-8-tensor`."""
    rows: dict[str, Row] = {}
    for model, topology, batch, tensor, theirs in TWELVE:
        recipe, changes = MODELS[model]
        changes = [*changes, f"data.batch_size={batch * CHIPS[topology]}"]
        if tensor:
            changes += [f"mesh.{axis}={size}" for axis, size in zip(("fsdp", "tensor"), TENSOR[topology], strict=True)]
        name = f"{model}-{topology.partition(':')[0]}-{batch}{'-tensor' * tensor}"
        rows[name] = (topology, recipe, changes, theirs)
    return rows


def config_of(row: Row) -> RunConfig:
    """Return the config of a row."""
    return override(load_recipe(row[1]), row[2])


def columns(found: Figures, mesh: Mapping[str, int]) -> tuple[float | None, ...]:
    """Return the COLUMNS of a compiled step on `mesh`, whoever wrote it; None where it is too large to compile."""
    memory = (found.arguments, found.temporary, found.peak)
    if not found.finished:
        return (*(x / 1e9 for x in memory), None, None, None)
    module = hlo.parse(found.text)
    sent = hlo.collectives(module, mesh)
    alone = [one for one in sent if not one.overlapped]
    communication = (sum(amount for _, amount in hlo.totals(some).values()) for some in (sent, alone))
    return (*(x / 1e9 for x in (*memory, *communication)), hlo.cycles(module) / 1e6)


def shown(x: float | None) -> str:
    """Return a number in as many digits as the table has room for; `-` for None."""
    return "-" if x is None else f"{x:.3f}" if x < 100 else f"{x:.0f}"


def main(arguments: list[str]) -> None:
    """Print a table of the rows that are asked for, and JSON."""
    rows = ROWS | grid()
    chosen = [name for name in arguments if name != "--grid"] or list(grid() if "--grid" in arguments else ROWS)
    runtime.start(topology=parse_topology("v5e:4x4"))
    print(f"ours: {', '.join(versions())}; MaxText 0.2.5: jax 0.12.0.1, libtpu 0.0.52")
    print(f"{'':16}" + "".join(f"{column:>18}" for column in COLUMNS) + "      (ours / MaxText)")
    results = {}
    for name in chosen:
        topology = parse_topology(rows[name][0])
        program = Program.on(config_of(rows[name]), topology.devices())
        ours, theirs = columns(figures(program, topology), program.mesh.shape), rows[name][3]
        pairs = (f"{shown(a)} / {shown(b)}" for a, b in zip(ours, theirs, strict=True))
        print(f"{name:16}" + "".join(f"{pair:>18}" for pair in pairs), flush=True)
        results[name] = {who: dict(zip(COLUMNS, x, strict=True)) for who, x in (("ours", ours), ("maxtext", theirs))}
    print(json.dumps({"versions": versions(), "rows": results}))


if __name__ == "__main__":
    main(sys.argv[1:])
