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
from jaxtyping import Array, Float, Int, Key, PyTree

from llm_jax.data.loader import Batch
from llm_jax.model.attention import Context
from llm_jax.model.transformer import Transformer
from llm_jax.ops.attention import Mask
from llm_jax.ops.loss import IGNORE
from llm_jax.train.balance import LOAD, expert_sums
from llm_jax.train.step import LossConfig, Metrics, cast, losses_of, microbatches
from llm_jax.train.timetable import Timetable, Work

AXIS = "pipeline"


@struct.dataclass
class Turn:
    """What every stage does in one tick, in one direction; with a leading T, in all ticks."""

    microbatch: Int[Array, "*T p"]
    chunk: Int[Array, "*T p"]
    place: Int[Array, "*T p"]

    @classmethod
    def of(cls, work: Work, held: int) -> "Turn":
        """Idle stages work on microbatch 0, but keep nothing: `held` is no place."""
        return cls(
            jnp.asarray(np.where(work.busy, work.microbatch, -1)),
            jnp.asarray(work.chunk),
            jnp.asarray(np.where(work.busy, work.place, held)),
        )

    def at(self, stage: Int[Array, ""] | int) -> "Turn":
        return jax.tree.map(lambda x: x[stage], self)


@struct.dataclass
class Carry:
    """What a stage takes from tick to tick.

    Attributes:
      inputs: of pieces that have gone forward and not yet back.
      ahead: what the stage before sent, an activation.
      back: what the stage after sent, a gradient.
      layers, shared: sums of gradients, float32.
      loss, sums: of the loss and of what is reported; of each stage its own part.
      load: tokens of each expert, by layer.
    """

    inputs: Float[Array, "held B L D"]
    ahead: Float[Array, "B L D"]
    back: Float[Array, "B L D"]
    layers: PyTree
    shared: PyTree
    loss: Float[Array, ""]
    sums: dict[str, Float[Array, ""]]
    load: Float[Array, "v N E"] | None


