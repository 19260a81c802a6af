"""What the compiled train step sends, on eight simulated devices, is what its strategy has to send, to the byte.

A stray collective, or one more than needed, fails. XLA's compiler for CPU sums whole gradients where a TPU would leave
each device its part, an all-reduce in place of a reduce-scatter, and joins small ones: the bytes are stated as it does.
"""

import dataclasses
import functools
import importlib.util
import math
from collections.abc import Callable

import jax
import pytest

from llm_jax import runtime, tree
from llm_jax.config import override
from llm_jax.data.loader import DataConfig
from llm_jax.model.config import ModelConfig
from llm_jax.ops.exchange import ROOM
from llm_jax.ops.experts import Experts
from llm_jax.plan import estimate, hlo
from llm_jax.plan.topology import parse_topology
from llm_jax.sharding import MeshConfig
from llm_jax.train.config import RunConfig
from llm_jax.train.optimizer import OptimizerConfig
from llm_jax.train.program import Program
from llm_jax.train.step import LossConfig

CONFIG = RunConfig(
    model=ModelConfig(
        vocab_size=256,
        d_model=32,
        n_layers=4,
        n_heads=4,
        n_kv_heads=2,
        d_ff=48,
        max_seq_len=64,
        tied=False,
        remat="full",
    ),
    data=DataConfig(uri="shards", tokenizer="byte", packing="windows", end_of_text=False, seq_len=64, batch_size=16),
    loss=LossConfig(chunk=16),
    optimizer=OptimizerConfig(warmup_steps=2),
    prompts=(),
)
B, L, D, N, V = 16, 64, 32, 4, 256
M = 4  # microbatches of a pipeline
FLOAT, ID = 4, 4  # bytes of a number, and of a token
SCALARS = 512  # bytes: loss, counts and norms are sums of single numbers, and so is what tells of a stray one

# Of each kind of collective along some axes: bytes that a device sends, and times a step; None: as it is joined.
Budget = dict[tuple[str, str], tuple[float, int | None]]


MIXTURE_EXPERTS = Experts(number=4, balance="none")
MIXTURE = dataclasses.replace(
    CONFIG, model=dataclasses.replace(CONFIG.model, layers=("global+moe",), experts=MIXTURE_EXPERTS)
)


def laid(accumulate: int = 1, **mesh: int) -> RunConfig:
    """The config whose step is counted on such a mesh."""
    accumulate, config = M if "pipeline" in mesh else accumulate, MIXTURE if "expert" in mesh else CONFIG
    return dataclasses.replace(config, mesh=MeshConfig(**{"data": 1} | mesh), accumulate=accumulate)


def sent(**mesh: int) -> dict[tuple[str, str], tuple[int, float]]:
    """What the compiled step sends: times, and bytes of a device."""
    config = laid(**mesh)
    program = Program.on(config, jax.devices()[: math.prod(dataclasses.astuple(config.mesh))])
    module = hlo.parse(program.lowered().compile().as_text())
    return hlo.totals(hlo.collectives(module, program.mesh.shape))


@functools.cache
def numbers(config: RunConfig = CONFIG) -> dict[str, int]:
    """How many numbers each parameter has."""
    state = Program.on_one_device(config).abstract_state
    return {path: math.prod(leaf.shape) for path, leaf in tree.leaves(state.params).items()}


def blocks() -> tuple[int, int]:
    """Numbers in the matrices of all blocks, and how many matrices a block has."""
    matrices = [n for path, n in numbers().items() if path.startswith("layers/") and "/w_" in path]
    return sum(matrices), len(matrices)


def data_budget(data: int, accumulate: int = 1) -> Budget:
    """Each device has all weights, and sums its gradients with those of the others: once, however many microbatches."""
    return {("all-reduce", "data"): (2 * (data - 1) / data * sum(numbers().values()) * FLOAT, None)}


