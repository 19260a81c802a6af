"""What every test runs under: eight CPU devices, strict numerics, and every annotated shape checked.

This file is read before any test module, hence before JAX or llm_jax is imported: the settings hold for all.
Programs that tests start in processes of their own inherit the environment, not `jax.config`.
"""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiled programs are kept between runs of the suite; they are loaded as they were, so no number changes.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".pytest_cache" / "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import hypothesis
import jax
import jaxtyping

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

jaxtyping.install_import_hook("llm_jax", "beartype.beartype")

# A deadline would time the first compile, and a random seed would make one machine red and the next green.
hypothesis.settings.register_profile("llm_jax", deadline=None, derandomize=True)
hypothesis.settings.load_profile("llm_jax")
