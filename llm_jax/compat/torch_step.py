"""Our train step in PyTorch, on the twin: the same loss, accumulation, clipping, AdamW and schedule."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int, PyTree
from torch import Tensor
from torch.nn import functional as F

from llm_jax.compat.torch_twin import Twin, load_parameters, parameters
from llm_jax.data.loader import IGNORE, Batch
from llm_jax.paths import first_match
from llm_jax.train.config import RunConfig
from llm_jax.train.optimizer import DECAYED


class TorchStep:
    """Train the twin of a config from our parameters; `rates` are the learning rates of the next steps."""

    def __init__(self, config: RunConfig, params: PyTree, rates: Iterable[float], *, compiled: bool = False) -> None:
        self.config, self.twin, self._rates = config, Twin(config.model), iter(rates)
        load_parameters(self.twin, params)
        self._loss = torch.compile(self.loss) if compiled else self.loss
        o, groups = config.optimizer, {True: [], False: []}
        for path, parameter in parameters(self.twin).items():
            groups[first_match(DECAYED, path)].append(parameter)
        self._optimizer = torch.optim.AdamW(
            [{"params": groups[True]}, {"params": groups[False], "weight_decay": 0.0}],
            betas=(o.b1, o.b2),
            eps=o.eps,
            weight_decay=o.weight_decay,
            fused=True,
        )

    def __call__(self, batch: Batch) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Take an optimizer step; return the loss, and the norm of the gradient before clipping."""
        clip, accumulate = self.config.optimizer.clip, self.config.accumulate
        tokens = max(1, int((batch.targets != IGNORE).sum()))
        rows = tensors(batch)
        self._optimizer.zero_grad(set_to_none=True)
        loss, loads = torch.zeros(()), []
        for first in range(accumulate):
            summed, served = self._loss(**{name: x[first::accumulate] for name, x in rows.items()})
            (summed / tokens).backward()
            loss += summed.detach() / tokens
            loads.append(served)

        gradients = [p.grad for p in self.twin.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        rate = float(next(self._rates))
        if not (loss.isfinite() and norm.isfinite()):
            return loss, norm
        if clip is not None and norm > clip:
            for gradient in gradients:
                gradient *= clip / norm
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._rebalance([torch.stack(of_layer).sum(0) for of_layer in zip(*loads, strict=True)])
        return loss, norm

    def loss(
        self,
        tokens: Int[Tensor, "B L"],
        targets: Int[Tensor, "B L"],
        **inputs: Tensor,
    ) -> tuple[Float[Tensor, ""], list[Float[Tensor, " E"]]]:
        """Return the summed loss of a microbatch, and the load of its experts; `inputs` are those of `Twin`."""
        terms, experts = self.config.loss, self.config.model.experts
        out = self.twin(tokens, **inputs)
        logits, targets = out.logits.flatten(0, 1), targets.flatten()
        smoothing, counted = terms.label_smoothing, targets != IGNORE
        loss = F.cross_entropy(logits, targets, ignore_index=IGNORE, label_smoothing=smoothing, reduction="sum")
        if terms.z_loss:
            loss = loss + terms.z_loss * (logits.logsumexp(-1).square() * counted).sum()
        if experts is not None:
            weight = experts.balance_weight if experts.balance == "loss" else 0.0
            costs = [weight * use.balance + experts.router_z_loss * use.z for use in out.uses]
            loss = loss + counted.sum() * sum(costs)
        return loss, [use.load for use in out.uses]

    @torch.no_grad()
    def _rebalance(self, loads: Sequence[Float[Tensor, " E"]]) -> None:
        """Move the bias of each router against the load of its experts, if `balance` is `bias`."""
        experts = self.config.model.experts
        if experts is None or experts.balance != "bias":
            return
        biases = [p for path, p in parameters(self.twin).items() if path.endswith("router_bias")]
        for bias, served in zip(biases, loads, strict=True):
            bias += experts.bias_rate * torch.sign(served.mean() - served)


def tensors(batch: Batch) -> dict[str, Tensor]:
    """Return the fields that a batch has, as tensors by name."""
    fields = {name: getattr(batch, name) for name in ("tokens", "targets", "segments", "positions", "prefix")}
    there = {name: torch.from_numpy(np.asarray(x)) for name, x in fields.items() if x is not None}
    return {name: x if x.dtype == torch.bool else x.long() for name, x in there.items()}
