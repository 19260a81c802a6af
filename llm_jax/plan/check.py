"""This machine computes correctly: the train step of a config jitted and eager, its pieces against float64 NumPy.

Compilers have faults, and those that matter are silent. Here each kind of device computes the pieces of a step twice:
compiled as one program, and operation by operation. Both are compared with NumPy in double precision, which shares no
code with JAX; a step of the config, shrunk to test size, is compared between the two. If only the compiled program is
wrong, the fault is the compiler's.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.axes import MeshConfig
from llm_jax.model.pattern import n_scanned
from llm_jax.ops.attention import attention
from llm_jax.ops.config import Scores
from llm_jax.ops.gradient import linear, lookup
from llm_jax.ops.loss import IGNORE, cross_entropy
from llm_jax.ops.mask import Mask
from llm_jax.ops.norm import layer_norm, rms_norm
from llm_jax.plan.verify import GAPS, bounds_of, outcome, shrunk
from llm_jax.runtime import JAXLIB, known_faults, open_faults
from llm_jax.sharding import make_mesh
from llm_jax.train.config import PipelineConfig, RunConfig
from llm_jax.train.program import Program

STEPS = 2
ROWS = 40_001  # this number has no useful divisor, and a known fault is past the 32,768th row
BOUND = 1e-5  # relative to the largest value, in float32; ten times that if the hardware approximates functions
# Cases that are the computation of a public report.
KNOWN = {"sums of rows": "jax#39103", "sum of a broadcast": "tensorflow#126812"}

Draw = np.random.Generator


@dataclasses.dataclass(frozen=True)
class Case:
    """A piece of a step: a function of float32 arrays, its arguments, and the exact result, by NumPy in float64.

    It is called `calls` times: some faults depend on the timing of threads.
    """

    function: Callable[..., Any]
    arguments: tuple[np.ndarray, ...]
    exact: np.ndarray
    calls: int = 3


@dataclasses.dataclass(frozen=True)
class Finding:
    """The errors of a kind of device, jitted and eager, relative to the largest value; None: not compared.

    `report` is a public report of the same fault.
    """

    device: str
    what: str
    jitted: float
    eager: float | None
    bound: float
    report: str | None = None

    @property
    def right(self) -> bool:
        """Whether both errors are within the bound; NaN is not."""
        return all(gap <= self.bound for gap in (self.jitted, self.eager) if gap is not None)


def one_of_each_kind() -> list[Any]:
    """Return the first device of every kind that JAX has here, including the host."""
    found = list(jax.local_devices())
    with contextlib.suppress(RuntimeError):  # JAX_PLATFORMS may exclude the host
        found += jax.local_devices(backend="cpu")
    return list({device.device_kind: device for device in reversed(found)}.values())[::-1]


def check(config: RunConfig) -> Iterator[Finding]:
    """Yield a finding for every case and for the train step of `config`, on one device of each kind."""
    for device in one_of_each_kind():
        with jax.default_device(device), jax.default_matmul_precision("highest"):
            for what, make in CASES.items():
                yield run_case(device, what, make(np.random.default_rng(0), config))
            yield from step(device, config)


def run_case(device: Any, what: str, case: Case) -> Finding:
    """Compute a case on `device`, jitted and eager, and compare both with the exact result."""
    given = jax.device_put(case.arguments, device)
    with jax.set_mesh(make_mesh(MeshConfig(), [device])):  # which determines the platform
        together = jax.jit(case.function)
        jitted = max(gap(together(*given), case.exact) for _ in range(case.calls))
        with jax.disable_jit():
            eager = gap(case.function(*given), case.exact)
    found = Finding(device.device_kind, what, jitted, eager, BOUND if device.platform == "cpu" else 10 * BOUND)
    return found if found.right else dataclasses.replace(found, report=KNOWN.get(what))


def gap(found: Any, exact: np.ndarray) -> float:
    """Return the largest error, relative to the largest value."""
    return float(np.abs(np.asarray(found, np.float64) - exact).max() / np.abs(exact).max())


def step(device: Any, config: RunConfig) -> Iterator[Finding]:
    """Compare loss, gradient and the first steps of `config`, shrunk, between jitted and eager."""
    program = Program.on_one_device(small(config), device)
    start = jax.device_get(program.init())
    jitted = outcome(program, start, STEPS)
    with jax.disable_jit():
        eager = outcome(program, start, STEPS)
    names = {
        "loss": "loss of the config",
        "gradient": "gradient of the config",
        "curve": f"{STEPS} steps of the config",
    }
    for name, bound in bounds_of(config).items():
        yield Finding(device.device_kind, f"{names[name]}, beside eager", GAPS[name](jitted, eager), None, bound)


def small(config: RunConfig) -> RunConfig:
    """Return `config` as `verify` shrinks it, with fewer layers: eager, every operation is a program of its own."""
    one = dataclasses.replace(shrunk(config), pipeline=PipelineConfig(), accumulate=1)
    c = one.model
    layers = min(c.n_layers, 2 * len(c.layers) + c.n_layers - n_scanned(c))
    data = dataclasses.replace(one.data, batch_size=4)
    return dataclasses.replace(one, model=dataclasses.replace(c, n_layers=layers), data=data)


def _wide(*arrays: np.ndarray) -> list[np.ndarray]:
    return [x.astype(np.float64) for x in arrays]


def _normal(draw: Draw, *shape: int) -> np.ndarray:
    return draw.standard_normal(shape, np.float32)


def sums_of_rows(draw: Draw, config: RunConfig) -> Case:
    """Return the case of jax#39103: row by row, the sum of squares of a product with a 3 x 3 matrix."""
    x, matrix = _normal(draw, ROWS, 3), _normal(draw, 3, 3)
    y, m = _wide(x, matrix)
    return Case(jax.vmap(lambda row, m: jnp.sum((m @ row) ** 2), (0, None)), (x, matrix), ((y @ m.T) ** 2).sum(1))


