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
from collections.abc import Callable
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
from llm_jax.ops.collectives import shard_map_by_letters
from llm_jax.ops.gradient import after
from llm_jax.ops.loss import IGNORE
from llm_jax.ops.mask import Mask
from llm_jax.train.balance import LOAD, expert_sums
from llm_jax.train.step import LossConfig, Metrics, Scored, cast, losses_of, microbatches, scored
from llm_jax.train.timetable import Timetable, Work

AXIS = "pipeline"
# How arrays lie on the stages: [v p ...] by piece, [M B l p ...] by token, or the same on all.
PIECES, TOKENS, WHOLE = PartitionSpec(None, AXIS), PartitionSpec(None, None, None, AXIS), PartitionSpec()


@struct.dataclass
class Turn:
    """What every stage does in one tick, in one direction; with a leading T, in all ticks."""

    microbatch: Int[Array, "*T p"]
    chunk: Int[Array, "*T p"]
    place: Int[Array, "*T p"]

    @classmethod
    def all_of(cls, work: Work) -> "Turn":
        return cls(jnp.asarray(work.microbatch), jnp.asarray(work.chunk), jnp.asarray(work.place))

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
      parts: the microbatches.
      keys: of their dropout; None turns it off.
    """

    layers: PyTree
    shared: PyTree
    embedded: Float[Array, "M B l D"]
    parts: Batch
    keys: Key[Array, " M"] | None


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
    others wait (Yeung et al. 2024, arXiv:2411.05288). A share is every p-th token, so that whatever else splits a row
    splits each share alike, and none has to move. Tokens are embedded before the pipeline starts.
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

    def gradient(
        self, params: PyTree, batch: Batch, key: Key[Array, ""]
    ) -> tuple[tuple[Float[Array, ""], Metrics], PyTree]:
        """What `step.make_gradient` gives for as many microbatches, up to the order of sums."""
        M = self.timetable.microbatches
        parts, keys = microbatches(batch, M), jax.random.split(key, M)
        shared = {name: tree for name, tree in params.items() if name != "layers"}
        embedded, pull = jax.vjp(functools.partial(self._embed, parts=parts, keys=keys), shared)
        run = self._on_stages(self._run, (WHOLE, WHOLE, PIECES, PIECES, TOKENS))
        (loss, sums), d_shared, d_layers, load, d_embedded = run(self._given(params, embedded, parts, keys))
        (d_embed,) = pull(d_embedded.reshape(embedded.shape))
        if load is not None:
            sums |= {LOAD: load.reshape(-1, load.shape[-1])}
        d_layers = jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), d_layers)
        return (loss, sums), jax.tree.map(jnp.add, d_shared, d_embed) | {"layers": d_layers}

    def score(self, params: PyTree, batch: Batch) -> Scored:
        """What `step.score` gives, with the microbatches in the pipeline: only forward, and nothing is kept."""
        parts = microbatches(batch, self.timetable.microbatches)
        shared = {name: tree for name, tree in params.items() if name != "layers"}
        given = self._given(params, self._embed(shared, parts, None), parts, None)
        found = self._on_stages(self._score, TOKENS)(given)
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(batch.targets.shape), found)

    def _on_stages(self, function: Callable[[Given], Any], out: Any) -> Callable[[Given], Any]:
        """`function` of what each stage is given; the other axes of the mesh remain the compiler's."""
        # A spec for each array, which is not what the fields are annotated as.
        specs: Any = Given(PIECES, WHOLE, TOKENS, WHOLE, WHOLE)  # pyright: ignore[reportArgumentType]

        def own(given: Given) -> Any:
            layers = jax.tree.map(lambda x: x[:, 0], given.layers)
            return function(dataclasses.replace(given, layers=layers, embedded=given.embedded[:, :, :, 0]))

        return jax.shard_map(own, in_specs=(specs,), out_specs=out, axis_names={AXIS}, check_vma=False)

    def _given(self, params: PyTree, embedded: Array, parts: Batch, keys: Array | None) -> Given:
        """What the stages read. Piece j of the model is chunk j // p of stage j % p.

        With one chunk a stage has its layers already; with more, each step moves the cast weights there, and the
        gradients back.
        """
        p, v = self.timetable.stages, self.timetable.config.chunks
        shared = cast(params, self.model.config.dtype)
        layers = jax.tree.map(lambda x: x.reshape(v, p, -1, *x.shape[1:]), shared.pop("layers"))
        M, B, L, D = embedded.shape
        return Given(layers, shared, embedded.reshape(M, B, L // p, p, D), parts, keys)

    def _score(self, given: Given) -> Scored:
        """This stage's share of the tokens of every microbatch."""
        p, v = self.timetable.stages, self.timetable.config.chunks

        def tick(carry: tuple[Array, Scored], turns: Turn) -> tuple[tuple[Array, Scored], None]:
            (ahead, found), last = carry, turns.of(p - 1)
            _, y = self._through_next(given, turns, ahead)
            share = self._scored(given.shared, _shared(y, source=p - 1), _at(given.parts, last.microbatch))
            done = last.busy & (last.chunk == v - 1)
            found = jax.tree.map(lambda x, new: _put(x, last.microbatch, new, done), found, share)
            return (_sent(y, 1), found), None

        shape = given.embedded.shape[:3]
        start = jnp.zeros_like(_gathered(given.embedded[0], onto=0))
        found = Scored(jnp.zeros(shape), jnp.zeros(shape, bool))
        (_, found), _ = jax.lax.scan(tick, (start, found), Turn.all_of(self.timetable.forward))
        return jax.tree.map(lambda x: x[..., None], found)

    def _run(self, given: Given) -> tuple[Any, ...]:
        """One stage through all ticks: (loss, sums) of all stages, gradients of what is shared, and its own part of
        those of the layers, of the load, and of those of the embedded tokens.
        """
        works = (self.timetable.forward, self.timetable.backward)
        turns = [Turn.all_of(work) for work in works]
        busy = np.stack([work.busy.any(1) for work in works])
        changes = np.flatnonzero((busy[:, 1:] != busy[:, :-1]).any(0)) + 1
        carry = self._start(given)
        for start, end in itertools.pairwise([0, *changes.tolist(), busy.shape[1]]):
            tick = functools.partial(self._tick, given, forward=bool(busy[0, start]), backward=bool(busy[1, start]))
            carry, _ = jax.lax.scan(tick, carry, jax.tree.map(lambda x, a=start, b=end: x[a:b], turns))
        whole = jax.lax.psum(((carry.loss, carry.sums), carry.shared), AXIS)
        return *whole, *jax.tree.map(lambda x: x[:, None], (carry.layers, carry.load)), carry.embedded[:, :, :, None]

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
        turn = turns.of(jax.lax.axis_index(AXIS))
        x, y = self._through_next(given, turns, carry.ahead)
        inputs = _put(carry.inputs, turn.place, x, turn.busy)
        return dataclasses.replace(carry, inputs=inputs, ahead=_sent(y, 1))

    def _through_next(self, given: Given, turns: Turn, ahead: Float[Array, "B L D"]) -> tuple[Array, Array]:
        """What the piece whose turn it is reads, embedded tokens or what is `ahead`, and what it makes of it."""
        stage = jax.lax.axis_index(AXIS)
        turn = turns.of(stage)
        first = _gathered(_at(given.embedded, turns.of(0).microbatch), onto=0)
        x = jnp.where((stage == 0) & (turn.chunk == 0), first, ahead)
        return x, self._through(given, turn, _at(given.layers, turn.chunk), x)[0][0]

    def _backward(self, given: Given, carry: Carry, turns: Turn) -> Carry:
        """Computes a piece again, and its gradients from that of what it gave; sends the gradient of what it read."""
        stage, p, v = jax.lax.axis_index(AXIS), self.timetable.stages, self.timetable.config.chunks
        turn, first, last = turns.of(stage), turns.of(0), turns.of(p - 1)
        through = functools.partial(self._through, given, turn)
        read = after(_at(carry.inputs, turn.place), carry.ahead)  # which the tick's forward pass has sent
        (y, added), pull, (sums, load) = jax.vjp(through, _at(given.layers, turn.chunk), read, has_aux=True)
        leaving, entering = last.busy & (last.chunk == v - 1), first.busy & (first.chunk == 0)
        (loss, nll), d_shared, dy = self._losses(given.shared, y, _at(given.parts, last.microbatch))
        d_layers, dx = pull((jnp.where(leaving & (stage == p - 1), dy, carry.back), jnp.ones_like(added)))

        def add(total: PyTree, new: PyTree, counted: Bool[Array, ""]) -> PyTree:
            """An idle stage's numbers are left out, not multiplied by 0: they need not be finite."""
            return jax.tree.map(lambda x, y: x + jnp.where(counted, y.astype(x.dtype), 0), total, new)

        def add_chunk(total: PyTree, new: PyTree) -> PyTree:
            sums = add(_at(total, turn.chunk), new, turn.busy)
            return jax.tree.map(lambda x, y: _put(x, turn.chunk, y, jnp.array(True)), total, sums)

        return dataclasses.replace(
            carry,
            layers=add_chunk(carry.layers, d_layers),
            shared=add(carry.shared, d_shared, leaving),
            embedded=_put(carry.embedded, first.microbatch, _shared(dx, source=0), entering),
            loss=add(add(carry.loss, loss, leaving), added, turn.busy),
            sums=add(carry.sums, sums | {"nll": jnp.zeros(())}, turn.busy)
            | {"nll": add(carry.sums["nll"], nll, leaving)},
            load=add_chunk(carry.load, load),
            back=_sent(dx, -1),
        )

    @functools.cached_property
    def _piece(self) -> Transformer:
        """The model with the layers of one piece."""
        c = self.model.config
        pieces = self.timetable.stages * self.timetable.config.chunks
        return Transformer(dataclasses.replace(c, n_layers=c.n_layers // pieces))

    def _apply(self, method: str, params: PyTree, *inputs: Any, key: Key[Array, ""] | None = None) -> Any:
        rngs = None if key is None else {"dropout": key}
        return self._piece.apply({"params": params}, *inputs, method=method, rngs=rngs)

    def _embed(self, shared: PyTree, parts: Batch, keys: Key[Array, " M"] | None) -> Float[Array, "M B L D"]:
        """All microbatches, of float32 parameters: their gradient is a sum over microbatches."""

        def one(part: tuple[Batch, Array | None]) -> Array:
            params = cast(shared, self.model.config.dtype)
            return self._apply("embed", params, part[0].tokens, _context(*part), key=part[1])

        return jax.lax.map(one, (parts, keys))

    def _through(
        self, given: Given, turn: Turn, layers: PyTree, x: Float[Array, "B L D"]
    ) -> tuple[tuple[Float[Array, "B L D"], Float[Array, ""]], tuple[Metrics, Array | None]]:
        """What a piece makes of `x`, and what its experts add to the loss; the sums they report, and their load."""
        c = self._piece.config
        part, key = _at((given.parts, given.keys), turn.microbatch)
        start = (turn.chunk * self.timetable.stages + jax.lax.axis_index(AXIS)) * c.n_layers
        params = given.shared | {"layers": layers}
        x, _, use = self._apply("layers", params, x, None, _context(part, key), start, key=key)
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
        last = self.timetable.stages - 1

        def losses(shared: PyTree, x: Array) -> tuple[Array, Array]:
            _, _, loss, nll = self._read(self.loss, shared, x, part)
            return loss.sum(), nll.sum()

        sums, (d_shared, dx) = jax.value_and_grad(losses, (0, 1), has_aux=True)(shared, _shared(y, source=last))
        return sums, d_shared, _gathered(dx, onto=last)

    def _scored(self, shared: PyTree, x: Float[Array, "B l D"], part: Batch) -> Scored:
        config = LossConfig(chunk=self.loss.chunk)
        targets, hidden, _, nll = self._read(config, shared, x, part)
        return scored(self.model.config, self._chunk(x), shared, targets, hidden, nll)

    def _read(self, config: LossConfig, shared: PyTree, x: Float[Array, "B l D"], part: Batch) -> tuple[Array, ...]:
        """Targets, hidden states, losses and nll of this stage's share `x` of what the last stage gave."""
        B, share, _ = x.shape
        targets = _at(jnp.moveaxis(part.targets.reshape(B, share, -1), 2, 0), jax.lax.axis_index(AXIS))
        config = dataclasses.replace(config, chunk=self._chunk(x))
        hidden, logits = self._apply("head", shared, x, config.chunk is None)
        return targets, hidden, *losses_of(self.model.config, config, shared, targets, hidden, logits)

    def _chunk(self, x: Float[Array, "B l D"]) -> int | None:
        """What of `loss.chunk` divides a share."""
        return None if self.loss.chunk is None else math.gcd(self.loss.chunk, x.shape[1])


def _sent(x: Array, steps: int) -> Array:
    """What the stage `steps` before this one has, around the ring."""
    p = jax.lax.axis_size(AXIS)
    return jax.lax.ppermute(x, AXIS, [(stage, (stage + steps) % p) for stage in range(p)])


def _shared(x: Float[Array, "B L D"], source: int) -> Float[Array, "B l D"]:
    """This stage's share of the tokens of what the stage `source` has."""

    def own(x: Array) -> Array:
        B, L, D = x.shape
        p = jax.lax.axis_size(AXIS)
        return jax.lax.all_to_all(jnp.moveaxis(x.reshape(B, L // p, p, D), 2, 0), AXIS, 0, 0)[source]

    return shard_map_by_letters(own, "BLD BLD", x)


def _gathered(x: Float[Array, "B l D"], onto: int) -> Float[Array, "B L D"]:
    """The shares of all stages on the stage `onto`; on the others, zeros."""

    def own(x: Array) -> Array:
        B, share, D = x.shape
        p = jax.lax.axis_size(AXIS)
        parts = jax.lax.all_to_all(jnp.zeros((p, *x.shape), x.dtype).at[onto].set(x), AXIS, 0, 0)
        return jnp.moveaxis(parts, 0, 2).reshape(B, share * p, D)

    return shard_map_by_letters(own, "BLD BLD", x)


def _at(tree: PyTree, index: Int[Array, ""] | int) -> PyTree:
    """`x[index]` of every leaf, as a slice: the compiler's partitioner is short of one for gathers in here."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, jnp.maximum(index, 0), keepdims=False), tree)


def _put(x: Array, index: Int[Array, ""], new: Array, counted: Bool[Array, ""]) -> Array:
    """`x` with `new` at `index` where it counts."""
    new = jnp.where(counted, new, _at(x, index))
    return jax.lax.dynamic_update_index_in_dim(x, new, jnp.maximum(index, 0), 0)


def _context(part: Batch, key: Key[Array, ""] | None) -> Context:
    """As `Transformer.__call__` makes it of a batch; with a key, for training."""
    positions = jnp.arange(part.tokens.shape[1])[None] if part.positions is None else part.positions
    mask = Mask(segments=part.segments, prefix=part.prefix)
    return Context(positions=positions, mask=mask, train=key is not None)
