"""Compile MaxText's train step for the rows of `bench_plan.py`, and count it with the same code as ours.

    python3.13 -m venv maxtext && source maxtext/bin/activate
    pip install jax==0.12.0.1 libtpu==0.0.52 flax==0.12.12 "llm_jax @ ." && pip install --no-deps maxtext==0.2.5
    pip install absl-py aqtp cloud-accelerator-diagnostics drjax google-cloud-mldiagnostics google-cloud-storage \
        jinja2 ml-goodput-measurement omegaconf pathwaysutils pillow pydantic qwix sentencepiece sympy tensorboardx \
        tensorflow-cpu tokamax transformers
    python scripts/maxtext_plan.py 1b 7b-v5e-2-tensor        # rows of bench_plan.py, 1 to 3 minutes of a core each

No TPU is needed. MaxText itself is used as it comes, by the functions that its `train_compile.py` calls; the sizes,
mesh and rows a chip are read from our config, so both sides train the same model. Everything else is MaxText's default,
except what is in `FIXED`.
"""

import os
import sys
from typing import Any

from bench_plan import COLUMNS, ROWS, columns, config_of, grid, shown

from llm_jax import runtime
from llm_jax.axes import mesh_sizes
from llm_jax.plan.plan import figures_of, versions
from llm_jax.plan.topology import Topology, parse_topology
from llm_jax.train.config import RunConfig

# Full rematerialization, float32 weights and moments and bfloat16 computation are MaxText's defaults.
FIXED = {
    "attention": "flash",  # what a TPU gets by default; without one here MaxText chooses by the CPU
    "internal_compile": "true",  # takes the names of topologies that libtpu takes
    "enable_checkpointing": "false",
    "base_output_directory": "unused",
    "run_name": "plan",
    "skip_jax_distributed_system": "true",
}
AXES = {"data": "data", "fsdp": "fsdp", "tensor": "tensor", "expert": "expert"}  # ours: theirs


def arguments(config: RunConfig, topology: Topology) -> list[str]:
    """Return the command line of MaxText for the model, mesh and batch of `config` on `topology`."""
    c, devices = config.model, topology.n_devices
    mesh = mesh_sizes(config.mesh, devices)
    sizes = {
        "decoder_block": "llama2" if c.experts is None else "mixtral",
        "base_emb_dim": c.d_model,
        "base_num_query_heads": c.n_heads,
        "base_num_kv_heads": c.K,
        "head_dim": c.H,
        "base_mlp_dim": c.F,
        "base_num_decoder_layers": c.n_layers,
        "vocab_size": c.vocab_size,
        "logits_via_embedding": str(c.tied).lower(),
        "max_target_length": config.data.seq_len,
        "per_device_batch_size": config.data.batch_size / devices,
        "compile_topology": str(topology),
        "internal_compile_num_devices": devices,
        **{f"ici_{AXES[axis]}_parallelism": size for axis, size in mesh.items() if axis in AXES},
    }
    if c.experts is not None:
        sizes |= {"num_experts": c.experts.number, "num_experts_per_tok": c.experts.active, "base_moe_mlp_dim": c.F}
    return [f"{key}={value}" for key, value in (FIXED | sizes).items()]


def compiled(given: list[str]) -> tuple[Any, dict[str, int]]:
    """Return MaxText's compiled train step and its mesh, for its command line `given`."""
    os.environ["LIBTPU_INIT_ARGS"] = "--xla_tpu_spmd_rng_bit_generator_unsafe=true"  # as train_compile.py sets it
    import jax
    from maxtext.configs import pyconfig
    from maxtext.trainers.pre_train import train, train_compile
    from maxtext.utils import maxtext_utils, sharding
    from maxtext.utils.globals import MAXTEXT_CONFIGS_DIR

    jax.config.update("jax_default_prng_impl", "unsafe_rbg")
    config = pyconfig.initialize(["", os.path.join(MAXTEXT_CONFIGS_DIR, "base.yml"), *given])
    mesh = train_compile.get_topology_mesh(config)
    inputs, keywords, state, _, model = train_compile.get_shaped_inputs(mesh, config)
    params, state = sharding.maybe_update_params_sharding_with_opt(config, state)
    entering = sharding.build_zero1_input_state_mesh_shardings(config, state, params)
    rows = sharding.get_input_data_sharding(config, mesh)
    step, *shardings = maxtext_utils.get_functional_train_with_signature(
        train.train_step, rows, entering, model, config, params
    )
    rules = train_compile.axis_rules(config.logical_axis_rules)
    return train_compile.jit_and_compile(step, inputs, keywords, mesh, *shardings, config, rules), dict(mesh.shape)


def main(names: list[str]) -> None:
    """Print a table of the rows that are named, each after the command line that compiles it in MaxText."""
    runtime.start(topology=parse_topology("v5e:4x4"))
    print(f"MaxText 0.2.5: {', '.join(versions())}")
    print(f"{'':16}" + "".join(f"{column:>14}" for column in COLUMNS))
    rows = ROWS | grid()
    for name in names:
        topology = parse_topology(rows[name][0])
        given = arguments(config_of(rows[name]), topology)
        print("python -m maxtext.trainers.pre_train.train_compile base.yml", *given, flush=True)
        program, mesh = compiled(given)
        print(f"{name:16}" + "".join(f"{shown(x):>14}" for x in columns(figures_of(program), mesh)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