def sum_of_a_broadcast(draw: Draw, config: RunConfig) -> Case:
    """Return the case of tensorflow#126812: the sum of a column broadcast to [2 1024 1024]."""
    x = draw.integers(4, size=(1024, 1)).astype(np.float32)  # float32 holds their sum exactly, in any order
    exact = np.asarray(2048 * x.astype(np.float64).sum())
    return Case(lambda x: jnp.broadcast_to(x, (2, 1024, 1024)).sum(), (x,), exact, calls=200)


def sums_over_tokens(draw: Draw, config: RunConfig) -> Case:
    """Return the case of a gradient of biases: the sum of each column over all rows."""
    x = draw.random((ROWS, 33), np.float32)  # all positive: sums that cancel lose their digits
    return Case(lambda x: x.sum(0), (x,), x.astype(np.float64).sum(0))


def matrix_product(draw: Draw, config: RunConfig) -> Case:
    """Return the case of a projection: x [B L D] times w [D F]."""
    D = min(config.model.d_model, 512)
    x, w = _normal(draw, 1, 1001, D), _normal(draw, D, 257)
    y, v = _wide(x, w)
    return Case(lambda x, w: linear("BLD,DF->BLF", x, w), (x, w), y @ v)


def norm(draw: Draw, config: RunConfig) -> Case:
    """Return the case of the norm of `config`, over the axis D of x [B L D]."""
    c, D, eps = config.model, min(config.model.d_model, 512), 1e-6
    x, scale, bias = _normal(draw, 1, 5001, D) + 1, _normal(draw, D), _normal(draw, D)
    y, s, b = _wide(x, scale, bias)
    if c.norm == "layernorm":
        y = y - y.mean(-1, keepdims=True)
    unit = y / np.sqrt((y**2).mean(-1, keepdims=True) + eps)
    if c.norm == "layernorm":
        return Case(lambda x, scale, bias: layer_norm(x, scale, bias, eps), (x, scale, bias), unit * s + b)
    return Case(lambda x, scale: rms_norm(x, scale, eps), (x, scale), unit * s)


