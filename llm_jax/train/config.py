"""`RunConfig`: everything that decides a run, with the checks across its fields."""

import dataclasses
from typing import Literal

from llm_jax.config import check_ranges, check_types
from llm_jax.data.config import DataConfig
from llm_jax.model.config import ModelConfig
from llm_jax.notebook import html_table
from llm_jax.sharding import MeshConfig
from llm_jax.train.optimizer import OptimizerConfig
from llm_jax.train.step import LossConfig
from llm_jax.train.timetable import PipelineConfig


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