def fsdp_budget(fsdp: int, data: int = 1, accumulate: int = 1) -> Budget:
    """Matrices of blocks are gathered forward and again backward, the head once for all chunks of the loss.

    Norms are gathered once more, where they are computed again. Gradients of blocks are summed; the head's leaves each
    device its part. A device looks up its columns of the embedding for the tokens of all, which an all-to-all exchanges
    for all columns of its own, and their gradients back.
    With `data` each device has a part of the state, and sums the gradients of that part alone with its replicas. All of
    it is sent in each microbatch, but for the norm after all blocks.
    """
    part, (inside, matrices) = (fsdp - 1) / fsdp, blocks()
    norms, last = 3 * 2 * N, 2  # of blocks; after them
    ids, tokens = B // data * L * ID, B // (data * fsdp) * L * D * FLOAT
    budget: Budget = {
        ("all-gather", "fsdp"): (
            part * ((accumulate * (2 * inside + V * D + norms * D) + last * D) * FLOAT + ids),
            accumulate * (2 * matrices * N + 1 + norms + 1) + last,
        ),
        ("all-reduce", "fsdp"): (accumulate * 2 * part * (inside + (2 * N + 1) * D) * FLOAT, None),
        ("reduce-scatter", "fsdp"): (accumulate * part * V * D * FLOAT, accumulate),
        ("all-to-all", "fsdp"): (2 * part * tokens, 2 * accumulate),
    }
    if data > 1:
        budget[("all-reduce", "data")] = (
            accumulate * whole(data, (inside + 2 * V * D + (2 * N + 1) * D) // fsdp),
            None,
        )
    return budget


def whole(devices: int, size: int) -> float:
    """The sum of an array over devices, all of it to all of them."""
    return 2 * (devices - 1) / devices * size * FLOAT


def tensor_budget(tensor: int) -> Budget:
    """A block splits its heads and its features, and between sublayers the stream by its tokens.

    Each sublayer gathers the tokens, again where it is computed again, and the gradient of what it gave; so does the
    head, chunk by chunk, and backward the embedding. Sums are those of attention, which is computed twice, and of the
    feed-forward; backward at the inputs of queries, keys, values, of the gated feed-forward's two, and of the head. The
    embedded tokens leave each device its own. Of logits, split by V, a chunk needs the maximum and two sums, and the
    maximum and a sum when it is computed again. Each device has the norms' gradient of its own tokens.
    """
    stream, row, norms = whole(tensor, B * L * D), whole(tensor, B * L), whole(tensor, 2 * N * D)
    gathers, sums, chunks = 2 * 3, 2 + 1 + 3 + 2, 2 * (L // CONFIG.loss.chunk)
    return {
        ("all-gather", "tensor"): ((N * gathers + 2 + 1) * stream / 2, N * gathers + chunks + 1),
        ("all-reduce", "tensor"): ((N * sums + 1) * stream + 5 * row + norms, None),
        ("reduce-scatter", "tensor"): (stream / 2, 1),
    }


def context_budget(context: int) -> Budget:
    """Keys and values go around forward, and again backward, with their gradients, which then go home.

    Parameters are whole on every device, and so is their gradient, summed once.
    """
    message = 2 * B * L // context * CONFIG.model.K * CONFIG.model.H * FLOAT
    times = N * (2 * (context - 1) + context)
    return {
        ("collective-permute", "context"): (times * message, times),
        ("all-reduce", "context"): (whole(context, sum(numbers().values())), None),
    }


def expert_budget(expert: int) -> Budget:
    """A round takes tokens to their experts and back, forward, again where it is computed again, and backward.

    A device has the gradients of its own experts from all; those of all other parameters are summed. Routers are split
    like experts, and gathered.
    """
    part, kept = (expert - 1) / expert, [n for path, n in numbers(MIXTURE).items() if "/experts/w_" not in path]
    room = math.ceil(ROOM * (B // expert) * L * 2 / expert)
    times = N * 3 * 2
    router = N * D * MIXTURE_EXPERTS.number
    return {
        ("all-to-all", "expert"): (times * part * expert * room * D * FLOAT, times + N * 2),
        ("all-reduce", "expert"): (whole(expert, sum(kept) + router), None),
        ("all-gather", "expert"): (2 * part * router * FLOAT, 2 * N),
    }


def pipeline_budget(pipeline: int, context: int = 1) -> Budget:
    """A tick hands a microbatch of the stream to the next stage, one tick of backward its gradient to the stage before.

    All stages embed, and read the head, each for its share of the tokens, which an all-to-all deals out: forward of
    what the first stage begins, and of what the last one ends; backward the same. p - 1 ticks are forward alone, and as
    many backward. Gradients of embedded tokens are gathered, those of embedding, head and last norm summed.
    With `context` all of that is of a part of the tokens. Keys and values go around as without stages, and once more
    where a piece is computed again; gradients are summed in each tick.
    """
    rows, part, alone = B // M, (pipeline - 1) / pipeline, pipeline - 1
    piece, layers, ticks = rows * L // context * D * FLOAT, N // pipeline, M + alone
    budget: Budget = {
        ("collective-permute", "pipeline"): ((M + ticks) * piece, M + ticks),
        ("all-to-all", "pipeline"): ((2 * M + 2 * ticks) * part * piece, 2 * M + 2 * ticks),
        ("all-gather", "pipeline"): (M * part * piece, 1),
        ("all-reduce", "pipeline"): (whole(pipeline, 2 * V * D + D), None),
    }
    if context > 1:
        times = ticks * layers * (3 * (context - 1) + context)
        message = 2 * rows * L // context * CONFIG.model.K * CONFIG.model.H * FLOAT
        of_layers = sum(n for path, n in numbers().items() if path.startswith("layers/")) // pipeline
        budget[("collective-permute", "context")] = (times * message, times)
        budget[("all-reduce", "context")] = (whole(context, ticks * of_layers + M * (2 * V * D + D)), None)
    return budget


@pytest.mark.parametrize(
    ("mesh", "budget"),
    [
        pytest.param({"data": 8}, data_budget, marks=pytest.mark.slow),
        ({"data": 8, "accumulate": 2}, data_budget),
        ({"fsdp": 8}, fsdp_budget),
        pytest.param({"data": 2, "fsdp": 4}, fsdp_budget, marks=pytest.mark.slow),
        pytest.param({"data": 2, "fsdp": 4, "accumulate": 2}, fsdp_budget, marks=pytest.mark.slow),
        ({"tensor": 2}, tensor_budget),
        ({"context": 2}, context_budget),
        pytest.param({"context": 4}, context_budget, marks=pytest.mark.slow),
        pytest.param({"expert": 2}, expert_budget, marks=pytest.mark.slow),
        pytest.param({"pipeline": 2}, pipeline_budget, marks=pytest.mark.slow),
        pytest.param({"pipeline": 2, "context": 2}, pipeline_budget, marks=pytest.mark.slow),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else value.__name__,
)
def test_a_step_sends_what_its_strategy_has_to_and_nothing_else(mesh: dict[str, int], budget: Callable[..., Budget]):
    found, expected = sent(**mesh), budget(**mesh)
    assert {key for key, (_, amount) in found.items() if amount > SCALARS} == set(expected)
    for key, (amount, times) in expected.items():
        assert found[key][1] == pytest.approx(amount, abs=SCALARS), key
        assert times in (None, found[key][0]), key


@pytest.mark.parametrize(
    ("mesh", "budget"),
    [
        ({"data": 8, "accumulate": 2}, data_budget),
        ({"data": 2, "fsdp": 4, "accumulate": 2}, fsdp_budget),
        ({"tensor": 2}, tensor_budget),
        ({"context": 4}, context_budget),
        ({"expert": 2}, expert_budget),
        ({"pipeline": 2}, pipeline_budget),
        ({"pipeline": 2, "context": 2}, pipeline_budget),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else value.__name__,
)
def test_arithmetic_is_near_what_is_sent(mesh: dict[str, int], budget: Callable[..., Budget]):
    """Down to 0.4 of it: a CPU sends whole sums, each apart, where a TPU adds first and leaves each device its part."""
    config = laid(**mesh)
    counted = estimate.sent(config, dataclasses.asdict(config.mesh))
    for axis in mesh.keys() - {"accumulate"}:
        amount = sum(amount for (_, along), (amount, _) in budget(**mesh).items() if along == axis)
        assert 0.4 < counted[axis] / amount < 1.01, axis


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the compiler for TPU is not installed")
def test_a_sublayer_on_a_tpu_gathers_once_and_scatters_once():
    """Of the stream: 4 forward, 3 computed again, 4 backward in a block; 4 for the head, in part float32, 2 to embed.

    Left to itself its compiler does so for each product apart; that for CPU, which the budgets are of, never did.
    """
    topology = parse_topology("v5e:2x2")
    runtime.start(topology=topology)
    sizes = ["vocab_size=2048", "d_model=1024", "n_heads=8", "n_kv_heads=4", "d_ff=2048", "max_seq_len=512"]
    rows = ["data.seq_len=512", "data.batch_size=4", "loss.chunk=128", "mesh.data=1", "mesh.tensor=4"]
    config = override(CONFIG, [*(f"model.{size}" for size in sizes), "model.dtype=bfloat16", *rows])
    program = Program.on(config, topology.devices())
    module = hlo.parse(program.lowered().compile().as_text())
    amount = sum(amount for _, amount in hlo.totals(hlo.collectives(module, program.mesh.shape)).values())
    assert amount == pytest.approx((N * 11 + 6) * 3 / 4 * 4 * 512 * 1024 * 2, rel=0.01)
