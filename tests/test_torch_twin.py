"""The PyTorch twin computes what the model computes, switch by switch: logits, gradients, and a short training.

`python tests/test_torch_twin.py` prints how far apart they are, and writes it into docs/architectures.md by family; for
the families named after it alone, where there are some.
"""

import dataclasses
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import CASES, config_json, record
from grid import FACTORS, GRID, tiny, weights
from jaxtyping import PyTree

from llm_jax.compat.families import FAMILIES
from llm_jax.compat.huggingface import family_of
from llm_jax.compat.sides import jax_step, torch_step
from llm_jax.data.loader import IGNORE, Batch, DataConfig
from llm_jax.data.task import TaskConfig
from llm_jax.model.config import AttentionConfig, ModelConfig
from llm_jax.model.stack import unstack
from llm_jax.model.transformer import Transformer, forward
from llm_jax.ops.experts import Experts
from llm_jax.ops.mask import Sparse
from llm_jax.ops.position import Rotary
from llm_jax.train.config import RunConfig
from llm_jax.train.optimizer import OptimizerConfig, make_schedule
from llm_jax.train.step import LossConfig, make_loss
from llm_jax.tree import leaves, map_with_path

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("few_programs_a_test")

from llm_jax.compat.torch_step import TorchStep, tensors  # noqa: E402
from llm_jax.compat.torch_twin import Twin, load_parameters, parameters  # noqa: E402

STEPS = 15
# How far a switch may be off: the logits as a share of the largest, each leaf's gradient as a share of its largest
# number, the loss in any of STEPS steps in nats. A run may be off by a share RUN of loss and gradient norm.
FORWARD, CURVE, RUN = 1e-5, 5e-5, 5e-5
# The delta rule, which our side solves as a triangular system; after other layers its logits may be off by MIXED.
MIXED = 5e-5
GRADIENT = {False: 1e-4, True: 5e-4}
# Of gradients less than this share of the largest of all, this share counts: that of a key's bias, which adds the same
# to all scores of a query, is 0 and rounding.
LEAST = 1e-2

torch.set_num_threads(1)  # in models as small as these, threads only wait for each other


def attending(layers: str = "global", model: dict[str, Any] | None = None, **fields: Any) -> ModelConfig:
    """Attention of a kind; with three layers there is one after the last whole period of two."""
    return tiny(n_layers=3, layers=tuple(layers.split(",")), attention=AttentionConfig(**fields), **(model or {}))


def turning(**fields: Any) -> ModelConfig:
    return tiny(head_dim=16, rotary=Rotary(**fields))


def expert(**fields: Any) -> ModelConfig:
    return tiny(layers=("global+moe",), experts=Experts(number=4, **fields))


# What the grid, in which any two options meet, leaves out.
SWITCHES = {
    "plain": tiny(),
    "head_dim": tiny(head_dim=10),
    "rotary by half": turning(fraction=0.5),
    "rotary linear": turning(scaling="linear", factor=4.0),
    "rotary ntk": turning(scaling="ntk", factor=4.0),
    "rotary yarn": turning(scaling="yarn", factor=4.0, original_len=100, fraction=0.5),
    "rotary llama3": turning(scaling="llama3", factor=4.0, original_len=100, high_turns=4.0),
    "rotary amplitude": turning(theta=100.0, amplitude=1.3),
    "rotary interleaved": turning(pairs="interleaved"),
    "rotary dynamic": turning(scaling="dynamic", factor=3.0, original_len=4),
    "rotary longrope": tiny(head_dim=8, rotary=Rotary(scaling="longrope", factor=4.0, original_len=4, **FACTORS)),
    "norm_eps": tiny(norm_eps=0.1),
    "scale": attending(scale=0.1),
    "softcap": attending(softcap=1.5, scale=0.4),
    "softcap and alibi": attending(model={"positions": "alibi"}, softcap=1.5),
    "local": attending("local", window=3),
    "local with sinks": attending("local", window=3, sinks=2),
    "local and global": attending("local,global", {"rotary": Rotary(local_theta=100.0)}, window=4),
    "strided": attending("sparse", sparse=Sparse(block=2, local=1, stride=2)),
    "fixed": attending("sparse", sparse=Sparse("fixed", block=2, stride=2)),
    "bigbird": attending("sparse,global", sparse=Sparse("bigbird", block=2, local=1, random=1)),
    "linear": attending("linear"),
    "delta": attending("delta"),
    "delta and global": attending("delta,global", {"bias": "qkv"}, convolution=2, qk_norm="head"),
    "residual_scale after norms": tiny(residual_scale=0.4, residual="sandwich"),
    "logit_scale": tiny(logit_scale=1.7),
    "logit_scale and softcap": tiny(logit_scale=1.7, logit_softcap=2.0),
    "experts": expert(),
    "experts, shared": expert(shared=2, d_ff=7, active=3),
    "experts, bias": expert(balance="bias", bias_rate=0.05),
    "experts, no balance": expert(balance="none", router_z_loss=0.1),
    "experts every other layer": attending("global,local+moe", {"experts": Experts(number=3)}, window=4),
}
# A step is a gradient and what follows from it. A curve is for the switches that have more than weights (a load that
# moves a bias), tables of their own, or rounding that grows.
CURVES = {name: SWITCHES[name] for name in ("plain", "delta", "experts, bias", "experts every other layer")} | {
    "learned": tiny(positions="learned"),
    "rmsnorm_1p": tiny(norm="rmsnorm_1p"),
    "bias everywhere": tiny(bias="all"),
    "head of its own": tiny(tied=False),
    "classes": tiny(n_classes=14),
}

