"""Optional libraries, and JSON files that others wrote."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from llm_jax import files
from llm_jax.files import Types


def optional(name: str) -> ModuleType:
    """Import an optional module. Raise `ValueError` if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"this needs {name}; install it: pip install 'llm-jax[hf]'") from error


def read_model_json(path: Path, fields: Mapping[str, Types] | None = None) -> dict[str, Any]:
    """Return the object in a JSON file of a model, with these fields. Raise `ValueError` for anything else."""
    return files.read_json(path, fields, advice="name the folder of a model, with all of its files")
