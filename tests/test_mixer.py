"""A layer of a user's own trains, decodes and resumes as ours do, and is refused where it would be wrong."""

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grid import TINY
from tiny_run import console, generate

import llm_jax as lj
from llm_jax.compat import compare, weights
from llm_jax.compat.huggingface import choose
from llm_jax.data.tokenizer import ByteTokenizer
from llm_jax.infer.decode import Request, decode, prefill, prepare
from llm_jax.model.count import active_parameters, flops_per_token, parameter_counts
from llm_jax.model.mixer import check_decoding, check_mixer
from llm_jax.model.shapes import shapes
from llm_jax.ops.sampling import filters
from llm_jax.paths import first_match
from llm_jax.plan import describe
from llm_jax.plan.liveness import by_module
from llm_jax.runs import folder as run_folder
from llm_jax.runs.diagnose import BACKWARD
from llm_jax.sharding import abstract_mesh, letters_of, shardings
from llm_jax.train.mesh import check_mesh
from llm_jax.train.optimizer import make_optimizer
from llm_jax.train.step import rows_independent
from llm_jax.tree import leaves

AVERAGE = "averaging:Average"


@pytest.fixture(scope="module")
def model() -> lj.ModelConfig:
    """Three layers of two kinds of memory, of which one is left over after the scan."""
    layers = (AVERAGE, "global")
    return lj.ModelConfig(vocab_size=264, d_model=16, n_layers=3, n_heads=2, max_seq_len=32, d_ff=16, layers=layers)


def test_an_own_layer_decodes_what_the_full_forward_gives(model: lj.ModelConfig):
    coder, network = ByteTokenizer(), lj.Transformer(model)
    params = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    forward = jax.jit(lambda tokens: lj.forward(network, params, tokens).logits)
    prompts = ["ab", "a longer one"]
    found = generate(model, params, coder, prompts, sampling=lj.Sampling(temperature=0), max_tokens=5)
    for prompt, text in zip(prompts, found, strict=True):
        ids = [coder.begin_of_text, *coder.encode(prompt).tolist()]
        for _ in range(5):
            logits = forward(jnp.array([ids + [0] * (20 - len(ids))]))
            ids.append(int(logits[0, len(ids) - 1, : coder.vocab_size].argmax()))
        assert coder.decode(ids[1:]) == prompt + text


def test_parameters_of_an_own_layer_are_counted_and_replicated(model: lj.ModelConfig):
    assert parameter_counts(model)["attention"] == 2 * 16 * 16 + 4 * 16 * 16
    assert letters_of("layers/0/mixer/w_out", (1, 16, 16)) == "N__"
    assert letters_of("opt_state/0/mu/layers_2/mixer/w_out", (16, 16)) == "__"


class Named(lj.Mixer):
    """Calls its parameters what ours are called, or by no name of ours."""

    @nn.compact
    def __call__(self, x, context, state):
        D = x.shape[-1]
        for name in ("attention", "experts"):
            x = nn.Dense(D, name=name)(x)
        w = self.param("w_scale", nn.initializers.ones, (D,)) * self.param("temperature", nn.initializers.ones, ())
        return Named.Inner(name="feedforward")(x) * w[None, None], state

    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("w_up", nn.initializers.zeros, (x.shape[-1], x.shape[-1]))


def test_the_flops_of_an_own_layer_are_those_of_its_matrices_by_any_name(model: lj.ModelConfig):
    both = [dataclasses.replace(model, layers=("test_mixer:Named",), n_layers=n) for n in (1, 2)]
    first, second = (flops_per_token(each, 8) for each in both)
    assert second - first == 6 * (3 * 16 * 16 + 3 * 16 * 16)  # its own, and those of the feed-forward
    experts = lj.Experts(number=4, d_ff=8)
    moe = dataclasses.replace(model, layers=("test_mixer:Named+moe",), experts=experts, n_layers=1)
    unused = 3 * (4 - 2) * 16 * 8
    assert active_parameters(moe) == sum(parameter_counts(moe).values()) - unused


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_an_optimizer_takes_an_own_layer_with_parameters_of_any_name(model: lj.ModelConfig, name: Any):
    params = shapes(dataclasses.replace(model, layers=("test_mixer:Named", "global")))
    optimizer = make_optimizer(lj.OptimizerConfig(name=name))
    state = jax.eval_shape(optimizer.init, params)
    jax.eval_shape(optimizer.update, params, state, params)
    shardings(state, abstract_mesh({"pipeline": 1, "data": 2, "fsdp": 2, "expert": 1, "context": 1, "tensor": 1}))