RUNS: dict[str, dict[str, Any]] = {
    "accumulate": {"accumulate": 4},
    "z_loss and smoothing": {"loss": LossConfig(z_loss=0.01, label_smoothing=0.1)},
    "chunks of logits": {"loss": LossConfig(chunk=5)},
    "no clipping, linear": {"optimizer": OptimizerConfig(clip=None, schedule="linear", warmup_steps=0)},
    "hard clipping, wsd": {"optimizer": OptimizerConfig(clip=0.01, schedule="wsd", warmup_steps=3, b1=0.8, eps=1e-3)},
    "decay": {"optimizer": OptimizerConfig(weight_decay=10.0, warmup_steps=2)},
    "experts in microbatches": {"accumulate": 2, "model": expert(balance_weight=1.0, router_z_loss=0.1)},
    "biased experts in microbatches": {"accumulate": 2, "model": expert(balance="bias", bias_rate=0.1)},
}
FAST = ("local with sinks", "experts, bias")


def slow_but(fast: tuple[str, ...], names: Iterable[str]) -> list[Any]:
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def rows(seed: int = 0, vocab_size: int = 14) -> Batch:
    """Rows of a document."""
    tokens = np.random.default_rng(seed).integers(vocab_size, size=(8, 11), dtype=np.int32)
    return Batch(tokens=tokens[:, :-1], targets=tokens[:, 1:])


def filled(batch: Batch) -> Batch:
    """The same, with all said that goes without saying: what is compiled for `packed` takes it too."""
    shape, place = batch.tokens.shape, np.arange(10, dtype=np.int32)
    said = {"segments": np.ones(shape, np.int32), "positions": np.broadcast_to(place, shape)}
    return dataclasses.replace(batch, **said, prefix=np.zeros(shape, bool))


def packed(seed: int = 0, vocab_size: int = 14) -> Batch:
    """Rows of two documents and some padding; each document is seen whole up to a position in it."""
    rng, batch, place = np.random.default_rng(seed), rows(seed, vocab_size), np.arange(10)[None]
    cut, end = rng.integers(2, 8, size=(8, 1)), rng.integers(8, 11, size=(8, 1))
    position = np.where(place < cut, place, place - cut)
    return Batch(
        tokens=np.where(place < end, batch.tokens, 0),
        targets=np.where((place == cut - 1) | (place >= end - 1), IGNORE, batch.targets),
        segments=np.where(place < end, 1 + (place >= cut), 0).astype(np.int32),
        positions=position.astype(np.int32),
        prefix=(position < rng.integers(4, size=(8, 1))) & (place < end),
    )


def answerable(model: ModelConfig, batch: Batch) -> Batch:
    """The same, with targets among the classes of a model that has some."""
    classes = model.n_classes or model.vocab_size
    return dataclasses.replace(batch, targets=np.where(batch.targets < 0, IGNORE, batch.targets % classes))


