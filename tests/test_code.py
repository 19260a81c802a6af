"""A run knows its code again: by what it does, in every process, and by nothing else."""

import functools
import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import optax
import pytest
from grid import TINY

import llm_jax as lj
from llm_jax.config import import_object
from llm_jax.runs.code import _spelled, code_hash, found_again, import_path, record_of
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
            "loss=test_code:cross_entropy does not do what x:f does that runs/a was trained with; pass that, or start",
        ),
    ],
    ids=["new", "gone", "notebook", "changed"],
)
def test_code_that_is_not_what_a_run_was_trained_with_is_refused(record, given, message):
    with pytest.raises(ValueError, match=message):
        found_again(record, given, MODEL, "runs/a")


OTHER = """
import functools
import jax

offset = 1.0


@jax.jit
def jitted(x):
    return x + offset


@functools.cache
def cached(n):
    return n + 1
"""
SOURCE = """
import dataclasses
import enum
import functools
import jax
import jax.numpy as jnp
import types
import numpy as np
import optax

import other_code_of_a_user as other
from other_code_of_a_user import cached

weight = 2.0
names = {"b", "a"}
key = jax.random.key(3)
schedule = optax.linear_schedule(0.0, 1.0, 10)
objects = np.array([1, "a", None], object)


@dataclasses.dataclass
class Settings:
    alpha: float


settings = Settings(0.5)
space = types.SimpleNamespace(beta=1.0)
act = jnp.tanh


class Colour(enum.Enum):
    RED = 1


class Slotted:
    __slots__ = "width"

    def __init__(self):
        self.width = 3


slotted = Slotted()


@jax.custom_vjp
def ruled(x):
    return x


ruled.defvjp(lambda x: (x, None), lambda _, g: (g * 1.0,))


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
    widths = (8, 16)

    def __init__(self, y):
        self.y = y

    def __call__(self, x):
        return self.scale(x) ** self.power + self.y, names


def far(x):
    found = act(ruled(x)) + space.beta + Colour.RED.value + slotted.width + far.bias
    return found + other.jitted(x) + cached(1) + settings.alpha + schedule(1), jax.random.normal(key), objects


far.bias = 4


pieces = {
    "function": helper,
    "decorated": decorated,
    "object": Loss(1),
    "method": Loss(1).scale,
    "class": Loss,
    "jitted": jax.jit(helper),
    "lambda": lambda x: x + weight,
    "far": far,
}
"""
# What is replaced by what, and which of the pieces do something else then.
CHANGES = {
    "nothing": ("", "", set()),
    "a comment": ("def helper(x):", "def helper(x):  # a comment", set()),
    "a global": ("weight = 2.0", "weight = 3.0", {"function", "decorated", "jitted", "lambda"}),
    "a decorator": ("return f(*args)", "return -f(*args)", {"decorated"}),
    "a base": ("return x * 2", "return x * 3", {"object", "method", "class"}),
    "an attribute": ("power = 1", "power = 2", {"object", "method", "class"}),
    "a state": ('"object": Loss(1)', '"object": Loss(7)', {"object"}),
    "a set": ('names = {"b", "a"}', 'names = {"b", "c"}', {"object", "method", "class"}),
    "a key": ("jax.random.key(3)", "jax.random.key(4)", {"far"}),
    "settings": ("Settings(0.5)", "Settings(0.6)", {"far"}),
    "a schedule": ("linear_schedule(0.0, 1.0, 10)", "linear_schedule(0.0, 1.0, 11)", {"far"}),
    "objects": ('[1, "a", None]', '[1, "b", None]', {"far"}),
    "a jitted function elsewhere": ("return x + offset", "return x - offset", {"far"}),
    "a cached function elsewhere": ("return n + 1", "return n + 2", {"far"}),
    "a number elsewhere": ("offset = 1.0", "offset = 2.0", {"far"}),
    "a library's function": ("act = jnp.tanh", "act = jnp.sin", {"far"}),
    "a library's object": ("SimpleNamespace(beta=1.0)", "SimpleNamespace(beta=2.0)", {"far"}),
    "an enumeration": ("RED = 1", "RED = 2", {"far"}),
    "a slot": ("self.width = 3", "self.width = 4", {"far"}),
    "a rule of a gradient": ("(g * 1.0,)", "(g * -1.0,)", {"far"}),
    "an attribute of a function": ("far.bias = 4", "far.bias = 5", {"far"}),
    "a tuple of a class": ("widths = (8, 16)", "widths = (8, 17)", {"object", "method", "class"}),
}
HASHES = """
import importlib, json, sys
from llm_jax.runs.code import code_hash
found = {}
for folder in sys.argv[1:]:
    sys.path.insert(0, folder)
    for name in ("code_of_a_user", "other_code_of_a_user"):
        sys.modules.pop(name, None)
    importlib.invalidate_caches()
    found[folder] = {name: code_hash(piece) for name, piece in importlib.import_module("code_of_a_user").pieces.items()}
    sys.path.remove(folder)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def hashes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """The hashes of the pieces: unchanged, in a process that orders sets otherwise, and after each change."""
    place, folders = tmp_path_factory.mktemp("code"), []
    for number, (old, new, _) in enumerate(CHANGES.values()):
        assert not old or (SOURCE + OTHER).count(old) == 1
        folders.append(str(place / str(number)))
        (place / str(number)).mkdir()
        for name, text in (("code_of_a_user.py", SOURCE), ("other_code_of_a_user.py", OTHER)):
            (place / str(number) / name).write_text(text.replace(old, new) if old else text)
    found = []
    for seed, wanted in enumerate((folders[:1], folders)):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(seed)}
        command = [sys.executable, "-c", HASHES, *wanted]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found += json.loads(done.stdout).values()
    return found


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_what_code_does_changes_its_hash_and_no_other(change: str, hashes: list[dict[str, str]]):
    before, after = hashes[0], hashes[1 + list(CHANGES).index(change)]
    assert {name for name in before if before[name] != after[name]} == CHANGES[change][2]


def test_the_hash_is_of_the_code_that_runs_not_of_a_file_edited_since(tmp_path: Path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "edited_code.py"
    file.write_text("def f(x):\n    return x + 1\n")
    module = importlib.import_module("edited_code")
    first = code_hash(module.f)
    file.write_text("def f(x):\n    return x + 200\n")
    assert code_hash(module.f) not in (first, code_hash(importlib.reload(module).f))
    assert "200" in "".join(_spelled(module.f, {}))
    sys.modules.pop("edited_code")


def test_what_an_object_has_computed_of_itself_is_not_in_its_hash():
    class Teacher:
        def __init__(self, scale: int) -> None:
            self.scale = scale

        @functools.cached_property
        def table(self) -> list[int]:
            return [self.scale] * 3

        def __call__(self, model, params, batch, key): ...

    teacher = Teacher(2)
    before = code_hash(teacher)
    assert teacher.table == [2, 2, 2]
    assert code_hash(teacher) == before != code_hash(Teacher(3))


def test_code_is_compared_before_it_is_called():
    called = []

    def make() -> optax.GradientTransformation:
        called.append(1)
        return optax.sgd(0.5)

    module = types.ModuleType("calling_code")
    module.make = make
    sys.modules["calling_code"] = module
    record = {"optimizer": {"path": "calling_code:make", "sha256": "0"}}
    with pytest.raises(ValueError, match="optimizer=calling_code:make does not do what it did"):
        found_again(record, Custom(), MODEL, "runs/a")
    assert not called
    sys.modules.pop("calling_code")


def test_a_method_of_an_object_has_no_path_to_be_imported_by():
    class Scaled:
        def loss(self, model, params, batch, key): ...

    assert import_path(Scaled().loss) is None


def test_two_functions_in_one_line_are_distinguished():
    first, second = (lambda x: x + 1), (lambda x: x + 2)
    assert code_hash(first) != code_hash(second)
