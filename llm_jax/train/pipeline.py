"""Pipeline parallelism: the layers lie on several stages, and microbatches take turns on them by a timetable.

Every stage runs the same program. It never branches on which stage it is: a stage without work computes something
that nobody reads. A stage that went its own way would miss a collective of the other mesh axes, which the compiler
may have all devices take together, and wait forever. Idle stages would otherwise only wait for the busy ones, so this
costs no time.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from llm_jax.data.loader import Batch
from llm_jax.model.attention import Context
from llm_jax.model.transformer import Transformer
from llm_jax.ops.attention import Mask
from llm_jax.ops.loss import IGNORE
from llm_jax.train.balance import LOAD, expert_sums
from llm_jax.train.step import LossConfig, Metrics, cast, losses_of, microbatches
from llm_jax.train.timetable import Timetable

AXIS = "pipeline"


@struct.dataclass
class Turn:
    """What every stage does in one tick, in one direction; with a leading T, in all ticks."""

    microbatch: Int[Array, "*T p"]
    chunk: Int[Array, "*T p"]
    place: Int[Array, "*T p"]

    def of(self, stage: Int[Array, ""] | int) -> "Turn":
        return _at(self, stage)

    @property
    def busy(self) -> Bool[Array, ""]:
        return self.microbatch >= 0


@struct.dataclass
class Given:
    """What all ticks read.

    Attributes:
      layers: of this stage, by chunk, in the dtype of the computation.
      shared: all other parameters, in that dtype.
      embedded: this stage's share of the tokens of every microbatch, as the first layer reads them.
      parts, keys: the microbatches.
    """

    layers: PyTree
    shared: PyTree
    embedded: Float[Array, "M B l D"]
    parts: Batch
    keys: Key[Array, " M"]


@struct.dataclass
class Carry:
    """What a stage takes from tick to tick.

    Attributes:
      inputs: of pieces that have gone forward and not yet back.
      ahead: what the stage before sent, an activation.
      back: what the stage after sent, a gradient.
      layers, shared: sums of gradients, float32.
      embedded: the gradient of its namesake in `Given`.
      loss, sums: of the loss and of what is reported; of each stage its own part.
      load: tokens of each expert, by chunk and layer.
    """

    inputs: Float[Array, "held B L D"]
    ahead: Float[Array, "B L D"]
    back: Float[Array, "B L D"]
    layers: PyTree
    shared: PyTree
    embedded: Float[Array, "M B l D"]
    loss: Float[Array, ""]
    sums: dict[str, Float[Array, ""]]
    load: Float[Array, "v N E"] | None


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The loss of `step.make_loss` and its gradient, computed on the stages of the mesh of `jax.set_mesh`.

    Embedding and head belong to no stage: all take a share of the tokens, or the one that had them would make the
    others wait (Yeung et al. 2024, arXiv:2411.05288). Tokens are embedded before the pipeline starts.
    """

    model: Transformer
    loss: LossConfig
    timetable: Timetable

    def __post_init__(self) -> None:
        c, p, v = self.model.config, self.timetable.stages, self.timetable.config.chunks
        least = p * v * len(c.layers)
        if c.n_layers % least:
            below, pattern = c.n_layers // least * least, f" x {len(c.layers)} layers of model.layers"
            sizes = " or ".join(str(size) for size in (below, below + least) if size)
            raise ValueError(
                f"model.n_layers={c.n_layers} does not divide into mesh.pipeline={p} x pipeline.chunks={v}"
                f"{pattern if len(c.layers) > 1 else ''} = {least}; use model.n_layers={sizes}"
            )

    def check(self, L: int) -> None:
        """Raises `ValueError` where rows of `L` tokens don't divide over the stages."""
        p = self.timetable.stages
        if L % p:
            raise ValueError(
                f"data.seq_len={L} does not divide over mesh.pipeline={p} stages, which share the tokens of embedding "
                f"and head; use data.seq_len={-(-L // p) * p}"
            )

    def gradient(
        self, params: PyTree, batch: Batch, key: Key[Array, ""]
    ) -> tuple[tuple[Float[Array, ""], Metrics], PyTree]:
        """What `step.accumulated` gives for as many microbatches, up to the order of sums."""
        p, M, v = self.timetable.stages, self.timetable.microbatches, self.timetable.config.chunks
        parts, keys = microbatches(batch, M), jax.random.split(key, M)
        shared = {name: tree for name, tree in params.items() if name != "layers"}
        embedded, pull = jax.vjp(lambda shared: jax.lax.map(lambda x: self._embed(shared, *x), (parts, keys)), shared)

        # Piece j of the model is chunk j // p of stage j % p. With one chunk a stage has its layers already; with
        # more, each step moves the cast weights there and the gradients back.
        layers, shared = cast((params["layers"], shared), self.model.config.dtype)
        layers = jax.tree.map(lambda x: x.reshape(v, p, -1, *x.shape[1:]), layers)
        pieces, tokens, all_of_it = PartitionSpec(None, AXIS), PartitionSpec(None, None, AXIS), PartitionSpec()
        run = jax.shard_map(
            self._run,
            in_specs=(Given(pieces, all_of_it, tokens, all_of_it, all_of_it),),
            out_specs=(all_of_it, all_of_it, pieces, pieces, tokens),
            axis_names={AXIS},
            check_vma=False,
        )
        (loss, sums), d_shared, d_layers, load, d_embedded = run(Given(layers, shared, embedded, parts, keys))
        (d_embed,) = pull(d_embedded)
        if load is not None:
            sums |= {LOAD: load.reshape(-1, load.shape[-1])}
        d_layers = jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), d_layers)
        return (loss, sums), jax.tree.map(jnp.add, d_shared, d_embed) | {"layers": d_layers}

    def _run(self, given: Given) -> tuple[Any, ...]:
        """One stage through all ticks: (loss, sums) of all stages, gradients of what is shared, and its own part of
        those of the layers, of the load, and of those of the embedded tokens.
        """
        given = given.replace(layers=jax.tree.map(lambda x: x[:, 0], given.layers))
        works = (self.timetable.forward, self.timetable.backward)
        turns = [Turn(*(jnp.asarray(x) for x in (work.microbatch, work.chunk, work.place))) for work in works]
        busy = np.stack([work.busy.any(1) for work in works])
        changes = np.flatnonzero((busy[:, 1:] != busy[:, :-1]).any(0)) + 1
        carry = self._start(given)
        for start, end in itertools.pairwise([0, *changes.tolist(), busy.shape[1]]):
            tick = functools.partial(self._tick, given, forward=bool(busy[0, start]), backward=bool(busy[1, start]))
            carry, _ = jax.lax.scan(tick, carry, jax.tree.map(lambda x, a=start, b=end: x[a:b], turns))
        whole = jax.lax.psum(((carry.loss, carry.sums), carry.shared), AXIS)
        return *whole, *jax.tree.map(lambda x: x[:, None], (carry.layers, carry.load)), carry.embedded

    def _start(self, given: Given) -> Carry:
        c = self.model.config
        stream = jnp.zeros((*given.parts.tokens.shape[1:], c.d_model), c.dtype)
        layers, shared = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (given.layers, given.shared))
        names, load = ["nll"], None
        if c.experts is not None:
            names += ["balance_loss", "router_z"]
            rows = sum(layer.moe for layer in c.period) * (self._piece.config.n_layers // len(c.period))
            load = jnp.zeros((self.timetable.config.chunks, rows, c.experts.number))
        return Carry(
            inputs=jnp.zeros((self.timetable.held, *stream.shape), c.dtype),
            ahead=stream,
            back=stream,
            layers=layers,
            shared=shared,
            embedded=jnp.zeros_like(given.embedded),
            loss=jnp.zeros(()),
            sums=dict.fromkeys(names, jnp.zeros(())),
            load=load,
        )

    def _tick(self, given: Given, carry: Carry, turns: list[Turn], *, forward: bool, backward: bool) -> Any:
        if forward:
            carry = self._forward(given, carry, turns[0])
        if backward:
            carry = self._backward(given, carry, turns[1])
        return carry, None

    def _forward(self, given: Given, carry: Carry, turns: Turn) -> Carry:
        """Computes a piece, keeps what it read, sends what it gave."""
        stage, p = jax.lax.axis_index(AXIS), self.timetable.stages
        turn = turns.of(stage)
        first = _gathered(_at(given.embedded, turns.of(0).microbatch), onto=0)
        x = jnp.where((stage == 0) & (turn.chunk == 0), first, carry.ahead)
        y = self._through(given, turn, _at(given.layers, turn.chunk), x)[0][0]
        return carry.replace(
            inputs=_put(carry.inputs, turn.place, x, turn.busy),
            ahead=jax.lax.ppermute(y, AXIS, [(s, (s + 1) % p) for s in range(p)]),
        )

    def _backward(self, given: Given, carry: Carry, turns: Turn) -> Carry:
        """Computes a piece again, and its gradients from that of what it gave; sends the gradient of what it read."""
        stage, p, v = jax.lax.axis_index(AXIS), self.timetable.stages, self.timetable.config.chunks
        turn, first, last = turns.of(stage), turns.of(0), turns.of(p - 1)
        through = functools.partial(self._through, given, turn)
        (y, added), pull, (sums, load) = jax.vjp(
            through, _at(given.layers, turn.chunk), _at(carry.inputs, turn.place), has_aux=True
        )
        leaving, entering = last.busy & (last.chunk == v - 1), first.busy & (first.chunk == 0)
        (loss, nll), d_shared, dy = self._losses(given.shared, y, _at(given.parts, last.microbatch))
        d_layers, dx = pull((jnp.where(leaving & (stage == p - 1), dy, carry.back), jnp.ones_like(added)))

        def add(total: PyTree, new: PyTree, counted: Bool[Array, ""]) -> PyTree:
            """An idle stage's numbers are left out, not multiplied by 0: they need not be finite."""
            return jax.tree.map(lambda x, y: x + jnp.where(counted, y.astype(x.dtype), 0), total, new)

        def add_chunk(total: PyTree, new: PyTree) -> PyTree:
            sums = add(_at(total, turn.chunk), new, turn.busy)
            return jax.tree.map(lambda x, y: _put(x, turn.chunk, y, jnp.array(True)), total, sums)

        return carry.replace(
            layers=add_chunk(carry.layers, d_layers),
            shared=add(carry.shared, d_shared, leaving),
            embedded=_put(carry.embedded, first.microbatch, _shared(dx, source=0), entering),
            loss=add(add(carry.loss, loss, leaving), added, turn.busy),
            sums=add(carry.sums, sums | {"nll": jnp.zeros(())}, turn.busy)
            | {"nll": add(carry.sums["nll"], nll, leaving)},
            load=add_chunk(carry.load, load),
            back=jax.lax.ppermute(dx, AXIS, [(s, (s - 1) % p) for s in range(p)]),
        )

    @functools.cached_property
    def _piece(self) -> Transformer:
        """The model with the layers of one piece."""
        c = self.model.config
        pieces = self.timetable.stages * self.timetable.config.chunks
        return Transformer(dataclasses.replace(c, n_layers=c.n_layers // pieces))

    def _embed(self, shared: PyTree, part: Batch, key: Key[Array, ""]) -> Float[Array, "B L D"]:
        """Of float32 parameters, whose gradient is a sum over microbatches."""
        params = {"params": cast(shared, self.model.config.dtype)}
        return self._piece.apply(params, part.tokens, _context(part), method="embed", rngs={"dropout": key})

    def _through(
        self, given: Given, turn: Turn, layers: PyTree, x: Float[Array, "B L D"]
    ) -> tuple[tuple[Float[Array, "B L D"], Float[Array, ""]], tuple[Metrics, Array | None]]:
        """What a piece makes of `x`, and what its experts add to the loss; the sums they report, and their load."""
        c = self._piece.config
        part, key = _at((given.parts, given.keys), turn.microbatch)
        start = (turn.chunk * self.timetable.stages + jax.lax.axis_index(AXIS)) * c.n_layers
        params = {"params": given.shared | {"layers": layers}}
        x, _, use = self._piece.apply(params, x, None, _context(part), start, method="layers", rngs={"dropout": key})
        if use is None:
            return (x, jnp.zeros(())), ({}, None)
        assert c.experts is not None
        added, sums = expert_sums(c.experts, use, (part.targets != IGNORE).sum())
        load = sums.pop(LOAD)
        return (x, added), (sums, load)

    def _losses(
        self, shared: PyTree, y: Float[Array, "B L D"], part: Batch
    ) -> tuple[tuple[Array, Array], PyTree, Float[Array, "B L D"]]:
        """Loss and nll of this stage's share of what the last stage gave; their gradients by `shared` and by `y`.

        The gradient by `y` is that of all shares on the last stage, and means nothing on the others.
        """
        p, (B, L) = self.timetable.stages, part.targets.shape
        targets = _at(jnp.moveaxis(part.targets.reshape(B, p, L // p), 1, 0), jax.lax.axis_index(AXIS))
        chunk = self.loss.chunk
        config = dataclasses.replace(self.loss, chunk=None if chunk is None else math.gcd(chunk, L // p))

        def losses(shared: PyTree, x: Array) -> tuple[Array, Array]:
            hidden, logits = self._piece.apply({"params": shared}, x, chunk is None, method="head")
            loss, nll = losses_of(self.model.config, config, shared, targets, hidden, logits)
            return loss.sum(), nll.sum()

        sums, (d_shared, dx) = jax.value_and_grad(losses, (0, 1), has_aux=True)(shared, _shared(y, source=p - 1))
        return sums, d_shared, _gathered(dx, onto=p - 1)


def _shared(x: Float[Array, "B L D"], source: int) -> Float[Array, "B l D"]:
    """This stage's share of the tokens of what the stage `source` has."""
    B, L, D = x.shape
    p = jax.lax.axis_size(AXIS)
    return jax.lax.all_to_all(jnp.moveaxis(x.reshape(B, p, L // p, D), 1, 0), AXIS, 0, 0)[source]


def _gathered(x: Float[Array, "B l D"], onto: int) -> Float[Array, "B L D"]:
    """The shares of all stages on the stage `onto`; on the others, zeros."""
    B, share, D = x.shape
    p = jax.lax.axis_size(AXIS)
    parts = jax.lax.all_to_all(jnp.zeros((p, *x.shape), x.dtype).at[onto].set(x), AXIS, 0, 0)
    return jnp.moveaxis(parts, 0, 1).reshape(B, p * share, D)


def _at(tree: PyTree, index: Int[Array, ""] | int) -> PyTree:
    """`x[index]` of every leaf, as a slice: the compiler's partitioner is short of one for gathers in here."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, jnp.maximum(index, 0), keepdims=False), tree)


def _put(x: Array, index: Int[Array, ""], new: Array, counted: Bool[Array, ""]) -> Array:
    """`x` with `new` at `index` where it counts."""
    new = jnp.where(counted, new, _at(x, index))
    return jax.lax.dynamic_update_index_in_dim(x, new, jnp.maximum(index, 0), 0)


def _context(part: Batch) -> Context:
    """As `Transformer.__call__` makes it of a batch."""
    positions = jnp.arange(part.tokens.shape[1])[None] if part.positions is None else part.positions
    return Context(positions=positions, mask=Mask(segments=part.segments, prefix=part.prefix), train=True)
