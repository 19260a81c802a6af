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


# What is written in place of what, and the pieces whose hash changes with it.
CHANGES: dict[str, tuple[str, str, set[str]]] = {
    "global": ("weight = 2.0", "weight = 3.0", {"function", "decorated", "jitted", "lambda"}),
    "decorator": ("return f(*args)", "return -f(*args)", {"decorated"}),
    "base": ("return x * 2", "return x * 3", {"object", "method", "class"}),
    "attribute": ("power = 1", "power = 2", {"object", "method", "class"}),
    "state": ('"object": Loss(1)', '"object": Loss(7)', {"object"}),
    "set": ('names = {"b", "a"}', 'names = {"b", "c"}', {"object", "method", "class"}),
    "comment": ("def helper(x):", "def helper(x):  # a comment", set()),
}
HASHES = """
import importlib, json, sys
from llm_jax.runs.code import code_hash

found = []
for folder in sys.argv[1:]:
    sys.path[0] = folder
    sys.modules.pop("code_of_a_user", None)
    pieces = importlib.import_module("code_of_a_user").pieces
    found.append({name: code_hash(piece) for name, piece in pieces.items()})
print(json.dumps(found))
"""


def hashes(folders: list[Path], seed: int) -> list[dict[str, str]]:
    """The hash of each piece in each folder, in a process that orders sets by `seed`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(seed)}
    command = [sys.executable, "-c", HASHES, *folders]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def before_and_after(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """The hashes of the source in a process, and those of each change of it in another."""
    folder = tmp_path_factory.mktemp("code")
    for name, (old, new, _) in {"": ("", "", set()), **CHANGES}.items():
        text = SOURCE.replace(old, new) if old else SOURCE
        assert (text != SOURCE) == bool(old)
        (folder / f"of{name}").mkdir()
        (folder / f"of{name}" / "code_of_a_user.py").write_text(text)
    (before,) = hashes([folder / "of"], seed=0)
    after = hashes([folder / f"of{name}" for name in CHANGES], seed=1)
    return before, dict(zip(CHANGES, after, strict=True))


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_what_code_does_changes_its_hash_and_no_other(name: str, before_and_after):
    before, after = before_and_after
    assert {piece for piece in before if before[piece] != after[name][piece]} == CHANGES[name][2]


def test_two_functions_in_one_line_are_distinguished():
    first, second = (lambda x: x + 1), (lambda x: x + 2)
    assert code_hash(first) != code_hash(second)
