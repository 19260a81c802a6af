"""A run knows its code again: by what it does, in every process, and by nothing else."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import optax
import pytest
from grid import TINY

import llm_jax as lj
from llm_jax.config import import_object
from llm_jax.runs.code import code_hash, found_again, import_path, record_of
from llm_jax.train.custom import Custom

MODEL = TINY
ROOT = Path(__file__).parents[1]


def cross_entropy(model, params, batch, key):
    nll, _ = lj.cross_entropy(lj.forward_batch(model, params, batch, key).logits, batch.targets)
    return nll.sum(), {"nll": nll.sum(), "documents": (batch.documents >= 0).sum().astype(nll.dtype)}


def sgd() -> optax.GradientTransformation:
    return optax.sgd(0.5)


def test_the_hash_of_code_is_of_what_it_does_and_not_of_how_it_is_written(tmp_path: Path, monkeypatch):
    texts = {
        "plain": "def f(x):\n    return x + 1\n",
        "commented": 'def f(x):\n    """Add one."""\n    # so\n    return (x\n            + 1)\n',
        "other": "def f(x):\n    return x + 2\n",
    }
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in texts.items():
        (tmp_path / f"code_{name}.py").write_text(text)
    plain, commented, other = (code_hash(import_object(f"code_{name}:f")) for name in texts)
    assert plain == commented != other
    assert code_hash(optax.adam(1e-3)) == code_hash(optax.adam(1e-3)) != code_hash(optax.adam(1e-4))
    assert code_hash(functools.partial(sgd, 1)) != code_hash(functools.partial(sgd, 2))
    for name in texts:
        sys.modules.pop(f"code_{name}")


def test_code_with_a_module_is_found_again_and_code_without_one_asked_for():
    record = record_of(Custom.of(cross_entropy, sgd), MODEL)
    assert found_again(record, Custom(), MODEL, "runs/a").loss is cross_entropy
    unnamed = record_of(Custom.of(None, optax.adam(1e-3)), MODEL)
    assert unnamed["optimizer"]["path"] is None
    with pytest.raises(ValueError, match=r"can\'t be found again by itself; resume it from Python: .*optimizer=\.\.\."):
        found_again(unnamed, Custom(), MODEL, "runs/a")
    assert found_again(unnamed, Custom.of(None, optax.adam(1e-3)), MODEL, "runs/a").optimizer is not None
    assert import_path(lambda x: x) is None


@pytest.mark.parametrize(
    ("record", "given", "message"),
    [
        ({}, Custom(loss=cross_entropy), "runs/a was trained without loss=; leave it out"),
        (
            {"loss": {"path": "gone:f", "sha256": "0"}},
            Custom(),
            "loss=gone:f: gone:f can't be imported here .*PYTHONPATH",
        ),
        ({"loss": {"path": "__main__:f", "sha256": "0"}}, Custom(), "from a script or notebook, which can't be found"),
        (
            {"loss": {"path": "x:f", "sha256": "0"}},
            Custom(loss=cross_entropy),
            "loss=x:f does not do what it did when runs/a was trained",
        ),
    ],
    ids=["new", "gone", "notebook", "changed"],
)
def test_code_that_is_not_what_a_run_was_trained_with_is_refused(record, given, message):
    with pytest.raises(ValueError, match=message):
        found_again(record, given, MODEL, "runs/a")


SOURCE = """
import functools
import jax

weight = 2.0
names = {"b", "a"}


def helper(x):
    return x * weight


def traced(f):
    @functools.wraps(f)
    def run(*args):
        return f(*args)
    return run


@traced
def decorated(x):
    return helper(x)


class Base:
    def scale(self, x):
        return x * 2


class Loss(Base):
    power = 1

    def __init__(self, y):
        self.y = y

    def __call__(self, x):
        return self.scale(x) ** self.power + self.y, names


pieces = {
    "function": helper,
    "decorated": decorated,
    "object": Loss(1),
    "method": Loss(1).scale,
    "class": Loss,
    "jitted": jax.jit(helper),
    "lambda": lambda x: x + weight,
}
"""


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("weight = 2.0", "weight = 3.0", {"function", "decorated", "jitted", "lambda"}),
        ("return f(*args)", "return -f(*args)", {"decorated"}),
        ("return x * 2", "return x * 3", {"object", "method", "class"}),
        ("power = 1", "power = 2", {"object", "method", "class"}),
        ('"object": Loss(1)', '"object": Loss(7)', {"object"}),
        ('names = {"b", "a"}', 'names = {"b", "c"}', {"object", "method", "class"}),
        ("def helper(x):", "def helper(x):  # a comment", set()),
    ],
    ids=["global", "decorator", "base", "attribute", "state", "set", "comment"],
)
def test_a_change_of_what_code_does_changes_its_hash_and_no_other(
    tmp_path: Path, old: str, new: str, changed: set[str]
):
    """In processes of their own, which order sets differently."""
    program = "import json; from llm_jax.runs.code import code_hash; import code_of_a_user as m; "
    program += "print(json.dumps({name: code_hash(piece) for name, piece in m.pieces.items()}))"
    found = []
    for number, text in enumerate((SOURCE, SOURCE.replace(old, new))):
        assert number == 0 or text != SOURCE
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "code_of_a_user.py").write_text(text)
        paths = os.pathsep.join([str(tmp_path / f"{number}"), str(ROOT)])
        environment = os.environ | {"PYTHONPATH": paths, "PYTHONHASHSEED": str(number)}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        found.append(json.loads(done.stdout))
    assert {name for name in found[0] if found[0][name] != found[1][name]} == changed


def test_two_functions_in_one_line_are_distinguished():
    first, second = (lambda x: x + 1), (lambda x: x + 2)
    assert code_hash(first) != code_hash(second)