def params_of(model: ModelConfig) -> PyTree:
    """Weights, biases and scales, no two alike. Scales are drawn around 1; around 0 where 1 is added to them."""
    off = np.float32(model.norm == "rmsnorm_1p")
    drawn = jax.tree.map(np.asarray, weights(model))
    return map_with_path(lambda path, leaf: leaf - off * path.endswith("norm/scale"), drawn)


def distance(theirs: Any, ours: Any, least: float = 1e-6) -> float:
    """The largest difference, as a share of our largest number, or of `least`."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return float(np.abs(theirs - ours).max() / max(np.abs(ours).max(), least))


def run_of(model: ModelConfig, learning_rate: float = 1e-2, eps: float = 1e-8, **changes: Any) -> RunConfig:
    """A short run that learns fast."""
    classes = tuple("abcdefghijklmnopqrstuvwxyz"[: model.n_classes or 0])
    task = TaskConfig("classify", answers=classes) if classes else None
    data = DataConfig(seq_len=10, batch_size=8, packing="documents" if task else "windows", task=task)
    optimizer = OptimizerConfig(learning_rate=learning_rate, eps=eps, warmup_steps=2)
    fields = {"model": model, "optimizer": optimizer, "data": data, "steps": STEPS, "prompts": ()}
    return RunConfig(**fields | changes)


def gaps(model: ModelConfig) -> tuple[float, dict[str, float]]:
    """How far the twin's logits are, and the gradient of every leaf, on plain rows or on packed ones."""
    config, params = run_of(model), params_of(model)

    @jax.jit
    def ours(params: PyTree, batch: Batch) -> tuple[jax.Array, PyTree]:
        inputs = {name: getattr(batch, name) for name in ("segments", "positions", "prefix")}
        logits = forward(Transformer(model), params, batch.tokens, **inputs).logits
        loss = lambda params: make_loss(Transformer(model), config.loss)(params, batch, jax.random.key(0))[0]  # noqa: E731
        return logits, unstack(model, jax.grad(loss)(params))

    logit_gap, leaf_gaps = 0.0, {}
    plain, mixed = (answerable(model, make(vocab_size=model.vocab_size)) for make in (rows, packed))
    for batch, given in ((filled(plain), tensors(plain)), (mixed, tensors(mixed))):
        logits, gradient = ours(params, jax.tree.map(jnp.asarray, batch))
        step = TorchStep(config, params, [])
        step.loss(**given)[0].backward()
        del given["targets"]
        logit_gap = max(logit_gap, distance(step.twin(**given).logits.detach(), logits))
        least = LEAST * max(np.abs(leaf).max() for leaf in map(np.asarray, jax.tree.leaves(gradient)))
        for path, parameter in parameters(step.twin).items():
            theirs = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            leaf_gaps[path] = max(leaf_gaps.get(path, 0.0), distance(theirs, leaves(gradient)[path], least))
    return logit_gap, leaf_gaps


def curves(config: RunConfig) -> tuple[np.ndarray, np.ndarray]:
    """Loss and gradient norm of every step: ours, theirs."""
    rates = np.asarray(make_schedule(config.optimizer, config.steps)(jnp.arange(config.steps))).tolist()
    batches = [packed(seed, config.model.vocab_size) for seed in range(config.steps)]
    steps = [make(config, params_of(config.model), rates) for make in (jax_step, torch_step)]
    ours, theirs = (np.array([[float(x) for x in step(batch)] for batch in batches]) for step in steps)
    return ours, theirs


def check(model: ModelConfig) -> None:
    logits, gradients = gaps(model)
    assert logits < (MIXED if has_delta(model) else FORWARD)
    bound = GRADIENT[has_delta(model)]
    assert {path: gap for path, gap in gradients.items() if gap > bound} == {}


def has_delta(model: ModelConfig) -> bool:
    return any(layer.mixer == "delta" for layer in model.period)


def test_switches_differ_from_the_plain_model():
    assert len({repr(config) for config in SWITCHES.values()}) == len(SWITCHES)


