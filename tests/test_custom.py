"""Code in the place of what a config says: what it may be, what it computes, how a run finds it again."""

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from tiny_run import tiny

import llm_jax as lj
from llm_jax.data.loader import Loader
from llm_jax.runs.code import record_of
from llm_jax.runs.data import open_data
from llm_jax.sharding import MeshConfig, make_mesh
from llm_jax.train.config import RunConfig
from llm_jax.train.custom import Custom
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


def test_the_state_of_an_unknown_optimizer_is_split_where_it_is_known(config: RunConfig):
    def twice_the_moments() -> optax.GradientTransformation:
        def init(params):
            return {"mean": params, "seen": jax.numpy.zeros(7)}

        return optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))

    program = Program.on(
        dataclasses.replace(config, mesh=MeshConfig(fsdp=4)), custom=Custom.of(None, twice_the_moments)
    )
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, program.abstract_state)
    assert specs.opt_state["mean"] == specs.params
    assert specs.opt_state["seen"] == jax.sharding.PartitionSpec()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss": "focal"}, "loss='focal' is not a function"),
        ({"optimizer": 3}, "optimizer=3 is not an optax transformation, nor a function"),
        ({"optimizer": lambda: 3}, "is not an optax transformation, nor a function without arguments"),
    ],
    ids=["loss", "optimizer", "made"],
)
def test_what_is_no_code_is_refused(given: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Custom.of(**given)


def test_code_of_ones_own_is_traced_as_it_is_now(config: RunConfig):
    """A loss may read a global that has changed, and an object need not be hashable."""

    @dataclasses.dataclass
    class Scaled:
        by: list[float]

        def __call__(self, model, params, batch, key):
            return cross_entropy(model, params, batch, key)

    config = dataclasses.replace(config, mesh=MeshConfig())
    assert Program.on(config) is Program.on(config)
    for custom in (Custom.of(cross_entropy), Custom.of(None, sgd), Custom.of(Scaled([1.0]))):
        assert Program.on(config, custom=custom) is not Program.on(config, custom=custom)
    own = lj.replace(config, {"model.layers": ("averaging:Average",)})
    assert Program.on(own) is not Program.on(own)


def test_a_loss_may_ask_for_the_fields_of_a_batch_and_no_others():
    def loss(model, params, batch, key): ...

    loss.needs = ("weights",)
    with pytest.raises(ValueError, match="the loss needs 'weights', and batches can have documents besides"):
        Custom.of(loss)
    loss.needs = "documents"
    assert Custom.of(loss).needs == Custom.of(functools.partial(loss)).needs == ("documents",)


@pytest.mark.parametrize(
    ("changes", "custom", "message"),
    [
        ({"mesh": MeshConfig(pipeline=2)}, Custom(loss=cross_entropy), "mesh.pipeline=2 cuts the model into stages"),
        (
            {"mesh": MeshConfig(context=2)},
            Custom(loss=cross_entropy),
            "mesh.context=2 gives a loss of your own",
        ),
        ({"offload": "optimizer"}, Custom(optimizer=sgd()), "offload=optimizer updates a layer at a time"),
    ],
    ids=["pipeline", "context", "offload"],
)
def test_layouts_in_which_own_code_can_not_run_are_refused(config: RunConfig, changes, custom, message):
    with pytest.raises(ValueError, match=message):
        Program.on(dataclasses.replace(config, **changes), custom=custom)


def test_a_subclass_of_a_config_is_refused_with_the_way(config: RunConfig):
    class Wider(lj.ModelConfig):
        pass

    fields = {field.name: getattr(config.model, field.name) for field in dataclasses.fields(config.model)}
    with pytest.raises(ValueError, match=r"Wider is a subclass of ModelConfig, .* pass code of your own as fit\(loss"):
        dataclasses.replace(config, model=Wider(**fields))


def test_the_loss_of_the_config_is_what_a_run_without_own_code_has(config: RunConfig):
    assert record_of(Custom(), config.model) == {}
    assert callable(make_loss(one_device(tiny(Path("nowhere"))).model, config.loss))


def test_a_run_that_begins_with_weights_gives_them_to_its_optimizer(config: RunConfig):
    """Some keep the parameters: averages, and those of schedule-free updates."""

    def averaging() -> optax.GradientTransformation:
        return optax.GradientTransformation(lambda params: {"average": params}, lambda g, s, p=None: (g, s))

    program = Program.on(config, custom=Custom.of(None, averaging))
    params = jax.tree.map(lambda leaf: jax.numpy.full(leaf.shape, 3.0), program.abstract_state.params)
    state = program.init_with(jax.device_put(params, jax.tree.map(lambda x: x.sharding, program.abstract_state.params)))
    jax.tree.map(np.testing.assert_array_equal, state.opt_state["average"], params)
    shardings = (jax.tree.map(lambda leaf: leaf.sharding, tree) for tree in (state, program.abstract_state))
    assert jax.tree.all(jax.tree.map(lambda a, b: a == b, *shardings))


ONES = lj.Batch(*(jax.numpy.ones((1, 8), jax.numpy.int32) for _ in range(4)))


def returning(*found: Any):
    """A loss that returns what it is told."""
    return Custom(loss=lambda model, params, batch, key: found if len(found) > 1 else found[0])


@pytest.mark.parametrize(
    ("custom", "message"),
    [
        (returning(np.float32(1)), r"returned an array; return a pair: \(sum of the loss, \{name: sum\}\)"),
        (returning(np.zeros(3), {}), r"returned shape \(3,\); return its sum over the targets that count"),
        (
            returning(np.float32(1), {"loss": np.float32(1)}),
            "returned a metric 'loss', and metrics.jsonl has one so called; rename yours",
        ),
        (returning(np.float32(1), {"hits": np.zeros(2)}), r"metric 'hits' has shape \(2,\); return a sum"),
        (returning(np.float32(1), {"hits": None}), "metric 'hits' is of type NoneType; return a sum"),
    ],
    ids=["no metrics", "unreduced", "reserved", "vector", "none"],
)
def test_a_result_of_a_loss_that_is_no_sum_is_refused_by_name(config: RunConfig, custom: Custom, message: str):
    loss = custom.loss_of(lj.Transformer(config.model))
    assert loss is not None
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(loss, {}, ONES, jax.random.key(0))


def test_counts_are_kept_as_float32_and_python_numbers_are_sums(config: RunConfig):
    loss = returning(np.float32(1), {"hits": np.int32(3), "half": 0.5}).loss_of(lj.Transformer(config.model))
    assert loss is not None
    _, sums = loss({}, ONES, jax.random.key(0))
    assert {name: (x.dtype, float(x)) for name, x in sums.items()} == {
        "hits": ("float32", 3.0),
        "half": ("float32", 0.5),
    }


def test_experts_are_not_forgotten_by_a_loss_of_ones_own(config: RunConfig):
    model = dataclasses.replace(config.model, layers=("global+moe",), experts=lj.Experts(number=4, d_ff=16))
    network = lj.Transformer(model)
    params = jax.eval_shape(network.init, jax.random.key(0), ONES.tokens)["params"]

    def whole(model, params, batch, key):
        out = lj.forward_batch(model, params, batch, key)
        added, more = lj.expert_loss(model, out, batch)
        return lj.cross_entropy(out.logits, batch.targets)[0].sum() + added, more

    def forgetful(model, params, batch, key):
        return whole(model, params, batch, key)[0], {}

    for loss, refused in ((whole, False), (forgetful, True)):
        given = Custom(loss=loss).loss_of(network)
        assert given is not None
        with pytest.raises(ValueError, match="leaves out what experts add") if refused else contextlib.nullcontext():
            jax.eval_shape(given, params, ONES, jax.random.key(0))


def test_an_optimizer_that_keeps_a_random_key_is_refused_before_it_runs(config: RunConfig):
    def noisy() -> optax.GradientTransformation:
        return optax.GradientTransformation(lambda params: {"key": jax.random.key(0)}, lambda g, s, p=None: (g, s))

    with pytest.raises(ValueError, match=r"has a random key at \['key'\], which no checkpoint can hold"):
        _ = Program.on(config, custom=Custom.of(None, noisy)).abstract_state


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 4}, {"data": 4, "tensor": 2}], ids=str)
def test_a_loss_of_ones_own_trains_on_every_mesh_as_on_one_device(config: RunConfig, sizes):
    custom, store = Custom.of(cross_entropy, sgd), open_data(config, print).split("train")
    loader = Loader(store, config.data, needs=("documents",))
    curves = []
    for program in (
        one_device(config, custom),
        Program.on(dataclasses.replace(config, mesh=MeshConfig(**sizes)), custom=custom),
    ):
        state, curve = program.init(), []
        for step in range(3):
            state, metrics = program.train_step(state, loader.batch(step))
            curve.append([float(metrics[name]) for name in ("loss", "nll", "documents", "grad_norm")])
        curves.append(curve)
    np.testing.assert_allclose(*curves, rtol=1e-5)
