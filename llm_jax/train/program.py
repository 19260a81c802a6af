"""What a config compiles to: abstract state, shardings, and the jitted init, train step and scoring.

Shapes first, then shardings, then arrays: nothing is allocated before `init` or a restore, so the same object serves
a run, a restore onto another mesh, and a plan for a model far larger than this machine.
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
from llm_jax.axes import MeshConfig
from llm_jax.data.loader import Batch, select_fields
from llm_jax.model.config import own_layers
from llm_jax.model.transformer import Transformer
from llm_jax.ops.attention import heard
from llm_jax.sharding import batch_sharding, make_mesh, rows_here, shardings
from llm_jax.train.balance import rebalance
from llm_jax.train.batch import check_batch
from llm_jax.train.config import RunConfig
from llm_jax.train.custom import Custom, key_leaf
from llm_jax.train.mesh import check_attention, check_mesh, context_model, reorder, token_order
from llm_jax.train.offload import host_shardings
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
    rows_independent,
    score,
    split_microbatches,
)
from llm_jax.train.timetable import Timetable
from llm_jax.train.update import Update, make_update, native_adamw

ON_HOST = {"none": (), "optimizer": ("opt_state",), "state": ("params", "opt_state")}  # by `RunConfig.offload`


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
        Those with code of a user's own are traced anew: it may have changed under the same name.
        """
        mesh = make_mesh(config.mesh, devices)
        own = custom.loss is not None or custom.optimizer is not None or own_layers(config.model)
        return _checked(config, mesh, custom) if own else _kept(config, mesh)

    @classmethod
    def on_one_device(cls, config: RunConfig, device: Any = None) -> "Program":
        """Return the program on one device, by default the first, without offloading, whatever the config says."""
        return cls(
            dataclasses.replace(config, offload="none"), make_mesh(MeshConfig(), [device or jax.local_devices()[0]])
        )

    @functools.cached_property
    def attention_notes(self) -> list[str]:
        """What was said of attention when the train step was traced: which implementation runs, and why."""
        return []

    @functools.cached_property
    def model(self) -> Transformer:
        """The model that runs on the mesh: where rows are split, its attention is one that can do so."""
        return Transformer(context_model(self.config.model, self.mesh.shape["context"]))

    @functools.cached_property
    def pipeline(self) -> Pipeline | None:
        """The pipeline, where the mesh has several stages; else None."""
        stages, c = self.mesh.shape["pipeline"], self.config
        return None if stages == 1 else Pipeline(self.model, c.loss, Timetable(c.pipeline, stages, c.accumulate))

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shape, dtype and sharding of every leaf of the train state.

        Raise `ValueError` for what does not divide over the mesh, and for an optimizer with a random key in its state.
        """
        shapes = jax.eval_shape(self._fresh, jax.random.key(0))
        if self.custom.optimizer is None:
            found = shardings(shapes, self.mesh)
        elif (path := key_leaf(shapes.opt_state)) is not None:
            raise ValueError(
                f"the optimizer has a random key at {path}, which no checkpoint can hold; keep its jax.random.key_data"
            )
        else:
            opt_state = shardings(shapes.opt_state, self.mesh, unknown="whole")
            found = dataclasses.replace(shardings(shapes.replace(opt_state=()), self.mesh), opt_state=opt_state)
        for field in ON_HOST[self.config.offload]:
            found = dataclasses.replace(found, **{field: host_shardings(getattr(found, field))})
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, found
        )

    @functools.cached_property
    def abstract_batch(self) -> Batch:
        """Shape, dtype and sharding of a batch of the loader, with the rows of all processes."""
        data = self.config.data
        shape, rows = (data.batch_size, data.seq_len), batch_sharding(self.mesh)
        ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
        seen = jax.ShapeDtypeStruct(shape, bool, sharding=rows)
        batch = select_fields(Batch(ids, ids, ids, ids, ids, prefix=seen), data, self.custom.needs)
        return batch if self.order is None else dataclasses.replace(batch, positions=ids)

    def init(self) -> TrainState:
        """Return a fresh state, every leaf created with its sharding."""
        return self._init(jax.random.key(self.config.seed))

    def init_with(self, params: PyTree) -> TrainState:
        """Return the state before the first step of a run that begins with `params`, laid out as `abstract_state`."""
        opt_state = jax.jit(self._optimizer.init, out_shardings=self._shardings.opt_state)(params)
        step = jax.device_put(jnp.zeros((), jnp.int32), self._shardings.step)
        return TrainState(step=step, params=params, opt_state=opt_state)

    def gradient(self, params: PyTree, batch: Batch) -> tuple[tuple[Float[Array, ""], Metrics], PyTree]:
        """Return sums of loss and metrics over the targets of a batch, with the dropout of step 0, and the gradient."""
        with jax.set_mesh(self.mesh):
            return self._gradient(params, self.put(batch))

    @property
    def traced_gradient(self) -> Gradient:
        """The gradient as a function to trace: (params, batch, key) -> ((loss, sums), gradient)."""
        c, model = self.config, self.model
        if self.pipeline is not None:
            return self.pipeline.gradient
        loss = self.custom.loss_of(model) or make_loss(model, c.loss)
        independent = self.custom.loss is None and rows_independent(c.model, self.mesh.shape)
        near = make_gradient(loss, c.accumulate, independent)
        if c.offload != "state":
            return near

        def of_waiting(params: PyTree, batch: Batch, key: Key[Array, ""]) -> Any:
            # Only the compute dtype is copied to the device; there it becomes float32, in which gradients add up.
            return near(jax.tree.map(lambda x: x.astype(jnp.float32), cast(params, c.model.dtype)), batch, key)

        return of_waiting

    def updated(self, params: PyTree, opt_state: PyTree, gradient: PyTree, step: int) -> PyTree:
        """Return the parameters after the update of `step` by a mean gradient, finite or not; to be traced."""
        optimizer = optax.with_extra_args_support(self._optimizer)
        updates, _ = optimizer.update(gradient, opt_state, params, norm=optax.tree.norm(gradient))
        if self._schedule is not None:
            updates = optax.tree.scale(self._schedule(step), updates)
        return optax.apply_updates(params, updates)

    def train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Run one optimizer step; `state` is donated. It compiles once; a second compile is an error.

        `batch` holds the `rows` of this process. Raise `ValueError` for a batch that `check_batch` refuses, as do
        `gradient` and `score`.
        """
        with jax.set_mesh(self.mesh), heard(self.attention_notes.append):
            return self._train_step(state, self.put(batch))

    def lowered(self) -> jax.stages.Lowered:
        """Return the lowered train step, from shapes alone: the devices of the mesh need not exist."""
        state, batch = self.abstract_state, self.abstract_batch  # computed on existing devices, so before the mesh
        with jax.set_mesh(self.mesh):
            return self._train_step.lower(state, batch)

    def score(self, params: PyTree, batch: Batch) -> Scored:
        """Score every target of `batch`, which holds all rows; return NumPy arrays, the same in each process."""
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
        """The rows of a batch that this process's devices hold, which is all that it reads."""
        return rows_here(self.mesh, self.config.data.batch_size)

    @functools.cached_property
    def order(self) -> Int[np.ndarray, " L"] | None:
        """Which token of a row comes at each index on the mesh; None: the usual order."""
        return token_order(self.config.model, self.config.data.seq_len, self.mesh.shape["context"])

    def share(self, batch: Batch) -> Batch:
        """Return this process's rows of `batch`, which holds all."""
        return jax.tree.map(lambda x: x[self.rows], batch)

    def put(self, batch: Batch) -> Batch:
        """Return `batch`, the `rows` of this process, as global arrays on the mesh, tokens in `order`."""
        self._check(batch, len(self.rows))
        return self._spread(batch)

    def _spread(self, batch: Batch) -> Batch:
        batch = batch if self.order is None else reorder(batch, self.order)
        rows, sharding = range(self.config.data.batch_size), batch_sharding(self.mesh)

        def slice_of(x: np.ndarray, index: Any) -> np.ndarray:
            wanted = rows[index[0]]
            first = self.rows.index(wanted[0])
            return x[(slice(first, first + len(wanted)), *index[1:])]

        return jax.tree.map(
            lambda x: jax.make_array_from_callback((len(rows), *x.shape[1:]), sharding, functools.partial(slice_of, x)),
            batch,
        )

    def _check(self, batch: Batch, rows: int) -> None:
        check_batch(batch, self.config.model, rows, self.config.data.seq_len)

    @functools.cached_property
    def _optimizer(self) -> optax.GradientTransformation:
        return self.custom.optimizer or make_optimizer(self.config.optimizer)

    @property
    def _update(self) -> Update:
        """The update by the optimizer.

        Muon's iteration is expensive, and it has one moment less; an own optimizer may cost anything. With `offload`
        there is no room to hold what they computed.
        """
        c, near = self.config, self.config.offload == "none"
        own = self.custom.optimizer is not None
        update = make_update(self._optimizer, hold=near and (own or c.optimizer.name == "muon"))
        return native_adamw(c.optimizer, update) if near and not own and c.optimizer.name == "adamw" else update

    @property
    def _schedule(self) -> optax.Schedule | None:
        """The schedule; None: a caller's own optimizer has one inside."""
        c = self.config
        return make_schedule(c.optimizer, c.steps) if self.custom.optimizer is None else None

    @functools.cached_property
    def _shardings(self) -> TrainState:
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)

    @functools.cached_property
    def _fresh(self) -> Any:
        """`init_state`, which is traced once for the shapes of a state and for the program that makes one."""
        return jax.jit(functools.partial(init_state, self.model, self._optimizer), inline=True)

    @functools.cached_property
    def _init(self) -> Any:
        options = runtime.for_one_call(self.mesh.devices.flat[0].platform)
        return jax.jit(self._fresh, out_shardings=self._shardings, compiler_options=options)

    @functools.cached_property
    def _gradient(self) -> Any:
        key = jax.random.fold_in(jax.random.key(self.config.seed), 0)
        replicated = NamedSharding(self.mesh, PartitionSpec())
        return jax.jit(
            lambda params, batch: self.traced_gradient(params, batch, key),
            out_shardings=(replicated, self._shardings.params),
        )

    @functools.cached_property
    def _train_step(self) -> Any:
        c, experts = self.config, self.config.model.experts
        follow = experts is not None and experts.balance == "bias"
        step = make_train_step(
            self.traced_gradient,
            self._update,
            self._schedule,
            seed=c.seed,
            rebalance=functools.partial(rebalance, c.model) if follow else None,
        )
        replicated = NamedSharding(self.mesh, PartitionSpec())
        chex.clear_trace_counter()  # it counts by name, and every program of this process has a step with this name
        out_shardings = self._shardings, replicated
        return jax.jit(chex.assert_max_traces(step, n=1), donate_argnums=0, out_shardings=out_shardings)

    @functools.cached_property
    def _score(self) -> Any:
        c = self.config

        def scored(params: PyTree, batch: Batch) -> Scored:
            # In the microbatches of training: if those fit in memory, these do.
            if self.pipeline is not None:
                return self.pipeline.score(params, batch)
            one = functools.partial(score, self.model, c.loss.chunk, params)
            found = jax.lax.map(one, split_microbatches(batch, c.accumulate))
            return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(batch.targets.shape), found)

        return jax.jit(scored, out_shardings=NamedSharding(self.mesh, PartitionSpec()))


def _checked(config: RunConfig, mesh: Mesh, custom: Custom = Custom()) -> Program:
    check_mesh(config, mesh)
    check_attention(config, mesh)
    custom.check(config, mesh)
    return Program(config, mesh, custom)


_kept = functools.lru_cache(maxsize=4)(_checked)
