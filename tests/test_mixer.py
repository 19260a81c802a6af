"""A layer of a user's own trains, decodes and resumes as ours do, and is refused where it would be wrong."""

import dataclasses
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import console, generate

import llm_jax as lj
from llm_jax.data.tokenizer import ByteTokenizer
from llm_jax.model.count import parameter_counts
from llm_jax.model.mixer import check_mixer
from llm_jax.runs import folder as run_folder
from llm_jax.sharding import abstract_mesh, letters_of
from llm_jax.train.layout import check

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


def test_an_own_layer_is_refused_on_a_mesh_axis_that_it_does_not_declare(config, model: lj.ModelConfig):
    config = dataclasses.replace(config, model=model)
    sizes = {"pipeline": 1, "data": 2, "fsdp": 2, "expert": 1, "context": 1, "tensor": 1}
    check(config, abstract_mesh(sizes))
    with pytest.raises(ValueError, match=r"mesh.tensor=2, but layers of .* data, fsdp alone"):
        check(config, abstract_mesh(sizes | {"tensor": 2}))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("nowhere:Gone", "nowhere:Gone can't be imported here"),
        ("averaging:lj", "averaging:lj is no subclass of llm_jax.Mixer"),
        ("averaging:Average+more", "is no kind of layer"),
    ],
    ids=["gone", "other", "feedforward"],
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
        ("Narrow", r"returned y of shape \(1, 6, 1\); return that of x, \(1, 6, 16\)"),
        ("Stateless", r"returned \w+; return \(y, state\)"),
    ],
)
def test_a_mixer_that_reads_what_it_may_not_is_refused_before_training(model, name: str, message: str):
    with pytest.raises(ValueError, match=f"test_mixer:{name} {message}"):
        check_mixer(model, f"test_mixer:{name}", segmented=True)


def test_a_mixer_may_read_all_before_it_where_rows_have_no_documents(model):
    check_mixer(model, "test_mixer:Leaking", segmented=False)
    check_mixer(model, AVERAGE, segmented=True)
