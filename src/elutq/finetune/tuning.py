"""The loop that block reconstruction and end-to-end tuning share: Adam on parts of a model."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from elutq.errors import TensorValueError
from elutq.finetune.options import TuneOptions
from elutq.finetune.quantized_linear import QuantizedLinear
from elutq.finetune.shards import local, whole
from elutq.world import World

#: Temperatures of soft codes in the first step and in the end; between them the logarithm falls by the cube
#: of the share of steps done: codes stay soft for long.
_TEMPERATURES = (0.2, 1e-3)
#: How far latent weights are pulled to their nearest levels in the last step, relative to their rate; in each
#: before, in proportion to the share of steps done. Without it those that fit best between two levels stay
#: there however steep the way from one to the other has become, and are rounded in the end.
_PULL = 0.2
#: With fewer bits it does not pay: the first block gains, all others lose a little (`docs/lab.md`).
_LEAST_BITS_PULLED = 3
#: What Adam keeps of each parameter.
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Tuning:
    """Trains parts of a model and keeps the best that was seen, where it began included.

    Args:
        parts: modules whose quantized linears, norms and biases are trained.
        windows: how many there are to train on, in all processes together.
        options: what to do.
        seed: of the order of the windows.
        world: the processes that share the work. They hold the same parameters and add up their gradients.

    Attributes:
        step: how many steps are done.
        start: loss on what is held out before the first step; None until it is known.
        best: the least since.
    """

    def __init__(
        self, parts: Iterable[nn.Module], windows: int, options: TuneOptions, seed: int, world: World
    ) -> None:
        self._options, self._world, self._windows, self._seed = options, world, windows, seed
        modules = [module for part in parts for module in part.modules()]
        self._linears = [module for module in modules if isinstance(module, QuantizedLinear)]
        self._groups = list(_groups(modules, options))
        self.parameters: list[nn.Parameter] = [p for group in self._groups for p in group["params"]]
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self._optimizer = torch.optim.Adam(self._groups, betas=(0.9, 0.98), fused=True)
        self._per_epoch = windows // options.batch
        self.steps = self._per_epoch * options.epochs
        self.step = 0
        self._norm = 0.0  # running mean of the gradients' norm
        self.start: float | None = None
        self.best = math.inf
        self._misses = 0
        self._kept: list[Tensor] = []

    def run(
        self,
        loss: Callable[[list[int]], Tensor],
        held_out: Callable[[], float],
        after_step: Callable[[], None] = lambda: None,
    ) -> None:
        """Train to the end, or until it no longer pays; leaves the best in place.

        Args:
            loss: the summed loss of this process's windows among the given ones.
            held_out: the mean loss of the windows held out, the same in all processes.
            after_step: called after each step; may save `state`.

        Raises:
            TensorValueError: the loss is not finite.
        """
        if self.start is None:
            self._check(held_out)
        interval = max(1, self.steps // self._options.checks)
        while self.step < self.steps and self._misses < self._options.patience:
            self._train(loss)
            if self.step % interval == 0 or self.step == self.steps:
                self._check(held_out)
            after_step()
        with torch.no_grad():
            for parameter, kept in zip(self.parameters, self._kept, strict=True):
                parameter.copy_(kept)
                parameter.requires_grad_(False)

    def _train(self, loss: Callable[[list[int]], Tensor]) -> None:
        options = self._options
        fraction = min(1.0, (self.step + 1) / (options.warmup + 1))
        fraction *= 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        for group in self._optimizer.param_groups:
            group["lr"] = group["rate"] * fraction
        self._optimizer.zero_grad()
        self._soften(self._temperature)
        torch.autograd.backward(loss(self._batch()) / options.batch)
        self._soften(0.0)
        # An expert that no token is routed to has no gradient, perhaps in this process alone.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        complete = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
        self._world.sum_(*complete)
        sharded = [local(gradient) for gradient in gradients if isinstance(gradient, DTensor)]
        for shard in sharded:
            shard.mul_(self._world.size)  # FSDP gives means
        of_shards = self._world.totals(_squares(sharded))[0] if sharded else 0.0
        norm = math.sqrt(_squares(complete) + of_shards)
        if not math.isfinite(norm):
            raise TensorValueError("finetuning diverged: gradients are not finite; use smaller rates")
        self._norm = 0.9 * self._norm + 0.1 * norm if self._norm else norm
        if norm > options.clip * self._norm:
            for gradient in gradients:
                gradient.mul_(options.clip * self._norm / norm)
        self._optimizer.step()
        pull = _PULL * self.step / self.steps * options.latent_rate * fraction
        for linear in self._linears:
            if linear.bits >= _LEAST_BITS_PULLED:
                linear.settle(pull)
        self.step += 1

    @property
    def _temperature(self) -> float:
        """Of the present step."""
        first, last = map(math.log, _TEMPERATURES)
        return math.exp(first + (last - first) * (self.step / self.steps) ** 3)

    def _soften(self, temperature: float) -> None:
        for linear in self._linears:
            linear.temperature = temperature

    def _batch(self) -> list[int]:
        """Windows of the present step: one of each stratum, window w being of stratum w % batch."""
        epoch, place = divmod(self.step, self._per_epoch)
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        batch = self._options.batch
        return [
            int(torch.randperm(self._per_epoch, generator=generator)[place]) * batch + stratum
            for stratum in range(batch)
        ]

    @torch.no_grad()
    def _check(self, held_out: Callable[[], float]) -> None:
        loss = held_out()
        if self.start is None:
            if not math.isfinite(loss):
                raise TensorValueError("finetuning cannot begin: the loss on what is held out is not finite")
            self.start = loss
        self._misses += 1
        if loss < self.best:
            self.best, self._misses = loss, 0
            self._kept = [parameter.detach().clone() for parameter in self.parameters]

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the work depends on, for torch.save; of sharded tensors, this shard."""
        return {
            "step": self.step,
            "parameters": [local(parameter.detach()) for parameter in self.parameters],
            "kept": [local(kept) for kept in self._kept],
            "moments": [
                [local(moments[name]) for name in _MOMENTS] for moments in self._optimizer.state.values()
            ],
            "numbers": (self._norm, self.start, self.best, self._misses),
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._kept = [parameter.detach().clone() for parameter in self.parameters]
        for kept, saved in zip(self._kept, state["kept"], strict=True):
            local(kept).copy_(saved)
        for parameter, saved, moments in zip(
            self.parameters, state["parameters"], state["moments"], strict=True
        ):
            local(parameter).copy_(saved)
            own = {"step": torch.tensor(float(state["step"]), device=parameter.device)}
            for name, values in zip(_MOMENTS, moments, strict=True):
                own[name] = torch.zeros_like(parameter)
                local(own[name]).copy_(values)
            self._optimizer.state[parameter] = own
        self.step = state["step"]
        self._norm, self.start, self.best, self._misses = state["numbers"]


def _squares(tensors: list[Tensor]) -> float:
    return sum(float(torch.linalg.vector_norm(tensor)) ** 2 for tensor in tensors)


def _groups(modules: Iterable[nn.Module], options: TuneOptions) -> Iterator[dict[str, Any]]:
    """Parameters with their rates."""
    for module in modules:
        if isinstance(module, QuantizedLinear):
            unit = module.unit
            yield {"params": [module.scales, module.zeros], "rate": options.scale_rate * unit}
            if module.latent is not None:
                yield {"params": [module.latent], "rate": options.latent_rate * unit}
        if options.vector_rate:
            vectors = [p for p in module.parameters(recurse=False) if p.ndim == 1]
            for vector in vectors:
                size = float(whole(vector.detach()).abs().mean())
                yield {"params": [vector], "rate": options.vector_rate * size}
