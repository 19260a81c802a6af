"""Pipeline parallelism: the layers are split into stages, and microbatches pass through them by a timetable.

Every stage runs the same program, whatever its index: an idle one computes what nobody reads, and would only have
waited. The compiler may run a collective on all devices together: had a stage branched past it, all would wait forever.
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
from llm_jax.train.config import LossConfig
from llm_jax.train.step import Metrics, Scored, cast, losses_of, scored, split_microbatches
from llm_jax.train.timetable import Timetable, Work

AXIS = "pipeline"
# How arrays are split over the stages: [v p ...] by piece, [M B l p ...] by token, or the same on all.
PIECES, TOKENS, WHOLE = PartitionSpec(None, AXIS), PartitionSpec(None, None, None, AXIS), PartitionSpec()


@struct.dataclass
class Action:
    """What every stage does in one tick, in one direction; with a leading T, in every tick: `Work` on the device."""

    microbatch: Int[Array, "*T p"]
    chunk: Int[Array, "*T p"]
    slot: Int[Array, "*T p"]

    @classmethod
    def all_of(cls, work: Work) -> "Action":
        """Return the actions of one direction of a timetable, as arrays [T p]."""
        return cls(jnp.asarray(work.microbatch), jnp.asarray(work.chunk), jnp.asarray(work.slot))

    def of(self, stage: Int[Array, ""] | int) -> "Action":
        """Return the action of `stage`."""
        return _at(self, stage)

    @property
    def busy(self) -> Bool[Array, ""]:
        """Whether there is anything to do; a microbatch of -1 means idle."""
        return self.microbatch >= 0


@struct.dataclass
class Inputs:
    """What a stage reads in every tick.

    Attributes:
      layers: the layers of this stage, by chunk, in the compute dtype.
      shared: all other parameters, in the compute dtype.
      embedded: this stage's share of the tokens of every microbatch, embedded.
      microbatches: the batch, with a leading M.
      keys: one dropout key a microbatch; None: no dropout.
    """

    layers: PyTree
    shared: PyTree
    embedded: Float[Array, "M B l D"]
    microbatches: Batch
    keys: Key[Array, " M"] | None


@struct.dataclass
class Carry:
    """What a stage carries from tick to tick.

    Attributes:
      saved: inputs of pieces whose forward pass is done and whose backward pass is not.
      ahead: the activation that the stage before sent.
      back: the gradient that the stage after sent.
      layers: the gradient of the stage's layers so far, float32.
      shared: the gradient of the parameters outside of layers so far, float32.
      embedded: the gradient of `Inputs.embedded`.
      loss: the sum of the loss so far; each stage has its own share.
      sums: the sums of the reported metrics so far; each stage has its own share.
      load: tokens of each expert, by chunk and layer.
    """

    saved: Float[Array, "held B L D"]
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
    """The loss of `step.make_loss` and its gradient, computed on the pipeline stages of the current mesh.

    Embedding and head belong to no stage: each takes a share of the tokens, or the stage that had them would make the
    others wait (Yeung et al. 2024, arXiv:2411.05288). A share is every p-th token, so that another axis that splits a
    row splits each share alike, and no token moves. Tokens are embedded before the pipeline starts. Raise `ValueError`
    where the layers don't divide into the pieces of the timetable.
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
        """Return what `step.make_gradient` returns for as many microbatches, up to the order of sums."""
        M = self.timetable.microbatches
        microbatches, keys = split_microbatches(batch, M), jax.random.split(key, M)
        shared = {name: tree for name, tree in params.items() if name != "layers"}
        embedded, pull = jax.vjp(functools.partial(self._embed, microbatches=microbatches, keys=keys), shared)
        run = self._on_stages(self._run, (WHOLE, WHOLE, PIECES, PIECES, TOKENS))
        (loss, sums), d_shared, d_layers, load, d_embedded = run(self._inputs(params, embedded, microbatches, keys))
        (d_embed,) = pull(d_embedded.reshape(embedded.shape))
        if load is not None:
            sums |= {LOAD: load.reshape(-1, load.shape[-1])}
        d_layers = jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), d_layers)
        return (loss, sums), jax.tree.map(jnp.add, d_shared, d_embed) | {"layers": d_layers}

    def score(self, params: PyTree, batch: Batch) -> Scored:
        """Return what `step.score` returns, with the microbatches in the pipeline: forward only, nothing is saved."""
        microbatches = split_microbatches(batch, self.timetable.microbatches)
        shared = {name: tree for name, tree in params.items() if name != "layers"}
        inputs = self._inputs(params, self._embed(shared, microbatches, None), microbatches, None)
        found = self._on_stages(self._score, TOKENS)(inputs)
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(batch.targets.shape), found)

    def _on_stages(self, function: Callable[[Inputs], Any], out: Any) -> Callable[[Inputs], Any]:
        """Run `function` on each stage with its inputs; only the pipeline axis is manual."""
        # A spec in each field, which is not the type that the field declares.
        specs: Any = Inputs(PIECES, WHOLE, TOKENS, WHOLE, WHOLE)  # pyright: ignore[reportArgumentType]

        def own(inputs: Inputs) -> Any:
            layers = jax.tree.map(lambda x: x[:, 0], inputs.layers)
            return function(dataclasses.replace(inputs, layers=layers, embedded=inputs.embedded[:, :, :, 0]))

        return jax.shard_map(own, in_specs=(specs,), out_specs=out, axis_names={AXIS}, check_vma=False)

    def _inputs(self, params: PyTree, embedded: Array, microbatches: Batch, keys: Array | None) -> Inputs:
        """Return what the stages read. Piece j of the model is chunk j // p of stage j % p.

        With several chunks each step moves the cast weights to their stages, and the gradients back.
        """
        p, v = self.timetable.stages, self.timetable.config.chunks
        shared = cast(params, self.model.config.dtype)
        layers = jax.tree.map(lambda x: x.reshape(v, p, -1, *x.shape[1:]), shared.pop("layers"))
        M, B, L, D = embedded.shape
        return Inputs(layers, shared, embedded.reshape(M, B, L // p, p, D), microbatches, keys)

    def _score(self, inputs: Inputs) -> Scored:
        """Score this stage's share of the tokens of every microbatch."""
        p, v = self.timetable.stages, self.timetable.config.chunks

        def tick(carry: tuple[Array, Scored], actions: Action) -> tuple[tuple[Array, Scored], None]:
            (ahead, found), last = carry, actions.of(p - 1)
            _, y = self._through_next(inputs, actions, ahead)
            share = self._scored(inputs.shared, _shared(y, source=p - 1), _at(inputs.microbatches, last.microbatch))
            done = last.busy & (last.chunk == v - 1)
            found = jax.tree.map(lambda x, new: _put(x, last.microbatch, new, done), found, share)
            return (_sent(y, 1), found), None

        shape = inputs.embedded.shape[:3]
        start = jnp.zeros_like(_gathered(inputs.embedded[0], onto=0))
        found = Scored(jnp.zeros(shape), jnp.zeros(shape, bool))
        (_, found), _ = jax.lax.scan(tick, (start, found), Action.all_of(self.timetable.forward))
        return jax.tree.map(lambda x: x[..., None], found)

    def _run(self, inputs: Inputs) -> tuple[Any, ...]:
        """Run one stage through all ticks.

        Return (loss, sums) over all stages and the gradients of the shared parameters; of this stage, the gradients of
        its layers, its load, and the gradients of its embedded tokens.
        """
        works = (self.timetable.forward, self.timetable.backward)
        actions = [Action.all_of(work) for work in works]
        busy = np.stack([work.busy.any(1) for work in works])
        changes = np.flatnonzero((busy[:, 1:] != busy[:, :-1]).any(0)) + 1
        carry = self._start(inputs)
        for start, end in itertools.pairwise([0, *changes.tolist(), busy.shape[1]]):
            tick = functools.partial(self._tick, inputs, forward=bool(busy[0, start]), backward=bool(busy[1, start]))
            carry, _ = jax.lax.scan(tick, carry, jax.tree.map(lambda x, a=start, b=end: x[a:b], actions))
        whole = jax.lax.psum(((carry.loss, carry.sums), carry.shared), AXIS)
        return *whole, *jax.tree.map(lambda x: x[:, None], (carry.layers, carry.load)), carry.embedded[:, :, :, None]

    def _start(self, inputs: Inputs) -> Carry:
        c = self.model.config
        stream = jnp.zeros((*inputs.microbatches.tokens.shape[1:], c.d_model), c.dtype)
        layers, shared = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (inputs.layers, inputs.shared))
        names, load = ["nll"], None
        if c.experts is not None:
            names += ["balance_loss", "router_z"]
            rows = sum(layer.moe for layer in c.period) * (self._piece.config.n_layers // len(c.period))
            load = jnp.zeros((self.timetable.config.chunks, rows, c.experts.number))
        return Carry(
            saved=jnp.zeros((self.timetable.held, *stream.shape), c.dtype),
            ahead=stream,
            back=stream,
            layers=layers,
            shared=shared,
            embedded=jnp.zeros_like(inputs.embedded),
            loss=jnp.zeros(()),
            sums=dict.fromkeys(names, jnp.zeros(())),
            load=load,
        )

    def _tick(self, inputs: Inputs, carry: Carry, actions: list[Action], *, forward: bool, backward: bool) -> Any:
        if forward:
            carry = self._forward(inputs, carry, actions[0])
        if backward:
            carry = self._backward(inputs, carry, actions[1])
        return carry, None

    def _forward(self, inputs: Inputs, carry: Carry, actions: Action) -> Carry:
        """Compute a piece, save its input, send its output."""
        action = actions.of(jax.lax.axis_index(AXIS))
        x, y = self._through_next(inputs, actions, carry.ahead)
        saved = _put(carry.saved, action.slot, x, action.busy)
        return dataclasses.replace(carry, saved=saved, ahead=_sent(y, 1))

    def _through_next(self, inputs: Inputs, actions: Action, ahead: Float[Array, "B L D"]) -> tuple[Array, Array]:
        """Return the input of this tick's piece, embedded tokens or the activation `ahead`, and its output."""
        stage = jax.lax.axis_index(AXIS)
        action = actions.of(stage)
        first = _gathered(_at(inputs.embedded, actions.of(0).microbatch), onto=0)
        x = jnp.where((stage == 0) & (action.chunk == 0), first, ahead)
        return x, self._through(inputs, action, _at(inputs.layers, action.chunk), x)[0][0]

    def _backward(self, inputs: Inputs, carry: Carry, actions: Action) -> Carry:
        """Recompute a piece, backpropagate the gradient of its output, send the gradient of its input."""
        stage, p, v = jax.lax.axis_index(AXIS), self.timetable.stages, self.timetable.config.chunks
        action, first, last = actions.of(stage), actions.of(0), actions.of(p - 1)
        through = functools.partial(self._through, inputs, action)
        read = after(_at(carry.saved, action.slot), carry.ahead)  # once this tick's forward pass has sent it
        (y, added), pull, (sums, load) = jax.vjp(through, _at(inputs.layers, action.chunk), read, has_aux=True)
        leaving, entering = last.busy & (last.chunk == v - 1), first.busy & (first.chunk == 0)
        (loss, nll), d_shared, dy = self._losses(inputs.shared, y, _at(inputs.microbatches, last.microbatch))
        d_layers, dx = pull((jnp.where(leaving & (stage == p - 1), dy, carry.back), jnp.ones_like(added)))

        def add(total: PyTree, new: PyTree, counted: Bool[Array, ""]) -> PyTree:
            """Leave an idle stage's numbers out, by a choice and not by a factor 0: they need not be finite."""
            return jax.tree.map(lambda x, y: x + jnp.where(counted, y.astype(x.dtype), 0), total, new)

        def add_chunk(total: PyTree, new: PyTree) -> PyTree:
            sums = add(_at(total, action.chunk), new, action.busy)
            return jax.tree.map(lambda x, y: _put(x, action.chunk, y, jnp.array(True)), total, sums)

        return dataclasses.replace(
            carry,
            layers=add_chunk(carry.layers, d_layers),
            shared=add(carry.shared, d_shared, leaving),
            embedded=_put(carry.embedded, first.microbatch, _shared(dx, source=0), entering),
            loss=add(add(carry.loss, loss, leaving), added, action.busy),
            sums=add(carry.sums, sums | {"nll": jnp.zeros(())}, action.busy)
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

    def _apply(self, method: str, params: PyTree, *arrays: Any, key: Key[Array, ""] | None = None) -> Any:
        rngs = None if key is None else {"dropout": key}
        return self._piece.apply({"params": params}, *arrays, method=method, rngs=rngs)

    def _embed(self, shared: PyTree, microbatches: Batch, keys: Key[Array, " M"] | None) -> Float[Array, "M B L D"]:
        """Embed all microbatches with float32 parameters, whose gradient is a sum over microbatches."""

        def one(given: tuple[Batch, Array | None]) -> Array:
            params = cast(shared, self.model.config.dtype)
            return self._apply("embed", params, given[0].tokens, _context(*given), key=given[1])

        return jax.lax.map(one, (microbatches, keys))

    def _through(
        self, inputs: Inputs, action: Action, layers: PyTree, x: Float[Array, "B L D"]
    ) -> tuple[tuple[Float[Array, "B L D"], Float[Array, ""]], tuple[Metrics, Array | None]]:
        """Return a piece's output and what its experts add to the loss; the sums that they report, and their load."""
        c = self._piece.config
        microbatch, key = _at((inputs.microbatches, inputs.keys), action.microbatch)
        start = (action.chunk * self.timetable.stages + jax.lax.axis_index(AXIS)) * c.n_layers
        params = inputs.shared | {"layers": layers}
        x, _, use = self._apply("layers", params, x, None, _context(microbatch, key), start, key=key)
        if use is None:
            return (x, jnp.zeros(())), ({}, None)
        assert c.experts is not None
        added, sums = expert_sums(c.experts, use, (microbatch.targets != IGNORE).sum())
        load = sums.pop(LOAD)
        return (x, added), (sums, load)

    def _losses(
        self, shared: PyTree, y: Float[Array, "B L D"], microbatch: Batch
    ) -> tuple[tuple[Array, Array], PyTree, Float[Array, "B L D"]]:
        """Return loss and nll of this stage's share of the last stage's output, and the gradients by `shared` and `y`.

        The gradient by `y` has all shares on the last stage, and means nothing on the others.
        """
        last = self.timetable.stages - 1

        def losses(shared: PyTree, x: Array) -> tuple[Array, Array]:
            _, _, loss, nll = self._read(self.loss, shared, x, microbatch)
            return loss.sum(), nll.sum()

        sums, (d_shared, dx) = jax.value_and_grad(losses, (0, 1), has_aux=True)(shared, _shared(y, source=last))
        return sums, d_shared, _gathered(dx, onto=last)

    def _scored(self, shared: PyTree, x: Float[Array, "B l D"], microbatch: Batch) -> Scored:
        config = LossConfig(chunk=self.loss.chunk)
        targets, hidden, _, nll = self._read(config, shared, x, microbatch)
        return scored(self.model.config, self._chunk(x), shared, targets, hidden, nll)

    def _read(
        self, config: LossConfig, shared: PyTree, x: Float[Array, "B l D"], microbatch: Batch
    ) -> tuple[Array, ...]:
        """Return targets, hidden states, losses and nll of this stage's share `x` of the last stage's output."""
        B, share, _ = x.shape
        targets = _at(jnp.moveaxis(microbatch.targets.reshape(B, share, -1), 2, 0), jax.lax.axis_index(AXIS))
        config = dataclasses.replace(config, chunk=self._chunk(x))
        hidden, logits = self._apply("head", shared, x, config.chunk is None)
        return targets, hidden, *losses_of(self.model.config, config, shared, targets, hidden, logits)

    def _chunk(self, x: Float[Array, "B l D"]) -> int | None:
        """Return the largest divisor of `loss.chunk` that divides a share."""
        return None if self.loss.chunk is None else math.gcd(self.loss.chunk, x.shape[1])


def _sent(x: Array, steps: int) -> Array:
    """Return `x` of the stage `steps` before this one, around the ring."""
    p = jax.lax.axis_size(AXIS)
    return jax.lax.ppermute(x, AXIS, [(stage, (stage + steps) % p) for stage in range(p)])


def _shared(x: Float[Array, "B L D"], source: int) -> Float[Array, "B l D"]:
    """Return this stage's share of the tokens of `x` on the stage `source`."""

    def own(x: Array) -> Array:
        B, L, D = x.shape
        p = jax.lax.axis_size(AXIS)
        return jax.lax.all_to_all(jnp.moveaxis(x.reshape(B, L // p, p, D), 2, 0), AXIS, 0, 0)[source]

    return shard_map_by_letters(own, "BLD BLD", x)


def _gathered(x: Float[Array, "B l D"], onto: int) -> Float[Array, "B L D"]:
    """Return the shares of all stages on the stage `onto`; on the others, zeros."""

    def own(x: Array) -> Array:
        B, share, D = x.shape
        p = jax.lax.axis_size(AXIS)
        shares = jax.lax.all_to_all(jnp.zeros((p, *x.shape), x.dtype).at[onto].set(x), AXIS, 0, 0)
        return jnp.moveaxis(shares, 0, 2).reshape(B, share * p, D)

    return shard_map_by_letters(own, "BLD BLD", x)


def _at(tree: PyTree, index: Int[Array, ""] | int) -> PyTree:
    """Return `x[index]` of every leaf, as a slice: inside a shard_map the compiler can't partition a gather."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, jnp.maximum(index, 0), keepdims=False), tree)


def _put(x: Array, index: Int[Array, ""], new: Array, counted: Bool[Array, ""]) -> Array:
    """Return `x` with `new` at `index` where `counted`."""
    new = jnp.where(counted, new, _at(x, index))
    return jax.lax.dynamic_update_index_in_dim(x, new, jnp.maximum(index, 0), 0)


def _context(microbatch: Batch, key: Key[Array, ""] | None) -> Context:
    """Return the context that `Transformer.__call__` makes of a batch; with a key, for training."""
    positions = jnp.arange(microbatch.tokens.shape[1])[None] if microbatch.positions is None else microbatch.positions
    mask = Mask(segments=microbatch.segments, prefix=microbatch.prefix)
    return Context(positions=positions, mask=mask, train=key is not None)
