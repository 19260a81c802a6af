"""Check a batch before it goes to the devices, where nothing raises any more.

In a compiled program an id outside the vocabulary reads the nearest row of the embedding, and a target outside it picks
no logit: both give wrong numbers silently. The loader's batches pass; this check is for batches made elsewhere.
"""

from typing import Any

import numpy as np

from llm_jax.data.loader import IGNORE, Batch
from llm_jax.model.config import ModelConfig

PYTORCH_IGNORES = -100
MOST = np.iinfo(np.int32).max


def check_batch(batch: Batch, model: ModelConfig, rows: int, seq_len: int) -> None:
    """Raise `ValueError` unless `batch` holds `rows` rows of `seq_len` tokens that `model` can read and answer.

    Ids and positions are int32, `prefix` is bool. Targets are ids of the vocabulary, or of the classes of a
    classifier, or IGNORE. Reads every number once, on the host.
    """
    shape = (rows, seq_len)
    farthest = model.max_seq_len - 1 if model.positions == "learned" else MOST
    _check_ids("tokens", batch.tokens, shape, 0, model.vocab_size - 1, f"model.vocab_size={model.vocab_size}")
    answers = "vocab_size" if model.n_classes is None else "n_classes"
    number = getattr(model, answers)
    _check_ids("targets", batch.targets, shape, IGNORE, number - 1, f"model.{answers}={number}")
    if batch.segments is not None:
        _check_ids("segments", batch.segments, shape, 0, MOST, "numbered from 1, 0 in the padding")
    if batch.positions is not None:
        _check_ids("positions", batch.positions, shape, 0, farthest, f"model.max_seq_len={model.max_seq_len}")
    if batch.prefix is not None:
        _check_form("prefix", np.asarray(batch.prefix), shape, np.bool_)


def _check_ids(name: str, given: Any, shape: tuple[int, int], least: int, most: int, why: str) -> None:
    found = np.asarray(given)
    _check_form(name, found, shape, np.int32)
    for value in (int(found.min()), int(found.max())):
        if not least <= value <= most:
            way = f"set what counts for nothing to IGNORE, {IGNORE}" if value == PYTORCH_IGNORES else "look at the data"
            allowed = f"{least} to {most}" if most < MOST else f"{least} and more"
            raise ValueError(f"batch.{name} holds {value}, expected {allowed} ({why}); {way}")


def _check_form(name: str, found: np.ndarray, shape: tuple[int, int], dtype: Any) -> None:
    if found.shape != shape or found.dtype != dtype:
        wanted = f"{np.dtype(dtype)} {list(shape)}"
        raise ValueError(
            f"batch.{name} is {found.dtype} {list(found.shape)}, expected {wanted} (rows of this process, "
            f"data.seq_len); give it that shape and .astype({np.dtype(dtype)!s})"
        )