def softmax_attention(draw: Draw, config: RunConfig) -> Case:
    """Return the case of causal attention: q [B L K G H] on k, v [B S K H], with S = L."""
    L, H = min(config.data.seq_len, 1100), min(config.model.H, 64)
    q, k, v = _normal(draw, 1, L, 1, 2, H), _normal(draw, 1, L, 1, H), _normal(draw, 1, L, 1, H)
    a, b, c = _wide(q, k, v)
    scores = np.einsum("BLKGH,BSKH->BKGLS", a, b) / math.sqrt(H)
    weights = np.exp(np.where(np.tri(L, dtype=bool), scores - scores.max(-1, keepdims=True), -np.inf))
    exact = np.einsum("BKGLS,BSKH->BLKGH", weights / weights.sum(-1, keepdims=True), c)
    return Case(lambda q, k, v: attention(q, k, v, Mask(), Scores()), (q, k, v), exact)


def loss_of_tokens(draw: Draw, config: RunConfig) -> Case:
    """Return the case of cross-entropy: a loss for each token from logits [T V], some targets ignored."""
    V = min(config.model.vocab_size, 4099)
    logits, targets = 4 * _normal(draw, 1003, V), draw.integers(V, size=1003).astype(np.int32)
    targets[::7] = IGNORE
    (y,) = _wide(logits)
    y -= y.max(-1, keepdims=True)
    nll = np.log(np.exp(y).sum(-1)) - y[np.arange(len(y)), targets]
    return Case(lambda x, t: cross_entropy(x, t)[1], (logits, targets), np.where(targets == IGNORE, 0, nll))


def gradient_of_a_table(draw: Draw, config: RunConfig) -> Case:
    """Return the case of the gradient of an embedding [V D]: each token's is added to its row."""
    V, D = min(config.model.vocab_size, 1031), min(config.model.d_model, 65)
    ids, g = draw.integers(V, size=(1, ROWS)).astype(np.int32), draw.random((1, ROWS, D), np.float32)
    exact = np.zeros((V, D))
    np.add.at(exact, ids[0], g[0].astype(np.float64))
    table = np.zeros((V, D), np.float32)
    return Case(lambda ids, g, t: jax.vjp(lambda t: lookup(t, ids), t)[1](g)[0], (ids, g, table), exact)


CASES: dict[str, Callable[[Draw, RunConfig], Case]] = {
    "sums of rows": sums_of_rows,
    "sum of a broadcast": sum_of_a_broadcast,
    "sums over tokens": sums_over_tokens,
    "matrix product": matrix_product,
    "norm": norm,
    "softmax attention": softmax_attention,
    "cross-entropy": loss_of_tokens,
    "gradient of a table": gradient_of_a_table,
}


def about() -> list[str]:
    """Return a line for the versions that compute here, and for each of their known faults."""
    lines = [f"jax {jax.__version__}, jaxlib {JAXLIB}, against NumPy {np.__version__} in float64"]
    still = {fault for device in one_of_each_kind() for fault in open_faults(device)}
    for fault in known_faults():
        word = "NOT GUARDED" if fault in still else "guarded"
        lines.append(f"known fault of this jaxlib on a CPU: {fault.what} ({fault.reports}): {word}")
    return lines


HEAD = f"{'device':16} {'':36} {'jitted':>8} {'eager':>8} {'bound':>8}"


def finding_line(f: Finding) -> str:
    """Return a finding as a line of text."""
    eager = "" if f.eager is None else f"{f.eager:.0e}"
    word = "right" if f.right else "WRONG" + (f", as {f.report} says" if f.report else "")
    return f"{f.device[:16]:16} {f.what:36} {f.jitted:8.0e} {eager:>8} {f.bound:8.0e}  {word}"


def findings_to_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """Return the findings, with the versions and their known faults, for machines."""
    still = {fault for device in one_of_each_kind() for fault in open_faults(device)}
    known = [dataclasses.asdict(fault) | {"guarded": fault not in still} for fault in known_faults()]
    found = [dataclasses.asdict(finding) | {"right": finding.right} for finding in findings]
    return {"jax": jax.__version__, "jaxlib": JAXLIB, "known_faults": known, "findings": found}
