"""The mark of tests that need native code, which needs a C++ compiler."""

import pytest

from llm_jax.ops import native

built = pytest.mark.skipif(native.not_built() is not None, reason=f"native code: {native.not_built()}")
