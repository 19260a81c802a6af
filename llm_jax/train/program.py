"""What a config compiles to: abstract state, shardings, and the jitted init, train step and scoring.

Shapes first, then shardings, then arrays: nothing is allocated before `init` or a restore, so the same object serves
a run, a restore onto another mesh, and the study of a model far larger than this machine.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key, PyTree

from llm_jax import runtime
from llm_jax.data.loader import Batch, as_told
from llm_jax.model.transformer import Transformer
from llm_jax.ops.attention import heard
from llm_jax.sharding import MeshConfig, batch_sharding, make_mesh, rows_here, shardings
from llm_jax.train.balance import rebalance
from llm_jax.train.batch import check_batch
from llm_jax.train.config import RunConfig
from llm_jax.train.custom import Custom
from llm_jax.train.layout import check, check_attention, order, ordered, split
from llm_jax.train.offload import waiting
from llm_jax.train.optimizer import make_optimizer, make_schedule
from llm_jax.train.pipeline import Pipeline
from llm_jax.train.step import (
    Gradient,
    Metrics,
    Scored,
    TrainState,
    cast,
    init_state,
    make_gradient,
    make_loss,
    make_train_step,
    microbatches,
    rows_apart,
    score,
)
from llm_jax.train.timetable import Timetable

WAITING = {"none": (), "optimizer": ("opt_state",), "state": ("params", "opt_state")}  # by `RunConfig.offload`


@dataclasses.dataclass(frozen=True)
class Program:
    """A config on a mesh. Every method runs under that mesh."""

    config: RunConfig
    mesh: Mesh
    custom: Custom = Custom()

    @classmethod
    def on(cls, config: RunConfig, devices: Sequence[Any] | None = None, custom: Custom = Custom()) -> "Program":
        """Return the program on `devices`, by default all there are. Raise `ValueError` for what can't be split so.

        The last few are kept: whoever evaluates what was just trained, or starts the same run again, traces nothing.
        """
        return _kept(config, make_mesh(config.mesh, devices), custom)

    @classmethod
    def on_one_device(cls, config: RunConfig, device: Any = None) -> "Program":
        """The program on one device, by default the first there is, and in its memory, whatever the config asks for."""
        return cls(dataclasses.replace(config, offload="none"), make_mesh(MeshConfig(), [device or jax.devices()[0]]))

    @functools.cached_property
    def attention_notes(self) -> list[str]:
        """What was said of attention when the train step was traced: which implementation runs, and why."""
        return []

    @functools.cached_property
    def model(self) -> Transformer:
        return Transformer(split(self.config.model, self.mesh.shape["context"]))

    @functools.cached_property
    def pipeline(self) -> Pipeline | None:
        """What computes loss and gradient, where the mesh has several stages."""
        stages, c = self.mesh.shape["pipeline"], self.config
        return None if stages == 1 else Pipeline(self.model, c.loss, Timetable(c.pipeline, stages, c.accumulate))

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shape, dtype and sharding of every leaf of the train state."""
        shapes = jax.eval_shape(functools.partial(init_state, self.model, self._optimizer), jax.random.key(0))
        if self.custom.optimizer is None:
            layout = shardings(shapes, self.mesh)
        else:
            opt_state = shardings(shapes.opt_state, self.mesh, unknown="whole")
            layout = dataclasses.replace(shardings(shapes.replace(opt_state=()), self.mesh), opt_state=opt_state)
        for part in WAITING[self.config.offload]:
            layout = dataclasses.replace(layout, **{part: waiting(getattr(layout, part))})
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, layout
        )

    @functools.cached_property
    def abstract_batch(self) -> Batch:
        """Shape, dtype and sharding of what the loader gives, rows of all processes together."""
        data = self.config.data
        shape, rows = (data.batch_size, data.seq_len), batch_sharding(self.mesh)
        ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
        seen = jax.ShapeDtypeStruct(shape, bool, sharding=rows)
        batch = as_told(Batch(ids, ids, ids, ids, ids, prefix=seen), data, self.custom.needs)
        return batch if self.order is None else dataclasses.replace(batch, positions=ids)

    def init(self) -> TrainState:
        """A fresh state, every leaf made where it belongs."""
        return self._init(jax.random.key(self.config.seed))

    def gradient(self, params: PyTree, batch: Batch) -> tuple[tuple[Float[Array, ""], Metrics], PyTree]:
        """Sums of loss and metrics over the targets of a batch, with the noise of step 0, and the gradient."""
        with jax.set_mesh(self.mesh):
            return self._gradient(params, self.put(batch))

    @property
    def traced_gradient(self) -> Gradient:
        """The gradient as a function to trace: (params, batch, key) -> ((loss, sums), gradient)."""
        c, model = self.config, self.model
        if self.pipeline is not None:
            return self.pipeline.gradient
        own = self.custom.loss
        loss = make_loss(model, c.loss) if own is None else functools.partial(own, model)
        near = make_gradient(loss, c.accumulate, own is None and rows_apart(c.model, self.mesh.shape))
        if c.offload != "state":
            return near

        def of_waiting(params: PyTree, batch: Batch, key: Key[Array, ""]) -> Any:
            # Only what the model computes with is brought; as float32, so that gradients add up as they did.
            return near(jax.tree.map(lambda x: x.astype(jnp.float32), cast(params, c.model.dtype)), batch, key)

        return of_waiting

    def updated(self, params: PyTree, opt_state: PyTree, gradient: PyTree, step: int) -> PyTree:
        """The parameters after the update of `step` by a mean gradient, whatever they come to; to be traced."""
        optimizer = optax.with_extra_args_support(self._optimizer)
        updates, _ = optimizer.update(gradient, opt_state, params, norm=optax.tree.norm(gradient))
        if self._schedule is not None:
            updates = optax.tree.scale(self._schedule(step), updates)
        return optax.apply_updates(params, updates)

    def train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One optimizer step; `state` is donated. Compiles once, and says so by an error if it ever would again.

        `batch` holds the `rows` of this process. Raises `ValueError` for one that `check_batch` refuses, and so do
        `gradient` and `score`.
        """
        with jax.set_mesh(self.mesh), heard(self.attention_notes.append):
            return self._train_step(state, self.put(batch))

    def lowered(self) -> jax.stages.Lowered:
        """The train step before it is compiled, from shapes alone: the devices of the mesh need not be there."""
        state, batch = self.abstract_state, self.abstract_batch  # made on devices that are there, so before the mesh
        with jax.set_mesh(self.mesh):
            return self._train_step.lower(state, batch)

    def score(self, params: PyTree, batch: Batch) -> Scored:
        """How well every target of `batch`, all rows of it, is predicted; arrays of NumPy, the same in each process."""
        with jax.set_mesh(self.mesh):
            self._check(batch, self.config.data.batch_size)
            given = self._spread(self.share(dataclasses.replace(batch, documents=None)))
            found = jax.device_get(self._score(params, given))
        if self.order is None:
            return found
        back = np.argsort(self.order)
        return jax.tree.map(lambda x: x[:, back], found)

    @functools.cached_property
    def rows(self) -> list[int]:
        """The rows of a batch that the devices of this process hold, and so all of it that this process reads."""
        return rows_here(self.mesh, self.config.data.batch_size)

    @functools.cached_property
    def order(self) -> Int[np.ndarray, " L"] | None:
        """Which token of a row stands where on the mesh; None: each in its own place."""
        return order(self.config.model, self.config.data.seq_len, self.mesh.shape["context"])

    def share(self, batch: Batch) -> Batch:
        """Of all rows of `batch` those of this process."""
        return jax.tree.map(lambda x: x[self.rows], batch)

    def put(self, batch: Batch) -> Batch:
        """`batch`, the `rows` of this process, as global arrays on the mesh, the tokens of each row in `order`."""
        self._check(batch, len(self.rows))
        return self._spread(batch)

    def _spread(self, batch: Batch) -> Batch:
        batch = batch if self.order is None else ordered(batch, self.order)
        rows, layout = range(self.config.data.batch_size), batch_sharding(self.mesh)

        def part(x: np.ndarray, index: Any) -> np.ndarray:
            wanted = rows[index[0]]
            first = self.rows.index(wanted[0])
            return x[(slice(first, first + len(wanted)), *index[1:])]

        return jax.tree.map(
            lambda x: jax.make_array_from_callback((len(rows), *x.shape[1:]), layout, functools.partial(part, x)), batch
        )

    def _check(self, batch: Batch, rows: int) -> None:
        check_batch(batch, self.config.model, rows, self.config.data.seq_len)

    @functools.cached_property
    def _optimizer(self) -> optax.GradientTransformation:
        return self.custom.optimizer or make_optimizer(self.config.optimizer)

    @property
    def _schedule(self) -> optax.Schedule | None:
        """None: an optimizer of the caller's own has one inside."""
        c = self.config
        return make_schedule(c.optimizer, c.steps) if self.custom.optimizer is None else None

    @functools.cached_property
    def _layout(self) -> TrainState:
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)

    @functools.cached_property
    def _init(self) -> Any:
        options = runtime.for_one_call(self.mesh.devices.flat[0].platform)
        make = functools.partial(init_state, self.model, self._optimizer)
        return jax.jit(make, out_shardings=self._layout, compiler_options=options)

    @functools.cached_property
    def _gradient(self) -> Any:
        key = jax.random.fold_in(jax.random.key(self.config.seed), 0)
        replicated = NamedSharding(self.mesh, PartitionSpec())
        return jax.jit(
            lambda params, batch: self.traced_gradient(params, batch, key),
            out_shardings=(replicated, self._layout.params),
        )

    @functools.cached_property
    def _train_step(self) -> Any:
        c, experts = self.config, self.config.model.experts
        follow = experts is not None and experts.balance == "bias"
        step = make_train_step(
            self.traced_gradient,
            self._optimizer,
            self._schedule,
            seed=c.seed,
            rebalance=functools.partial(rebalance, c.model) if follow else None,
            # Its iteration is expensive, and it has one moment less. With `offload` there is no room to hold.
            hold=c.optimizer.name == "muon" and self.custom.optimizer is None and c.offload == "none",
        )
        replicated = NamedSharding(self.mesh, PartitionSpec())
        chex.clear_trace_counter()  # it counts by name, and every program of this process has a step of that name
        return jax.jit(chex.assert_max_traces(step, n=1), donate_argnums=0, out_shardings=(self._layout, replicated))

    @functools.cached_property
    def _score(self) -> Any:
        c = self.config

        def scored(params: PyTree, batch: Batch) -> Scored:
            # In the microbatches of training: what fits there fits here.
            if self.pipeline is not None:
                return self.pipeline.score(params, batch)
            one = functools.partial(score, self.model, c.loss.chunk, params)
            parts = jax.lax.map(one, microbatches(batch, c.accumulate))
            return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(batch.targets.shape), parts)

        return jax.jit(scored, out_shardings=NamedSharding(self.mesh, PartitionSpec()))


@functools.lru_cache(maxsize=4)
def _kept(config: RunConfig, mesh: Mesh, custom: Custom) -> Program:
    check(config, mesh)
    check_attention(config, mesh)
    custom.check(config, mesh)
    return Program(config, mesh, custom)