@pytest.mark.parametrize("switch", slow_but(FAST, SWITCHES))
def test_a_switch_gives_the_same_logits_and_gradients(switch: str):
    check(SWITCHES[switch])


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(GRID)))
def test_any_two_options_go_together(number: int):
    attention = dataclasses.replace(GRID[number].attention, dropout=0.0)
    model = dataclasses.replace(GRID[number], dtype="float32", dropout=0.0, attention=attention)
    if has_delta(model):  # a read of nearly 0 is normed: an eps of 1 keeps rounding from growing in its gradients
        model = dataclasses.replace(model, norm_eps=1.0)
    if model.rotary.scaling in ("dynamic", "longrope"):  # a run with classes packs documents, which these refuse
        model = dataclasses.replace(model, n_classes=None)
    check(model)


@pytest.mark.parametrize("switch", slow_but(("plain",), CURVES))
def test_a_switch_gives_the_same_curve(switch: str):
    model = CURVES[switch]
    if "delta" in switch:  # as above: tenfold a step
        model = dataclasses.replace(model, norm_eps=1.0)
    ours, theirs = curves(run_of(model))
    assert ours[-1, 0] < ours[0, 0] - 0.2, "it does not learn"
    assert np.abs(ours - theirs)[:, 0].max() < CURVE


@pytest.mark.slow
@pytest.mark.parametrize("way", RUNS)
def test_a_way_to_train_gives_the_same_curve(way: str):
    ours, theirs = curves(run_of(**{"model": tiny(), **RUNS[way]}))
    np.testing.assert_allclose(theirs, ours, rtol=RUN)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_gives_the_same_logits_gradients_and_curve(family: str):
    assert all(gap < bound for gap, bound in zip(family_gaps(family), (FORWARD, GRADIENT[False], CURVE), strict=True))


def test_parameters_of_another_model_are_named():
    with pytest.raises(
        ValueError, match=r"layers_0/attention/b_o is None here, \(24,\) in the twin; .*; build the twin from"
    ):
        load_parameters(Twin(tiny(bias="all")), weights(tiny(bias="qkv")))


def test_a_layer_of_the_user_s_own_is_refused():
    with pytest.raises(ValueError, match=r"model.layers: averaging:Average has no twin in PyTorch; use kinds of"):
        Twin(tiny(layers=("global", "averaging:Average")))


def test_in_bfloat16_they_agree_to_its_digits():
    config = tiny(dtype="bfloat16")
    twin = Twin(config)
    load_parameters(twin, weights(config))
    params = jax.tree.map(lambda x: x.astype(config.dtype), weights(config))
    ours = forward(Transformer(config), params, jnp.asarray(rows().tokens)).logits
    assert 1e-4 < distance(twin(torch.from_numpy(rows().tokens).long()).logits.detach(), ours) < 0.05


def test_the_code_on_the_page_runs():
    page = (Path(__file__).parents[1] / "docs" / "twin.md").read_text()
    exec("\n".join(re.findall(r"^```py\n(.*?)^```", page, re.MULTILINE | re.DOTALL)), {})


def family_gaps(family: str) -> tuple[float, float, float]:
    """The largest of all its cases, logits and gradients; and of its first case the loss along a curve."""
    models = [
        family_of(config).read(config) for case in CASES if case.split()[0] == family for config in [config_json(case)]
    ]
    models = [dataclasses.replace(c, attention=dataclasses.replace(c.attention, dropout=0.0)) for c in models]
    found = [gaps(model) for model in models]
    # Slower, and with an eps that gradients of pure rounding don't reach: docs/twin.md, "Where the curves part".
    ours, twins = curves(run_of(models[0], learning_rate=1e-3, eps=1e-4))
    logits, gradient = (max(logits for logits, _ in found), max(max(each.values()) for _, each in found))
    return logits, gradient, np.abs(ours - twins)[:, 0].max().item()


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    for switch, model in [] if sys.argv[1:] else SWITCHES.items():
        logits, gradients = gaps(model)
        print(f"{switch:32} {logits:.1e} {max(gradients.values()):.1e}", flush=True)
    for switch, model in [] if sys.argv[1:] else CURVES.items():
        ours, theirs = curves(run_of(model))
        print(f"{switch:32} curve {np.abs(ours - theirs)[:, 0].max():.1e}", flush=True)
    for name in sys.argv[1:] or FAMILIES:
        logits, gradient, loss = family_gaps(name)
        print(f"{name:32} {logits:.1e} {gradient:.1e} {loss:.1e}", flush=True)
        record(name, twin=f"{logits:.1e}, curve {loss:.1e}")
