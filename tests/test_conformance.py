"""Every implementation of attention against the reference: equal in values and gradients, or declined by name.

`golden/attention.json` says which, and docs/attention.md shows it. After a change that was meant, run
`python tests/test_conformance.py`, which writes both, and look at the difference.
"""

import importlib.util
import json
import string
import sys
import warnings
from pathlib import Path

if __name__ == "__main__":  # as the tests run
    import conftest  # noqa: F401

import jax
import jax.numpy as jnp
import pytest
from arrays import attention_inputs, output_and_gradients

from llm_jax.ops import native
from llm_jax.ops.attention import IMPLEMENTATIONS, Declined, Scores
from llm_jax.ops.mask import Mask, Sparse

GOLDEN = Path(__file__).parent / "golden" / "attention.json"
PAGE = Path(__file__).parents[1] / "docs" / "attention.md"
BEGIN, END = "<!-- written by tests/test_conformance.py -->", "<!-- until here -->"

LONG = 256
BEGINNING = jnp.arange(LONG)[None] < jnp.array([[40], [200]])


def documents(*borders: tuple[int, int]) -> jax.Array:
    """Rows of two documents and padding; each begins at 0 and at its borders."""
    at = jnp.arange(LONG)
    return jnp.stack([jnp.where(at < a, 1, jnp.where(at < b, 2, 0)) for a, b in borders])


PACKED = documents((5, 249), (90, 256))
# What a model may ask for, with the lengths L and S.
CASES: dict[str, tuple[Mask, Scores, int, int]] = {
    "causal": (Mask(), Scores(), LONG, LONG),
    "both ways": (Mask(causal=False), Scores(), LONG, LONG),
    "window": (Mask(window=100), Scores(), LONG, LONG),
    "window and sinks": (Mask(window=50, sinks=3), Scores(), LONG, LONG),
    "prefix": (Mask(prefix=BEGINNING), Scores(), LONG, LONG),
    "packed documents": (Mask(segments=PACKED), Scores(), LONG, LONG),
    "packed, window and sinks": (Mask(segments=PACKED, window=30, sinks=2), Scores(), LONG, LONG),
    "packed, prefix": (Mask(segments=PACKED, prefix=BEGINNING), Scores(), LONG, LONG),
    "strided blocks": (Mask(sparse=Sparse("strided", block=128, local=1, stride=2)), Scores(), LONG, LONG),
    "fixed blocks": (Mask(sparse=Sparse("fixed", block=64, stride=2)), Scores(), LONG, LONG),
    "BigBird blocks": (Mask(sparse=Sparse("bigbird", block=32, random=1)), Scores(), LONG, LONG),
    "soft cap and scale": (Mask(), Scores(scale=0.5, softcap=2.0), LONG, LONG),
    "ALiBi": (Mask(), Scores(alibi=True), LONG, LONG),
    "ALiBi, both ways": (Mask(causal=False), Scores(alibi=True), LONG, LONG),
    "ALiBi, packed, prefix": (Mask(segments=PACKED, prefix=BEGINNING), Scores(alibi=True), LONG, LONG),
    "odd length": (Mask(), Scores(), 9, 9),
    "ragged prefill": (Mask(kv_length=jnp.array([256, 300])), Scores(), LONG, 320),
    "ragged decode": (Mask(kv_length=jnp.array([2, 260]), window=100), Scores(softcap=2.0), 1, LONG + 64),
}
# Key/value heads and query heads for each, and a dtype.
KINDS = {
    "grouped heads": (2, 3, "float32"),
    "grouped heads, bfloat16": (2, 3, "bfloat16"),
    "multi-head": (2, 1, "float32"),
    "multi-query, bfloat16": (1, 2, "bfloat16"),
}
# The largest error of output and gradients, relative to their largest value.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-6}


# What this machine must have for an implementation to run at all.
NEEDS = {
    "cudnn": ("no GPU", jax.default_backend() == "gpu"),
    "native": ("no C++ compiler", native.not_built() is None),
    "tokamax": ("no tokamax", importlib.util.find_spec("tokamax") is not None),
}


