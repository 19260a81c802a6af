"""A language-model library in JAX that you can read in an evening and train on a pod.

    import llm_jax as lj

    run = lj.fit(lj.recipe("quickstart", "steps=200"), "runs/a")
    run.metrics["loss"], run.evaluate().bits_per_byte
    run.generate(["def f("], temperature=0.5)

Every name is imported when it is first used: `import llm_jax` itself starts no JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

from llm_jax.runtime import guard

__version__ = "0.3.0"

guard()  # before JAX starts: a compiler with known faults does not run unguarded

if TYPE_CHECKING:
    from llm_jax.axes import MeshConfig as MeshConfig
    from llm_jax.compat.huggingface import export_hf as export_hf
    from llm_jax.compat.huggingface import import_hf as import_hf
    from llm_jax.config import replace as replace
    from llm_jax.data.config import DataConfig as DataConfig
    from llm_jax.data.loader import Batch as Batch
    from llm_jax.data.task import TaskConfig as TaskConfig
    from llm_jax.data.tokenizer import open_tokenizer as tokenizer  # noqa: F401
    from llm_jax.infer.generate import Sampler as Sampler
    from llm_jax.model.config import AttentionConfig as AttentionConfig
    from llm_jax.model.config import ModelConfig as ModelConfig
    from llm_jax.model.mixer import Mixer as Mixer
    from llm_jax.model.taps import capture as capture
    from llm_jax.model.taps import edit as edit
    from llm_jax.model.transformer import Transformer as Transformer
    from llm_jax.model.transformer import forward as forward
    from llm_jax.ops.attention import attention as attention
    from llm_jax.ops.config import Experts as Experts
    from llm_jax.ops.config import Rotary as Rotary
    from llm_jax.ops.config import Sparse as Sparse
    from llm_jax.ops.loss import IGNORE as IGNORE
    from llm_jax.ops.loss import cross_entropy as cross_entropy
    from llm_jax.ops.mask import Mask as Mask
    from llm_jax.ops.sampling import Sampling as Sampling
    from llm_jax.runs.evaluate import Evaluation as Evaluation
    from llm_jax.runs.fit import fit as fit
    from llm_jax.runs.fit import resume as resume
    from llm_jax.runs.refusals import Diverged as Diverged
    from llm_jax.runs.run import Run as Run
    from llm_jax.runs.signals import Stop as Stop
    from llm_jax.runs.start import config_from as config_from
    from llm_jax.runs.start import recipe as recipe
    from llm_jax.train.balance import expert_loss as expert_loss
    from llm_jax.train.config import LossConfig as LossConfig
    from llm_jax.train.config import OptimizerConfig as OptimizerConfig
    from llm_jax.train.config import PipelineConfig as PipelineConfig
    from llm_jax.train.config import RunConfig as RunConfig
    from llm_jax.train.step import TrainState as TrainState
    from llm_jax.train.step import forward_batch as forward_batch

# Where each public name lives, as `module:name`; the imports above say the same to editors and type checkers.
_HOMES = {
    # train and use
    "recipe": "runs.start:recipe",
    "config_from": "runs.start:config_from",
    "replace": "config:replace",
    "fit": "runs.fit:fit",
    "resume": "runs.fit:resume",
    "Run": "runs.run:Run",
    "Stop": "runs.signals:Stop",
    "Diverged": "runs.refusals:Diverged",
    "Evaluation": "runs.evaluate:Evaluation",
    # what decides a run
    "RunConfig": "train.config:RunConfig",
    "ModelConfig": "model.config:ModelConfig",
    "AttentionConfig": "model.config:AttentionConfig",
    "Sparse": "ops.config:Sparse",
    "Rotary": "ops.config:Rotary",
    "Experts": "ops.config:Experts",
    "DataConfig": "data.config:DataConfig",
    "TaskConfig": "data.task:TaskConfig",
    "OptimizerConfig": "train.config:OptimizerConfig",
    "LossConfig": "train.config:LossConfig",
    "MeshConfig": "axes:MeshConfig",
    "PipelineConfig": "train.config:PipelineConfig",
    # the model, as functions
    "Transformer": "model.transformer:Transformer",
    "forward": "model.transformer:forward",
    "forward_batch": "train.step:forward_batch",
    "expert_loss": "train.balance:expert_loss",
    "cross_entropy": "ops.loss:cross_entropy",
    "IGNORE": "ops.loss:IGNORE",
    "Batch": "data.loader:Batch",
    "TrainState": "train.step:TrainState",
    "Mixer": "model.mixer:Mixer",
    "attention": "ops.attention:attention",
    "Mask": "ops.mask:Mask",
    "capture": "model.taps:capture",
    "edit": "model.taps:edit",
    # text
    "tokenizer": "data.tokenizer:open_tokenizer",
    "Sampler": "infer.generate:Sampler",
    "Sampling": "ops.sampling:Sampling",
    # other worlds
    "import_hf": "compat.huggingface:import_hf",
    "export_hf": "compat.huggingface:export_hf",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        from llm_jax.config import nearest

        known = f"it has {', '.join(sorted(_HOMES))}"
        close = nearest(name, _HOMES)
        raise AttributeError(f"llm_jax has no {name!r}; {f'{close} ' * close.startswith('did')}{known}")
    module, _, attribute = _HOMES[name].partition(":")
    value = getattr(importlib.import_module(f"llm_jax.{module}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*_HOMES, "__version__"]
