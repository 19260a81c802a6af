"""`RunConfig`: everything that decides a run, with the checks across its fields."""

import dataclasses
import math
from typing import Literal

import numpy as np

from llm_jax.axes import MeshConfig
from llm_jax.config import check_ranges, check_types
from llm_jax.data.config import DataConfig
from llm_jax.model.config import ModelConfig
from llm_jax.notebook import html_table

SMALLEST, LARGEST = (float(number) for number in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The update rule and its schedule, in optimizer steps.

    Raise `ValueError` for values with which a finite gradient gives weights that are not finite in float32: b1 or b2 of
    1 divides by 0, and so does an eps of 0.

    Attributes:
      name: the update rule.
      learning_rate: the peak learning rate of the schedule.
      schedule: after a linear warm-up of `warmup_steps`, `cosine` and `linear` fall to `final_fraction` of the peak at
        the last step, `constant` stays, and `wsd` stays until the last `decay_fraction` of the run, then falls
        linearly.
      warmup_steps: steps over which the rate rises to the peak; fewer than `steps`.
      final_fraction: the rate at the last step, as a fraction of the peak.
      decay_fraction: the fraction of the run in which `wsd` falls.
      clip: the largest global norm of the gradient; None: no clipping.
      b1: decay of the mean of gradients, for AdamW and Lion. Adafactor has none, Muon's matrices a momentum of 0.95.
      b2: decay of the mean of squared gradients for AdamW, of the momentum for Lion.
      eps: added by AdamW to the root of the mean square, so that nothing divides by 0.
      weight_decay: how fast matrices and token tables shrink: by `learning_rate * weight_decay` of themselves a step.
    """

    name: Literal["adamw", "lion", "adafactor", "muon"] = "adamw"
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_steps: int = 100
    final_fraction: float = 0.1
    decay_fraction: float = 0.2
    clip: float | None = 1.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        check_types(self, "optimizer.")
        for name in ("learning_rate", "eps", "clip"):
            value, otherwise = getattr(self, name), "; None (none) is no clipping" * (name == "clip")
            if value is not None and not SMALLEST <= value <= LARGEST:
                raise ValueError(f"optimizer.{name}={value} must be a positive number of float32{otherwise}")
        for name in ("b1", "b2"):
            value = getattr(self, name)
            if not (value >= 0 and np.float32(value) < 1):
                raise ValueError(f"optimizer.{name}={value} must be at least 0, and less than 1 in float32; try 0.9")
        for name in ("final_fraction", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must lie between 0 and 1")
        if not 0 <= self.weight_decay <= LARGEST:
            raise ValueError(f"optimizer.weight_decay={self.weight_decay} must be 0, which is none, or positive")
        if self.warmup_steps < 0:
            raise ValueError(f"optimizer.warmup_steps={self.warmup_steps} is negative; 0 is no warm-up")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What is added to cross-entropy, and how much of it is computed at once. Raise `ValueError` for a bad number.

    Attributes:
      z_loss: weight of the squared log-partition function; 1e-4 where logits drift.
      label_smoothing: share of the target distribution that is uniform.
      chunk: tokens of a row whose logits are in memory at once; None: all of them.
    """

    z_loss: float = 0.0
    label_smoothing: float = 0.0
    chunk: int | None = None

    def __post_init__(self) -> None:
        check_types(self, "loss.")
        if not 0 <= self.z_loss < math.inf or not 0 <= self.label_smoothing < 1:
            raise ValueError(f"loss.z_loss must not be negative and loss.label_smoothing lie in [0, 1), got {self}")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"loss.chunk={self.chunk} must be at least 1; None (none) is no chunks")


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """How microbatches are scheduled on the stages of `mesh.pipeline`. Raise `ValueError` for `chunks` below 1.

    Attributes:
      schedule: `gpipe` runs all microbatches forward before the first goes backward, and holds them all (Huang et al.
        2019, arXiv:1811.06965); `1f1b` begins backward at once, and holds a few however many there are (Narayanan et
        al. 2021, arXiv:2104.04473).
      chunks: pieces of the model on a stage. More of them shrink the bubble and add messages.
    """

    schedule: Literal["gpipe", "1f1b"] = "1f1b"
    chunks: int = 1

    def __post_init__(self) -> None:
        check_types(self, "pipeline.")
        if self.chunks < 1:
            raise ValueError(f"pipeline.chunks={self.chunks} must be at least 1")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run. Two runs of one config on one machine are the same, bit for bit.

    Raise `ValueError` for a number out of its range, and for fields that don't fit together.

    Attributes:
      model: the transformer.
      data: the text, the tokenizer, and how batches are made of them.
      optimizer: the update rule and its schedule.
      loss: the loss that is minimized, and how it is computed.
      mesh: how devices share the work.
      pipeline: how the stages of `mesh.pipeline` share a step.
      offload: what of the stacked layers is kept in host memory and copied to the device a layer at a time: the
        moments of the optimizer, or the whole state, weights too.
      steps: optimizer steps, each over `data.batch_size` rows.
      accumulate: microbatches a step; each device holds the activations of one.
      evaluate_every: steps between evaluations on held-out text.
      evaluate_batches: batches of held-out text that an evaluation scores.
      checkpoint_every: steps between checkpoints.
      keep: how many of the last checkpoints are kept, besides the best by held-out loss.
      sample_every: steps between samples: a text is generated from each of `prompts`.
      prompts: what samples begin with; an empty prompt starts a document.
      patience: consecutive steps with a loss, gradient or update that is not finite, before the run stops.
      seed: seed of initial weights and dropout; `data.seed` is that of the order of rows.
      init_from: a run folder from which this run takes its initial weights, and nothing else.
      tensorboard: also write the metrics for TensorBoard, into the run folder.
    """

    model: ModelConfig
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    mesh: MeshConfig = MeshConfig()
    pipeline: PipelineConfig = PipelineConfig()
    offload: Literal["none", "optimizer", "state"] = "none"
    steps: int = 1000
    seed: int = 0
    accumulate: int = 1
    evaluate_every: int = 250
    evaluate_batches: int = 20
    checkpoint_every: int = 250
    keep: int = 2
    sample_every: int = 250
    prompts: tuple[str, ...] = ("",)
    patience: int = 10
    init_from: str | None = None
    tensorboard: bool = False

    def __post_init__(self) -> None:
        check_types(self, "")
        for name in (
            "steps",
            "accumulate",
            "evaluate_every",
            "evaluate_batches",
            "checkpoint_every",
            "sample_every",
            "keep",
            "patience",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        check_ranges(self, "")
        for name, value in (("seed", self.seed), ("data.seed", self.data.seed)):
            if not 0 <= value < 2**32:
                raise ValueError(f"{name}={value} must lie between 0 and {2**32 - 1}")
        if self.data.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate={self.accumulate} does not divide data.batch_size={self.data.batch_size}; "
                f"use data.batch_size={-(-self.data.batch_size // self.accumulate) * self.accumulate}"
            )
        if self.data.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"data.seq_len={self.data.seq_len} exceeds model.max_seq_len={self.model.max_seq_len}; set "
                f"data.seq_len={self.model.max_seq_len}, or of a new model model.max_seq_len={self.data.seq_len}"
            )
        self._check_scaling()
        if self.loss.chunk is not None and self.data.seq_len % self.loss.chunk:
            raise ValueError(f"loss.chunk={self.loss.chunk} does not divide data.seq_len={self.data.seq_len}")
        if self.offload != "none" and self.optimizer.name == "adafactor":
            raise ValueError(
                f"offload={self.offload} updates a layer at a time, and adafactor's state, which is small, is by "
                "parameter; use offload=none, or optimizer.name=adamw"
            )
        self._check_task()

    def _check_scaling(self) -> None:
        """Raise `ValueError` where a document's rotary angles would depend on the documents packed beside it."""
        rotary, longest = self.model.rotary, self.data.seq_len
        by_length = self.model.positions == "rotary" and rotary.scaling in ("dynamic", "longrope")
        if by_length and self.data.packing == "documents" and longest > (rotary.original_len or longest):
            raise ValueError(
                f"model.rotary.scaling={rotary.scaling} depends on the length of a text, and data.packing=documents "
                f"puts several into a row of data.seq_len={longest}; use data.seq_len={rotary.original_len}, within "
                "which nothing is scaled, or data.packing=windows"
            )

    def _check_task(self) -> None:
        task, n_classes = self.data.task, self.model.n_classes
        answers = len(task.answers) if task is not None and task.kind == "classify" else None
        if n_classes != answers:
            way = f"set model.n_classes={'none' if answers is None else answers}"
            if answers is None:
                way += ", or data.task.kind=classify"
            raise ValueError(f"model.n_classes={n_classes}, but the data has {answers or 'no'} classes; {way}")
        if n_classes is not None and self.prompts:
            raise ValueError(
                f"a classifier generates no text, and prompts={self.prompts} ask it to; set prompts=() (prompts=)"
            )

    def _repr_html_(self) -> str:
        return html_table(self)