def answer(name: str, case: str, kind: str) -> str:
    """`equal`, or why the implementation declines. Fails where its values or gradients are not the reference's."""
    mask, scores, L, S = CASES[case]
    K, G, dtype = KINDS[kind]
    rounded = [x.astype(dtype) for x in attention_inputs(2, L, K, G, 64, S)]
    try:
        with jax.numpy_dtype_promotion("standard"), warnings.catch_warnings():  # other libraries promote as they like
            warnings.simplefilter("ignore")
            found = output_and_gradients(name, mask, scores, rounded)
    except Declined as reason:
        return str(reason)
    exact = output_and_gradients("reference", mask, scores, [x.astype(jnp.float32) for x in rounded])
    for mine, theirs in zip(found, exact, strict=True):
        assert mine.dtype == dtype
        error = jnp.abs(mine.astype(jnp.float32) - theirs).max() / jnp.abs(theirs).max()
        assert error < TOLERANCE[dtype], f"{name}, {case}, {kind}: off by {error}"
    return "equal"


def kinds_of(name: str, case: str) -> list[str]:
    """Two kinds, one of each dtype, in turn: every kind meets every implementation, and every case."""
    at = list(IMPLEMENTATIONS).index(name) + list(CASES).index(case)
    return [list(KINDS)[(at + i) % len(KINDS)] for i in range(2)]


def conformance(name: str) -> dict[str, str]:
    """What `name` answers to every case, whatever the heads and the dtype."""
    lack, there = NEEDS.get(name, ("", True))
    if not there:
        return dict.fromkeys(CASES, f"not run: {lack} where this was written")
    found = {}
    for case in CASES:
        answers = {answer(name, case, kind) for kind in kinds_of(name, case)}
        assert len({a == "equal" for a in answers}) == 1, f"{name}, {case}: {answers}"
        found[case] = min(answers)
    return found


def table(golden: dict[str, dict[str, str]]) -> str:
    """Cases by implementations; a letter stands for the reason written below."""
    short = {n: {case: reason(n, answer) for case, answer in column.items()} for n, column in golden.items()}
    reasons = list(dict.fromkeys(r for column in short.values() for r in column.values() if r != "equal"))
    mark = {r: f"({string.ascii_lowercase[i]})" for i, r in enumerate(reasons)} | {"equal": "equal"}
    lines = [f"| | {' | '.join(short)} |", f"|{'---|' * (len(short) + 1)}"]
    lines += [f"| {case} | {' | '.join(mark[column[case]] for column in short.values())} |" for case in CASES]
    return "\n".join([*lines, "", *(f"- {mark[r]} {r}" for r in reasons)])


def reason(name: str, answer: str) -> str:
    """An answer without the name and the way out."""
    return answer.removeprefix(name).partition(";")[0].lstrip(": ")


def between(page: str) -> tuple[str, str, str]:
    """What stands before, in and after the written part of a page."""
    before, rest = page.split(BEGIN)
    inside, after = rest.split(END)
    return before, inside.strip(), after


@pytest.mark.parametrize("case", ["packed, prefix", "fixed blocks", "soft cap and scale"])
def test_chunked_attention_equals_the_reference(case: str):
    assert answer("chunked", case, "grouped heads") == "equal"


@pytest.mark.slow
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_an_implementation_equals_the_reference_or_declines_as_recorded(name: str):
    lack, there = NEEDS.get(name, ("", True))
    if not there:
        pytest.skip(lack)
    assert conformance(name) == json.loads(GOLDEN.read_text())[name]


def test_the_page_shows_every_case_of_every_implementation():
    golden = json.loads(GOLDEN.read_text())
    assert {name: list(column) for name, column in golden.items()} == {name: list(CASES) for name in IMPLEMENTATIONS}
    assert between(PAGE.read_text())[1] == table(golden)


if __name__ == "__main__":
    chosen = sys.argv[1:] or IMPLEMENTATIONS
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    golden |= {name: conformance(name) for name in chosen}
    golden = {name: golden[name] for name in IMPLEMENTATIONS if name in golden}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    before, _, after = between(PAGE.read_text())
    PAGE.write_text(f"{before}{BEGIN}\n{table(golden)}\n{END}{after}")
