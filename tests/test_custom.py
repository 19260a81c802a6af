"""Code in the place of what a config says: what it may be, what it computes, how a run finds it again."""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from tiny_run import tiny

import llm_jax as lj
from llm_jax.data.loader import Loader
from llm_jax.runs.data import open_data
from llm_jax.sharding import MeshConfig, make_mesh
from llm_jax.train.config import RunConfig
from llm_jax.train.custom import Custom, code_hash, found_again, import_object, import_path
from llm_jax.train.program import Program
from llm_jax.train.step import make_loss


def cross_entropy(model, params, batch, key):
    nll, _ = lj.cross_entropy(lj.forward_batch(model, params, batch, key).logits, batch.targets)
    return nll.sum(), {"nll": nll.sum(), "documents": (batch.documents >= 0).sum().astype(nll.dtype)}


cross_entropy.needs = ("documents",)


def sgd() -> optax.GradientTransformation:
    return optax.sgd(0.5)


def one_device(config: RunConfig, custom: Custom = Custom()) -> Program:
    return Program(config, make_mesh(MeshConfig(), jax.devices()[:1]), custom)


def test_a_loss_of_ones_own_has_the_gradient_of_the_one_it_repeats(config: RunConfig):
    plain, own = one_device(config), one_device(config, Custom.of(cross_entropy, sgd))
    store = open_data(config, print).split("train")
    batch = Loader(store, config.data, needs=("documents",)).batch(0)
    params = plain.init().params
    (loss, sums), gradient = own.gradient(params, batch)
    (expected, _), their_gradient = plain.gradient(params, dataclasses.replace(batch, documents=None))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert int(sums["documents"]) == (batch.targets >= 0).sum()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), gradient, their_gradient)

    state, metrics = own.train_step(own.init(), batch)  # what the optimizer returns is added as it is
    scale = 0.5 / float(metrics["tokens"])
    jax.tree.map(
        lambda new, old, g: np.testing.assert_allclose(new, old - scale * g, atol=1e-6), state.params, params, gradient
    )
    assert "learning_rate" not in metrics


def test_the_state_of_an_unknown_optimizer_is_laid_out_and_what_is_known_split(config: RunConfig):
    def twice_the_moments() -> optax.GradientTransformation:
        def init(params):
            return {"mean": params, "seen": jax.numpy.zeros(7)}

        return optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))

    program = Program.on(
        dataclasses.replace(config, mesh=MeshConfig(fsdp=4)), custom=Custom.of(None, twice_the_moments)
    )
    layout = jax.tree.map(lambda leaf: leaf.sharding.spec, program.abstract_state)
    assert layout.opt_state["mean"] == layout.params
    assert layout.opt_state["seen"] == jax.sharding.PartitionSpec()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss": "focal"}, "loss='focal' is no function"),
        ({"optimizer": 3}, "optimizer=3 is no optax transformation, nor a function"),
        ({"optimizer": lambda: 3}, "is no optax transformation, nor a function without arguments"),
    ],
    ids=["loss", "optimizer", "made"],
)
def test_what_is_no_code_is_refused(given: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Custom.of(**given)


def test_a_loss_may_ask_for_the_fields_of_a_batch_and_no_others():
    def loss(model, params, batch, key): ...

    loss.needs = ("weights",)
    with pytest.raises(ValueError, match="the loss needs 'weights', and batches can have segments, positions, doc"):
        Custom.of(loss)


@pytest.mark.parametrize(
    ("changes", "custom", "message"),
    [
        ({"mesh": MeshConfig(pipeline=2)}, Custom(loss=cross_entropy), "mesh.pipeline=2 cuts the model into stages"),
        ({"offload": "optimizer"}, Custom(optimizer=sgd()), "offload=optimizer updates a layer at a time"),
    ],
    ids=["pipeline", "offload"],
)
def test_layouts_in_which_own_code_can_not_run_are_refused(config: RunConfig, changes, custom, message):
    with pytest.raises(ValueError, match=message):
        Program.on(dataclasses.replace(config, **changes), custom=custom)


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
    record = Custom.of(cross_entropy, sgd).record()
    assert found_again(record, Custom(), "runs/a").loss is cross_entropy
    unnamed = Custom.of(None, optax.adam(1e-3)).record()
    assert unnamed["optimizer"]["path"] is None
    with pytest.raises(ValueError, match=r"can\'t be found again by itself; resume it from Python: .*optimizer=\.\.\."):
        found_again(unnamed, Custom(), "runs/a")
    assert found_again(unnamed, Custom.of(None, optax.adam(1e-3)), "runs/a").optimizer is not None
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
            "the loss of runs/a, x:f, has other code",
        ),
    ],
    ids=["new", "gone", "notebook", "changed"],
)
def test_code_that_is_not_what_a_run_was_trained_with_is_refused(record, given, message):
    with pytest.raises(ValueError, match=message):
        found_again(record, given, "runs/a")


def test_a_subclass_of_a_config_is_refused_with_the_way(config: RunConfig):
    class Wider(lj.ModelConfig):
        pass

    fields = {field.name: getattr(config.model, field.name) for field in dataclasses.fields(config.model)}
    with pytest.raises(ValueError, match=r"Wider is a subclass of ModelConfig, .* pass code of your own as fit\(loss"):
        dataclasses.replace(config, model=Wider(**fields))


def test_the_loss_of_the_config_is_what_a_run_without_own_code_has(config: RunConfig):
    assert Custom().record() == {}
    assert callable(make_loss(one_device(tiny(Path("nowhere"))).model, config.loss))
