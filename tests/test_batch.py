"""A batch that would give a wrong number without a word is refused before it reaches a device."""

import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import first_batches
from grid import TINY, tiny
from tiny_run import tiny as tiny_run

from llm_jax.data.loader import IGNORE, Batch
from llm_jax.data.task import IGNORE as TASK_IGNORE
from llm_jax.ops.attention import attention
from llm_jax.ops.loss import IGNORE as LOSS_IGNORE
from llm_jax.ops.loss import cross_entropy
from llm_jax.train.batch import check_batch
from llm_jax.train.program import Program

B, L, V = 3, 8, TINY.vocab_size
IDS = np.arange(B * L, dtype=np.int32).reshape(B, L) % V
GOOD = Batch(IDS, np.where(IDS > 3, IDS, IGNORE).astype(np.int32), segments=IDS, positions=IDS, prefix=IDS > 3)


def with_one(x: np.ndarray, value: int) -> np.ndarray:
    x = x.copy()
    x[1, 2] = value
    return x


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an id of the next larger vocabulary": ({"tokens": with_one(IDS, V)}, rf"tokens holds {V}, expected 0 to {V - 1} "),
    "an id below 0": ({"tokens": with_one(IDS, -1)}, r"tokens holds -1, expected 0 to"),
    "a target of PyTorch": (
        {"targets": with_one(GOOD.targets, -100)},
        r"targets holds -100, expected -1 to 13 \(model.vocab_size=14\); set what counts for nothing to IGNORE, -1",
    ),
    "a target beyond the vocabulary": ({"targets": with_one(GOOD.targets, V)}, rf"targets holds {V}, expected -1 to"),
    "64 bits": ({"targets": IDS.astype(np.int64)}, r"targets is int64 \[3, 8\], expected int32 \[3, 8\]"),
    "ids as they lie on disk": ({"tokens": IDS.astype(np.uint16)}, r"tokens is uint16 .* give it .*\.astype\(int32\)"),
    "floats": ({"tokens": IDS.astype(np.float32)}, r"tokens is float32"),
    "a row less": ({"tokens": IDS[:2]}, r"tokens is int32 \[2, 8\], expected int32 \[3, 8\]"),
    "targets of another length": ({"targets": IDS[:, :-1]}, r"targets is int32 \[3, 7\]"),
    "segments below 0": ({"segments": with_one(IDS, -1)}, r"segments holds -1, expected 0 and more"),
    "positions below 0": ({"positions": with_one(IDS, -1)}, r"positions holds -1, expected 0 and more"),
    "a prefix of numbers": ({"prefix": IDS}, r"prefix is int32 .*, expected bool"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_would_give_a_wrong_number_is_refused(changes: dict[str, Any], message: str):
    check_batch(GOOD, TINY, B, L)
    check_batch(jax.tree.map(jnp.asarray, GOOD), TINY, B, L)
    with pytest.raises(ValueError, match=f"batch.{message}") as error:
        check_batch(dataclasses.replace(GOOD, **changes), TINY, B, L)
    assert "\n" not in str(error.value)


def test_positions_end_with_their_table_and_targets_with_the_classes():
    learned, classes = tiny(positions="learned"), tiny(n_classes=3)
    with pytest.raises(ValueError, match=r"positions holds 13, expected 0 to 9 \(model.max_seq_len=10\)"):
        check_batch(GOOD, learned, B, L)
    with pytest.raises(ValueError, match=r"targets holds 13, expected -1 to 2 \(model.n_classes=3\)"):
        check_batch(GOOD, classes, B, L)


def test_every_entry_of_a_program_refuses_a_batch_of_another_vocabulary(config):
    program = Program.on_one_device(dataclasses.replace(config, accumulate=1))
    (batch,) = first_batches(config, 1)
    wrong = dataclasses.replace(batch, targets=with_one(batch.targets, -100))
    params = program.abstract_state.params
    for enter in (program.train_step, program.gradient, program.score):
        given = program.abstract_state if enter == program.train_step else params
        with pytest.raises(ValueError, match=r"batch.targets holds -100"):
            enter(given, wrong)


def test_there_is_one_number_for_a_target_that_counts_for_nothing():
    assert IGNORE == TASK_IGNORE == LOSS_IGNORE == -1


def test_inside_a_program_an_invalid_target_picks_no_logit():
    logits = jax.random.normal(jax.random.key(0), (2, 5))
    loss, nll = cross_entropy(logits, jnp.array([-100, 5]))
    np.testing.assert_allclose(loss, jax.nn.logsumexp(logits, axis=-1), rtol=1e-6)
    np.testing.assert_allclose(nll, loss)


def test_an_array_in_place_of_a_mask_is_an_error_that_says_what_to_use():
    q, k = jnp.ones((1, 4, 1, 1, 2)), jnp.ones((1, 4, 1, 2))
    with pytest.raises(ValueError, match=r"expected a Mask, .*; use Mask\(causal=False\)"):
        inspect.unwrap(attention)(q, k, k, jnp.ones((1, 4, 4), bool))


def test_the_tiny_run_has_a_vocabulary_to_leave(tmp_path):
    assert tiny_run(tmp_path).model.vocab_size > 257