@struct.dataclass
class Given:
    """What all ticks read: parameters in the dtype of the computation, and microbatches with a leading M."""

    layers: PyTree
    shared: PyTree
    parts: Batch
    keys: Key[Array, " M"]


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The loss of `step.make_loss` and its gradient, computed on the stages of the mesh of `jax.set_mesh`."""

    model: Transformer
    loss: LossConfig
    timetable: Timetable

    def gradient(
        self, params: PyTree, batch: Batch, key: Key[Array, ""]
    ) -> tuple[tuple[Float[Array, ""], Metrics], PyTree]:
        """What `step.accumulated` gives for as many microbatches, up to the order of sums."""
        p, M, v = self.timetable.stages, self.timetable.microbatches, self.timetable.config.chunks
        shared = cast(params, self.model.config.dtype)
        # Piece j of the model is chunk j // p of stage j % p. With one chunk a stage has its layers already; with
        # more, each step moves the cast weights there and the gradients back.
        layers = jax.tree.map(lambda x: x.reshape(v, p, -1, *x.shape[1:]), shared.pop("layers"))
        pieces, all_of_it = PartitionSpec(None, AXIS), PartitionSpec()
        run = jax.shard_map(
            self._run,
            in_specs=(Given(pieces, all_of_it, all_of_it, all_of_it),),
            out_specs=(all_of_it, all_of_it, pieces, pieces),
            axis_names={AXIS},
            check_vma=False,
        )
        given = Given(layers, shared, microbatches(batch, M), jax.random.split(key, M))
        (loss, sums), d_shared, d_layers, load = run(given)
        if load is not None:
            sums |= {LOAD: load.reshape(-1, load.shape[-1])}
        return (loss, sums), d_shared | {"layers": jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), d_layers)}

    def _run(self, given: Given) -> tuple[Any, ...]:
        """One stage through all ticks: (loss, sums), gradients of what is shared and of its own layers, load."""
        given = given.replace(layers=jax.tree.map(lambda x: x[:, 0], given.layers))
        carry, table = self._start(given), self.timetable
        turns = [Turn.of(work, table.held) for work in (table.forward, table.backward)]
        busy = np.stack([work.busy.any(1) for work in (table.forward, table.backward)])
        starts = [0, *(np.flatnonzero((busy[:, 1:] != busy[:, :-1]).any(0)) + 1).tolist(), busy.shape[1]]
        for start, end in itertools.pairwise(starts):
            tick = functools.partial(self._tick, given, forward=bool(busy[0, start]), backward=bool(busy[1, start]))
            rows = jax.tree.map(lambda x, start=start, end=end: x[start:end], turns)
            carry, _ = jax.lax.scan(tick, carry, rows)
        whole = jax.lax.psum(((carry.loss, carry.sums), carry.shared), AXIS)
        return *whole, *jax.tree.map(lambda x: x[:, None], (carry.layers, carry.load))

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
        turn = turns.at(stage)
        part, key = _microbatch(given, turn)
        x = jnp.where((stage == 0) & (turn.chunk == 0), self._embed(given.shared, part, key), carry.ahead)
        layers = _chunk(given.layers, turn)
        y = self._through(layers, x, given.shared, part, key, turn.chunk * p + stage)[0][0]
        inputs = carry.inputs.at[turn.place].set(x, mode="drop")
        return carry.replace(inputs=inputs, ahead=jax.lax.ppermute(y, AXIS, [(s, (s + 1) % p) for s in range(p)]))

    def _backward(self, given: Given, carry: Carry, turns: Turn) -> Carry:
        """Computes a piece again, and its gradients from that of what it gave; sends the gradient of what it read."""
        stage, p, v = jax.lax.axis_index(AXIS), self.timetable.stages, self.timetable.config.chunks
        turn = turns.at(stage)
        part, key = _microbatch(given, turn)
        through = functools.partial(
            self._through, shared=given.shared, part=part, key=key, piece=turn.chunk * p + stage
        )
        x = carry.inputs.at[turn.place].get(mode="clip")
        (y, added), pull, (sums, load) = jax.vjp(through, _chunk(given.layers, turn), x, has_aux=True)

        last = turns.at(p - 1)
        (loss, nll), d_head, dy = self._losses(given.shared, y, _microbatch(given, last)[0])
        losing = (last.microbatch >= 0) & (last.chunk == v - 1)
        dy = jnp.where((stage == p - 1) & (turn.chunk == v - 1), dy, carry.back)
        d_layers, dx = pull((dy, jnp.ones_like(added)))

        busy = turn.microbatch >= 0
        _, pull = jax.vjp(lambda shared: self._embed(shared, part, key), given.shared)
        (d_embed,) = pull(jnp.where(busy & (stage == 0) & (turn.chunk == 0), dx, jnp.zeros_like(dx)))

        def add(total: Array, new: Array, counted: Array) -> Array:
            return total + jnp.where(counted, new.astype(total.dtype), jnp.zeros_like(total))

        def add_chunk(total: Array, new: Array) -> Array:
            return total.at[turn.chunk].add(jnp.where(busy, new.astype(total.dtype), jnp.zeros(new.shape, total.dtype)))

        shared = jax.tree.map(
            lambda total, head, embed: add(total, head, losing) + embed.astype(total.dtype),
            carry.shared,
            d_head,
            d_embed,
        )
        total = add(add(carry.loss, loss, losing), added, busy)
        sums = {name: add(carry.sums[name], x, busy) for name, x in sums.items()}
        return carry.replace(
            layers=jax.tree.map(add_chunk, carry.layers, d_layers),
            shared=shared,
            loss=total,
            sums=sums | {"nll": add(carry.sums["nll"], nll, losing)},
            load=None if carry.load is None else add_chunk(carry.load, load),
            back=jax.lax.ppermute(dx, AXIS, [(s, (s - 1) % p) for s in range(p)]),
        )

    @functools.cached_property
    def _piece(self) -> Transformer:
        """The model with the layers of one piece."""
        c = self.model.config
        pieces = self.timetable.stages * self.timetable.config.chunks
        return Transformer(dataclasses.replace(c, n_layers=c.n_layers // pieces))

    def _embed(self, shared: PyTree, part: Batch, key: Key[Array, ""]) -> Float[Array, "B L D"]:
        return self._piece.apply({"params": shared}, part.tokens, _context(part), method="embed", rngs={"dropout": key})

    def _through(
        self, layers: PyTree, x: Float[Array, "B L D"], shared: PyTree, part: Batch, key: Key[Array, ""], piece: Array
    ) -> tuple[tuple[Float[Array, "B L D"], Float[Array, ""]], tuple[dict[str, Array], Array | None]]:
        """What a piece makes of `x`, and what its experts add to the loss, to the sums, and had as load."""
        c = self._piece.config
        x, _, use = self._piece.apply(
            {"params": shared | {"layers": layers}},
            x,
            None,
            _context(part),
            piece * c.n_layers,
            method="layers",
            rngs={"dropout": key},
        )
        if use is None:
            return (x, jnp.zeros(())), ({}, None)
        added, sums = expert_sums(c.experts, use, (part.targets != IGNORE).sum())
        load = sums.pop(LOAD)
        return (x, added), (sums, load)

    def _losses(
        self, shared: PyTree, y: Float[Array, "B L D"], part: Batch
    ) -> tuple[tuple[Array, Array], PyTree, Float[Array, "B L D"]]:
        """Loss and nll of this stage's share of the tokens of the last stage's `y`; gradients of `shared` and `y`.

        All stages take part, as they would wait for the last one otherwise (arXiv:2411.05288 does so for the same
        reason). The gradient of `y` is that of all tokens on the last stage, and means nothing on the others.
        """
        p, (B, L, D) = self.timetable.stages, y.shape
        swap = functools.partial(jax.lax.all_to_all, axis_name=AXIS, split_axis=0, concat_axis=0)
        mine = swap(jnp.moveaxis(y.reshape(B, p, L // p, D), 1, 0))[p - 1]
        targets = part.targets.reshape(B, p, L // p)[:, jax.lax.axis_index(AXIS)]
        chunk = self.loss.chunk
        config = dataclasses.replace(self.loss, chunk=None if chunk is None else math.gcd(chunk, L // p))

        def share(shared: PyTree, x: Array) -> tuple[Array, Array]:
            hidden, logits = self._piece.apply({"params": shared}, x, chunk is None, method="head")
            loss, nll = losses_of(self.model.config, config, shared, targets, hidden, logits)
            return loss.sum(), nll.sum()

        losses, (d_shared, d_mine) = jax.value_and_grad(share, (0, 1), has_aux=True)(shared, mine)
        back = swap(jnp.zeros((p, *mine.shape), mine.dtype).at[p - 1].set(d_mine))
        return losses, d_shared, jnp.moveaxis(back, 0, 1).reshape(B, L, D)


def _microbatch(given: Given, turn: Turn) -> tuple[Batch, Key[Array, ""]]:
    number = jnp.maximum(turn.microbatch, 0)
    return jax.tree.map(lambda x: x[number], (given.parts, given.keys))


def _chunk(layers: PyTree, turn: Turn) -> PyTree:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, turn.chunk, keepdims=False), layers)


def _context(part: Batch) -> Context:
    """As `Transformer.__call__` makes it of a batch."""
    positions = jnp.arange(part.tokens.shape[1])[None] if part.positions is None else part.positions
    return Context(positions=positions, mask=Mask(segments=part.segments, prefix=part.prefix), train=True)