def test_a_gradient_of_an_own_layer_has_its_position_in_the_backward_pass(model: lj.ModelConfig):
    paths = leaves(shapes(dataclasses.replace(model, layers=("test_mixer:Named",))))
    mixed = {first_match(BACKWARD, path) for path in paths if "/mixer/" in path}
    assert mixed == {first_match(BACKWARD, "layers/attention/w_q")}
    assert by_module({"jit(step)/layers/mixer/dot_general": 8}) == {"mixer": 8}


def test_an_own_layer_has_no_twin_and_is_no_model_of_transformers(config, model: lj.ModelConfig):
    model = dataclasses.replace(model, layers=(AVERAGE,), n_layers=1)
    with pytest.raises(ValueError, match=r"model.layers: averaging:Average has no twin in PyTorch; use kinds of"):
        compare.check_comparable(dataclasses.replace(config, model=model, steps=30), 20)
    with pytest.raises(ValueError, match=r"no family can express this model; .* lacks model.layers=.'averaging:Av"):
        choose(model, weights.shapes_of(shapes(model)), None)


def test_what_is_shown_of_an_own_layer_tells_of_no_heads(config, model: lj.ModelConfig):
    config = dataclasses.replace(config, model=dataclasses.replace(model, residual="sandwich"))
    shown = {a.name: a.meaning for a in describe.describe(config).activations if a.kind == AVERAGE}
    assert shown["attn_out"] == "what Average makes of the tokens so far, normed"
    assert shown["resid_mid"] == "the stream plus what Average adds to it"
    assert not any(word in meaning for meaning in shown.values() for word in ("head", "attention", "quer"))


