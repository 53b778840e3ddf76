"""What finetuning does, and how much of it: settings without torch."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elutq.errors import InvalidArgumentError

#: In the order in which they run.
STAGES = ("block", "e2e")
OBJECTIVES = ("kl", "lm")
EFFORTS = ("fast", "balanced", "best")
#: What the result does not depend on.
_NO_MATTER = ("save_seconds", "shard")


@dataclass(frozen=True)
class TuneOptions:
    """How a stage is tuned. `docs/accuracy.md` has what the defaults rest on.

    Rates are steps of Adam (arXiv 1412.6980) relative to the size of what they move: for latent weights,
    scales and zeros the mean distance between levels in their matrix, for norms and biases their mean
    magnitude. They follow half a cosine down to 0.

    Attributes:
        epochs: how often each window is seen.
        batch: windows in a step.
        latent_rate: of latent weights, and so of codes; 0 leaves codes as they are.
        scale_rate: of scales and zeros.
        vector_rate: of norms and biases; 0 leaves them as they are.
        warmup: steps until the rates are reached.
        clip: largest norm of all gradients together, relative to a running mean of it.
        checks: how often the windows held out are consulted.
        patience: checks in a row without a new best that end the work early. Codes are judged as they will
            be stored, while they are trained they become hard only in the end: with a `latent_rate`, fewer
            than `checks` will end it too early.
        full_share: share of windows whose inputs are the full model's instead of the quantized one's; of
            block reconstruction alone.
        uniform: keep uniform grids uniform, to compare with.
    """

    epochs: int
    batch: int = 4
    latent_rate: float = 0.0
    scale_rate: float = 2e-3
    vector_rate: float = 1e-3
    warmup: int = 20
    clip: float = 3.0
    checks: int = 8
    patience: int = 8
    full_share: float = 0.0
    uniform: bool = False

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.batch < 1 or self.checks < 1:
            raise InvalidArgumentError(
                f"finetuning needs epochs of at least 0, and batches and checks of at least 1, not "
                f"{self.epochs}, {self.batch} and {self.checks}"
            )

    def check_processes(self, count: int) -> None:
        """Each of `count` processes has a window of every batch.

        Raises:
            InvalidArgumentError: there are too many.
        """
        if count > self.batch:
            raise InvalidArgumentError(
                f"{count} processes cannot share batches of {self.batch} windows; take larger batches"
            )


@dataclass(frozen=True)
class FinetuneOptions:
    """The stages after quantization.

    Attributes:
        stages: some of `STAGES`, in that order.
        samples: windows of text to train on.
        block: of block reconstruction.
        e2e: of end-to-end tuning.
        objective: of end-to-end tuning: "kl", from the full model, or "lm", the text's likelihood.
        shard: whether end-to-end tuning spreads the model over the processes (FSDP2, arXiv 2304.11277), where
            one device cannot hold it; with one process, nothing.
        save_seconds: how often a long stage saves what a killed run goes on from.
    """

    stages: tuple[str, ...] = STAGES
    samples: int = 512
    block: TuneOptions = TuneOptions(epochs=2, latent_rate=0.07)
    e2e: TuneOptions = TuneOptions(epochs=1)
    objective: str = "kl"
    shard: bool = False
    save_seconds: float = 60.0

    def __post_init__(self) -> None:
        if not self.stages or list(self.stages) != [stage for stage in STAGES if stage in self.stages]:
            raise InvalidArgumentError(
                f"finetune must be some of {', '.join(STAGES)}, in this order, not {','.join(self.stages)!r}"
            )
        if self.objective not in OBJECTIVES:
            raise InvalidArgumentError(
                f"the objective must be {' or '.join(OBJECTIVES)}, not {self.objective!r}"
            )
        if self.samples < self.batch:
            raise InvalidArgumentError(f"finetune_samples must be at least {self.batch}, not {self.samples}")

    @property
    def batch(self) -> int:
        """Windows that a stage needs at least."""
        return max(self.tuning(stage).batch for stage in self.stages)

    @property
    def record(self) -> dict[str, Any]:
        """What the result depends on, ready for JSON."""
        known = {name: value for name, value in asdict(self).items() if name not in _NO_MATTER}
        return {name: value for name, value in known.items() if name not in STAGES or name in self.stages}

    def tuning(self, stage: str) -> TuneOptions:
        """Options of a stage."""
        options: TuneOptions = getattr(self, stage)
        return options


@dataclass(frozen=True)
class TuningText:
    """Windows of token ids, int64 [windows, length] each.

    Attributes:
        train: to train on.
        held_out: that decide which state of a model is the best.
        report: that neither sees, for the report.
    """

    train: NDArray[np.int64]
    held_out: NDArray[np.int64]
    report: NDArray[np.int64]


def choose(
    effort: str | None, stages: Sequence[str] | FinetuneOptions | None, samples: int | None
) -> FinetuneOptions | None:
    """What is finetuned, and how; None: nothing.

    Args:
        effort: one of `EFFORTS`: nothing; both stages; both on four times as much text, with codes trained
            end to end.
        stages: some of `STAGES`, or all options, in place of what the effort says.
        samples: windows, likewise.

    Raises:
        InvalidArgumentError: an option is not supported, or contradicts another.
    """
    if effort not in (None, *EFFORTS):
        raise InvalidArgumentError(f"effort must be one of {', '.join(EFFORTS)}, not {effort!r}")
    if stages is None and effort in (None, "fast"):
        if samples is not None:
            raise InvalidArgumentError("finetune_samples has no effect without finetuning")
        return None
    if isinstance(stages, FinetuneOptions):
        options = stages
    else:
        options = FinetuneOptions()
        if effort == "best":
            options = replace(
                options,
                samples=2048,
                block=replace(options.block, latent_rate=0.05),
                e2e=replace(options.e2e, epochs=2, latent_rate=0.02),
            )
        if stages is not None:
            options = replace(options, stages=tuple(stages))
    return options if samples is None else replace(options, samples=samples)
