"""What may not be there, or not be whole: libraries, and files that others wrote."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any


def optional(name: str) -> ModuleType:
    """The module of that name. Raises `ValueError` where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"this needs {name}; install it: pip install 'llm-jax[hf]'") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `ValueError` where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path.parent} has no {path.name}; name the folder of a model, with all of its files"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no object of JSON, but {str(found)[:30]}; download it again")
    return found