def test_an_own_layer_is_refused_on_a_mesh_axis_that_it_does_not_declare(config, model: lj.ModelConfig):
    config = dataclasses.replace(config, model=model)
    sizes = {"pipeline": 1, "data": 2, "fsdp": 2, "expert": 1, "context": 1, "tensor": 1}
    check_mesh(config, abstract_mesh(sizes))
    with pytest.raises(ValueError, match=r"mesh.tensor=2, but layers of .* data, fsdp alone"):
        check_mesh(config, abstract_mesh(sizes | {"tensor": 2}))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("nowhere:Gone", "nowhere:Gone can't be imported here"),
        ("averaging:lj", "averaging:lj is no subclass of llm_jax.Mixer"),
        ("averaging:Average+more", r"'averaging:Average\+more' is no .* experts is averaging:Average\+moe$"),
        ("averaging:Average+", r"'averaging:Average\+' is no kind of layer"),
        ("global+", r"'global\+' is no kind of layer"),
    ],
    ids=["gone", "other", "feedforward", "plus", "plus-global"],
)
def test_a_layer_that_is_none_is_refused_when_the_config_is_made(model, layer: str, message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(model, layers=(layer,))


def test_a_mixer_without_a_state_trains_and_says_why_it_can_not_generate(config, tmp_path: Path):
    model = dataclasses.replace(config.model, n_layers=1, layers=("averaging:Forgetful",), dropout=0.0)
    screen = console()
    run = lj.fit(dataclasses.replace(config, model=model, steps=3, prompts=("a",)), tmp_path / "run", console=screen)
    assert np.isfinite(run.metrics["loss"]).all()
    assert "no samples: Forgetful has no init_state(config, rows, size)" in screen.file.getvalue()
    record = run_folder.load_code(run.folder)
    assert list(record) == ["averaging:Forgetful"]

    code = (run.folder / "code.json").read_text()
    (run.folder / "code.json").write_text(code.replace(record["averaging:Forgetful"]["sha256"] or "", "0" * 64))
    with pytest.raises(
        ValueError, match=r"averaging:Forgetful does not do what it did when .* was trained; restore it"
    ):
        lj.resume(run.folder, steps=4, console=screen)


class Future(lj.Mixer):
    @nn.compact
    def __call__(self, x, context, state):
        return jnp.flip(x, 1), state


class Leaking(lj.Mixer):
    @nn.compact
    def __call__(self, x, context, state):
        return jnp.cumsum(x, 1), state


class Convolving(lj.Mixer):
    @nn.compact
    def __call__(self, x, context, state):
        w = self.param("w", nn.initializers.zeros, (3,))
        padded = jnp.pad(x, ((0, 0), (2, 0), (0, 0)))
        return x + sum(w[i] * padded[:, i : i + x.shape[1]] for i in range(3)), state


class Peeking(lj.Mixer):
    """Reads the token after, unless that is the last of the row; and what it adds to all features alike is hidden."""

    @nn.compact
    def __call__(self, x, context, state):
        centred = x - x.mean(-1, keepdims=True)
        after = jnp.concatenate([centred[:, 1:-1], jnp.zeros_like(x[:, :2])], axis=1)
        return centred + 0.05 * after, state


class Batched(lj.Mixer):
    @nn.compact
    def __call__(self, x, context, state):
        return x - x.mean(0, keepdims=True), state


class Dividing(lj.Mixer):
    @nn.compact
    def __call__(self, x, context, state):
        return x / context.positions[..., None].astype(x.dtype), state


class Once(lj.Mixer):
    """Leaves out what is before the second document, and from the third on reads the second."""

    @nn.compact
    def __call__(self, x, context, state):
        sums, later = jnp.cumsum(x, 1), context.mask.segments > 1
        return sums - jnp.where(later[..., None], sums[jnp.arange(len(x)), later.argmax(1) - 1][:, None], 0), state


class Subtracting(lj.Mixer):
    """Reads its own document alone, but for rounding: sums over the row, less those at the end of the one before."""

    @nn.compact
    def __call__(self, x, context, state):
        sums, before = 100 * jnp.cumsum(x, 1), jnp.arange(x.shape[1])[None] - context.positions - 1
        return sums - jnp.where(before[..., None] < 0, 0, jnp.take_along_axis(sums, before[..., None], 1)), state


class Narrow(lj.Mixer):
    @nn.compact
    def __call__(self, x, context, state):
        return x[..., :1], state


class Stateless(lj.Mixer):
    @nn.compact
    def __call__(self, x, context, state):
        return x


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Future", "lets a token read one after it"),
        ("Leaking", "lets a token read another document of its row"),
        ("Convolving", "lets a token read another document of its row"),
        ("Once", "lets a token read another document of its row"),
        ("Peeking", "lets a token read one after it"),
        ("Batched", "lets a token read another row of its batch"),
        ("Dividing", "returned a y that is not finite"),
        ("Narrow", r"returned y of shape \(2, 16, 1\); return that of x, \(2, 16, 16\)"),
        ("Stateless", r"returned \w+; return \(y, state\)"),
    ],
)
def test_a_mixer_that_reads_what_it_may_not_is_refused_before_training(model, name: str, message: str):
    with pytest.raises(ValueError, match=f"test_mixer:{name} {message}"):
        check_mixer(model, f"test_mixer:{name}", segmented=True)


def test_a_mixer_may_read_all_before_it_where_rows_have_no_documents(model):
    check_mixer(model, "test_mixer:Leaking", segmented=False)
    check_mixer(model, "test_mixer:Convolving", segmented=False)


