"""Compile attention and its gradient for TPUs that are not here, and print what the compiler says.

.venv/bin/python scripts/flash_tpu.py v5e:2x2 flash splash chunked reference
"""

import os
import sys
from typing import Any

# libtpu reads these as it loads.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding

from llm_jax.axes import MeshConfig
from llm_jax.ops.attention import attention
from llm_jax.ops.config import Scores
from llm_jax.ops.mask import Mask
from llm_jax.sharding import ACTIVATION_AXES, make_mesh, spec

B, L, K, G, H = 2, 8192, 8, 4, 128  # over a mesh of 2 x 2: a device has one row and 4 key/value heads


def main(topology: str, *implementations: str) -> None:
    devices = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    mesh = make_mesh(MeshConfig(data=2, tensor=2), devices)

    def array(letters: str, shape: tuple[int, ...], dtype: str) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec(letters, ACTIVATION_AXES)))

    def run(name: str, mask: Mask, scores: Scores, q: jax.Array, k: jax.Array, v: jax.Array) -> list[jax.Array]:
        implementation = None if name == "default" else name
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, mask, scores, implementation=implementation), q, k, v)
        return [out, *pull(out)]

    documents = array("BL", (B, L), "int32")
    everything = Mask(window=1024, sinks=4, segments=documents, prefix=array("BL", (B, L), "bool"))
    cases = {
        "causal bfloat16": (Mask(), Scores(), jnp.bfloat16),
        "documents bfloat16": (Mask(segments=documents), Scores(), jnp.bfloat16),
        "everything float32": (everything, Scores(softcap=30.0, alibi=True), jnp.float32),
    }
    for name in implementations:
        for case, (mask, scores, dtype) in cases.items():
            q, k = array("BLKGH", (B, L, K, G, H), dtype), array("BLKH", (B, L, K, H), dtype)
            try:
                with jax.set_mesh(mesh):
                    lowered = jax.jit(run, static_argnums=(0, 2)).lower(name, mask, scores, q, k, k)
                kernels, memory = lowered.as_text().count("tpu_custom_call"), lowered.compile().memory_analysis()
                assert memory is not None
                said = f"{kernels} kernels, {memory.temp_size_in_bytes / 1e9:.3f} GB of temporaries"
            except (ValueError, jax.errors.JaxRuntimeError) as error:  # declined, or out of memory
                said = str(error).splitlines()[0]
            print(f"{topology} {name}, {case}: {said}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