def test_a_mixer_may_read_what_its_document_has_had_so_far(model):
    check_mixer(model, AVERAGE, segmented=True)
    check_mixer(model, "test_mixer:Subtracting", segmented=True)
    check_mixer(dataclasses.replace(model, max_seq_len=1), AVERAGE, segmented=True)


def test_a_sampler_meets_no_layer_that_was_traced_before_it_changed():
    request = Request([np.array([1])], jax.random.split(jax.random.key(0), 1), filters(lj.Sampling()), 2, 8)
    request.begin(TINY, prepare(TINY, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes(TINY))))
    assert prefill._cache_size()
    config = lj.replace(TINY, {"layers": ("averaging:Average",)})
    abstract = jax.eval_shape(lambda: lj.Transformer(config).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), abstract["params"])
    lj.Sampler(config, params, "byte")
    assert (prefill._cache_size(), decode._cache_size()) == (0, 0)


class Last(lj.Mixer):
    """What the token before said; its state is that of the padding, not of the prompt, or of the prompt's end."""

    padded = True

    def __call__(self, x, context, state):
        before = jnp.zeros_like(x[:, :1]) if state is None else state["last"][:, None]
        last = x.shape[1] - 1 if self.padded or context.lengths is None else context.lengths - 1
        y = jnp.concatenate([before, x[:, :-1]], axis=1)
        return y, None if state is None else {"last": x[jnp.arange(len(x)), last]}

    @classmethod
    def init_state(cls, config, rows, size):
        return {"last": jnp.zeros((rows, config.d_model))}


class LastOfPrompt(Last):
    padded = False


def test_a_mixer_that_generates_otherwise_than_it_trains_is_refused(model: lj.ModelConfig):
    with pytest.raises(ValueError, match="Last computes something else token by token than for a whole row"):
        check_decoding(model, "test_mixer:Last")
    for path in ("test_mixer:LastOfPrompt", "test_mixer:Stateless", AVERAGE, "averaging:Forgetful"):
        check_decoding(model, path)


class Wide(lj.Mixer):
    """Says its parameters' dtype, not that of x."""

    @nn.compact
    def __call__(self, x, context, state):
        return x.astype(jnp.float32) * self.param("scale", nn.initializers.ones, (x.shape[-1],))[None, None], state


class Counting(lj.Mixer):
    @nn.compact
    def __call__(self, x, context, state):
        self.variable("statistics", "seen", lambda: jnp.zeros(()))
        return x, state


class Fielded(lj.Mixer):
    width: int = dataclasses.field(kw_only=True)


class Axed(lj.Mixer):
    axes = "data"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Wide", "Wide returned float32 for an x of model.dtype=bfloat16; cast parameters to x.dtype"),
        ("Counting", "Counting keeps statistics, and a layer has parameters only"),
        ("Fielded", "Fielded is made with the config of the model alone; give its fields defaults"),
        ("Axed", "Axed has axes='data'; give a tuple of mesh axes"),
    ],
)
def test_a_mixer_that_can_not_be_a_layer_is_named(name: str, says: str, model: lj.ModelConfig):
    with pytest.raises(ValueError, match=says):
        check_mixer(dataclasses.replace(model, dtype="bfloat16"), f"test_mixer:{name}", segmented=True)


class Dropping(lj.Mixer):
    """Ones, of which half are dropped."""

    @nn.compact
    def __call__(self, x, context, state):
        return nn.Dropout(0.5, deterministic=not context.train)(jnp.ones_like(x)), state


def test_layers_of_ones_own_drop_each_its_own():
    config = lj.replace(TINY, {"layers": ("test_mixer:Dropping",), "n_layers": 4})
    network, tokens = lj.Transformer(config), jnp.zeros((1, 4), jnp.int32)
    params = jax.jit(network.init)(jax.random.key(0), tokens)["params"]
    taps = lj.capture(network, params, tokens, train=True, rngs={"dropout": jax.random.key(1)})
    masks = {np.asarray(layer).tobytes() for layer in taps["attn_out"]}
    assert len(masks) == 4
    assert not rows_independent(config, {"data": 2, "fsdp": 1})
