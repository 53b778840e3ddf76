"""Calibrated quantization of a model, block by block.

Two streams of activations go through the blocks side by side, on the same tokens: the full model's, and that
of the model as quantized so far. At every linear module they give its inputs x and x^, from which
`elutq.gptq` takes its Hessian and targets; what it returns takes the module's place before the next one is
calibrated (true-sequential).

    memory    two blocks, both streams [tokens, hidden_size], the inputs of o_proj or down_proj, one Hessian
    resuming  finished matrices are read back and both streams computed again, to the same bits

The experts of a mixture are calibrated one after the other, on the tokens that the quantized model routes to
them, each weighed by its squared routing weight, which is what its error counts. A few other tokens join in
at a small weight, so that an expert hardly ever chosen is calibrated too.
"""

import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elutq import hlq
from elutq.blocks import BlockReader, DecoderBlock
from elutq.errors import DiskSpaceError, SingularHessianError
from elutq.gptq import Metric, SolverOptions, solve
from elutq.packing import HlqMatrix
from elutq.scheme import QuantScheme

#: Tokens that go through a block together.
_BATCH_TOKENS = 4096
#: What tokens of other experts weigh together, relative to an expert's own, and how many there are at most.
_OTHERS_SHARE = 0.05
_OTHERS = 1024


class MatrixStore(Protocol):
    """Where quantized matrices go, and come from when work is resumed."""

    def __contains__(self, module: object) -> bool:
        """Whether a matrix is stored."""

    def get(self, module: str) -> HlqMatrix | None:
        """A matrix stored by this run or an earlier one."""

    def put(self, module: str, matrix: HlqMatrix, outcome: "Outcome", weight: NDArray[np.float32]) -> None:
        """Store a matrix, made from `weight`."""

    def outcome(self, module: str) -> "Outcome":
        """What was said of a stored matrix."""

    def flush(self) -> None:
        """Everything stored so far is to survive a kill."""


@dataclass(frozen=True)
class Outcome:
    """How the calibration of one module went.

    Attributes:
        output_error: relative squared error of its outputs on the calibration data; None for a fallback.
        tokens: calibration tokens that reached it.
        damp: relative damping that its Hessian needed.
        fallback: why it was quantized without data, if it was.
    """

    output_error: float | None
    tokens: int
    damp: float | None
    fallback: str | None = None


@dataclass(frozen=True)
class BlockOutcome:
    """Relative squared error of the residual stream after a block, on the calibration data."""

    index: int
    output_error: float


@dataclass(frozen=True)
class HeldOut:
    """Both models on the windows held out; nats per token."""

    full: float
    quantized: float
    kl: float
    tokens: int


class Activations:
    """A tensor per batch, in memory, or in a file that has no name and goes with this object.

    Args:
        folder: where to put the file; None keeps everything in memory.

    Raises:
        DiskSpaceError: the disk is full; by `self[batch] = tensor`.
    """

    def __init__(self, folder: Path | None) -> None:
        self._tensors: dict[int, Tensor] = {}  # of a batch, or without data if that is in the file
        self._places: dict[int, tuple[int, int]] = {}  # where in the file, and how much room is there
        self._end = 0
        self._file: int | None = None
        if folder is not None:
            with tempfile.TemporaryFile(dir=folder) as file:
                self._file = os.dup(file.fileno())
            weakref.finalize(self, os.close, self._file)

    def __setitem__(self, batch: int, tensor: Tensor) -> None:
        tensor = tensor.to("cpu")
        if self._file is None:
            self._tensors[batch] = tensor
            return
        self._tensors[batch] = tensor.to("meta")
        data = tensor.contiguous().view(torch.uint8).numpy().data.cast("B")
        if self._places.get(batch, (0, 0))[1] < data.nbytes:
            self._places[batch] = self._end, data.nbytes
            self._end += data.nbytes
        position = self._places[batch][0]
        while data:
            try:
                count = os.pwrite(self._file, data, position)
            except OSError as error:
                raise DiskSpaceError(
                    f"activations cannot be written: {error.strerror}; free some space, or calibrate on less"
                ) from error
            data, position = data[count:], position + count

    def __getitem__(self, batch: int) -> Tensor:
        if self._file is None:
            return self._tensors[batch]
        tensor = torch.empty_like(self._tensors[batch], device="cpu")
        data = tensor.view(torch.uint8).numpy().data.cast("B")
        position = self._places[batch][0]
        while data:
            count = os.preadv(self._file, [data], position)
            data, position = data[count:], position + count
        return tensor


class Moments:
    """E[x^ x^^T] and E[x x^^T], accumulated in float32.

    Args:
        size: in_features.
        cross: whether the second is wanted.
    """

    def __init__(self, size: int, cross: bool, device: torch.device) -> None:
        self.hessian = torch.zeros((size, size), device=device)
        self.cross = torch.zeros((size, size), device=device) if cross else None
        self.tokens = 0

    def add(self, full: Tensor, quantized: Tensor, weight: Tensor | None = None) -> None:
        """Count tokens: inputs [..., size] of both models, and what each token weighs, [tokens]."""
        x = quantized.reshape(-1, quantized.shape[-1]).float()
        weighted = x if weight is None else x * weight[:, None]
        self.hessian.addmm_(weighted.T, x)
        if self.cross is not None:
            self.cross.addmm_(full.reshape(x.shape).float().T, weighted)
        self.tokens += len(x)


class LayerwiseQuantizer:
    """Quantizes the blocks of a model with calibration data.

    Args:
        reader: of the full model.
        windows: int64 [windows, length], token ids.
        held_out: int64 [held, length], possibly none; not calibrated on.
        schemes: module name -> how it is quantized; block linears not in it stay as they are.
        store: takes the matrices.
        options: of the solver.
        device: where the work is done.
        offload: folder for activations; None keeps them in memory.
        embed_quantized: the embedding that the quantized model has, if it is another one.
        progress: called with the number of weights done and the module in work.
    """

    def __init__(
        self,
        reader: BlockReader,
        windows: NDArray[np.int64],
        held_out: NDArray[np.int64],
        schemes: Mapping[str, QuantScheme],
        store: MatrixStore,
        options: SolverOptions,
        *,
        device: torch.device,
        offload: Path | None = None,
        embed_quantized: Callable[[Tensor], Tensor] | None = None,
        progress: Callable[[int, str], None] = lambda done, module: None,
    ) -> None:
        self._reader, self._schemes, self._store = reader, schemes, store
        self._options, self._device, self._progress = options, device, progress
        per_batch = max(1, _BATCH_TOKENS // windows.shape[1])
        self._ids = [
            torch.from_numpy(part[i : i + per_batch])
            for part in (windows, held_out)
            for i in range(0, len(part), per_batch)
        ]
        self._calibrating = -(-len(windows) // per_batch)
        self._full, self._quantized, self._inputs = (Activations(offload) for _ in range(3))
        for batch, ids in enumerate(self._ids):
            self._full[batch] = reader.embed(ids)
            self._quantized[batch] = (embed_quantized or reader.embed)(ids)
        self._length = windows.shape[1]

    def block(self, index: int) -> BlockOutcome:
        """Quantize block `index` and move both streams past it. Blocks must come in order."""
        full, quantized = self._reader.block(index), self._reader.block(index)
        position = self._reader.positions(self._length), self._reader.mask(index, self._length)
        wanted = [name for name in quantized.linears if name in self._schemes]
        known = all(name in self._store for name in wanted)

        moments = None if known else self._moments(quantized, quantized.qkv[0])
        for batch, h_full, h_quantized in self._both():
            if moments and batch < self._calibrating:
                moments.add(full.attention_input(h_full), quantized.attention_input(h_quantized))
        self._replace(quantized, quantized.qkv, moments)

        moments = None if known else self._moments(quantized, quantized.o_proj)
        for batch, h_full, h_quantized in self._both():
            x_full = full.attend(full.attention_input(h_full), *position)
            x_quantized = quantized.attend(quantized.attention_input(h_quantized), *position)
            if moments and batch < self._calibrating:
                moments.add(x_full, x_quantized)
            self._full[batch] = full.add_attention(h_full, x_full)
            self._inputs[batch] = x_quantized
        self._replace(quantized, (quantized.o_proj,), moments)
        for batch, _, h_quantized in self._both():
            self._quantized[batch] = quantized.add_attention(h_quantized, self._input(batch))

        self._experts(full, quantized, known) if quantized.sparse else self._mlp(full, quantized, known)
        self._store.flush()
        error = norm = 0.0
        for batch, h_full, h_quantized in self._both():
            if batch < self._calibrating:
                error += float((h_quantized - h_full).square().sum(dtype=torch.float64))
                norm += float(h_full.square().sum(dtype=torch.float64))
        return BlockOutcome(index, error / norm)

    def _mlp(self, full: DecoderBlock, quantized: DecoderBlock, known: bool) -> None:
        (mlp_full,), (mlp_quantized,) = full.mlps, quantized.mlps
        gate, up, down = mlp_quantized.names
        moments = None if known else self._moments(quantized, gate)
        for batch, h_full, h_quantized in self._both():
            if moments and batch < self._calibrating:
                moments.add(full.mlp_input(h_full), quantized.mlp_input(h_quantized))
        self._replace(quantized, (gate, up), moments)

        moments = None if known else self._moments(quantized, down)
        for batch, h_full, h_quantized in self._both():
            x_full = mlp_full.hidden(full.mlp_input(h_full))
            x_quantized = mlp_quantized.hidden(quantized.mlp_input(h_quantized))
            if moments and batch < self._calibrating:
                moments.add(x_full, x_quantized)
            self._full[batch] = h_full + mlp_full.down(x_full)
            self._inputs[batch] = x_quantized
        self._replace(quantized, (down,), moments)
        for batch, _, h_quantized in self._both():
            self._quantized[batch] = h_quantized + mlp_quantized.down(self._input(batch))

    def _experts(self, full: DecoderBlock, quantized: DecoderBlock, known: bool) -> None:
        if not known:
            x_full, x_quantized = (
                torch.cat([block.mlp_input(h).flatten(0, 1) for h in self._calibrated(stream)])
                for block, stream in ((full, self._full), (quantized, self._quantized))
            )
            chosen, weights = quantized.route(x_quantized)
            for index, (mlp_full, mlp_quantized) in enumerate(zip(full.mlps, quantized.mlps, strict=True)):
                token, rank = torch.where(chosen == index)
                others = torch.where(~(chosen == index).any(1))[0]
                others = others[:: max(1, len(others) // _OTHERS)][:_OTHERS]
                own = weights[token, rank].float().square()
                share = _OTHERS_SHARE * (float(own.sum()) or 1.0) / max(len(others), 1)
                weight = torch.cat([own, own.new_full((len(others),), share)])
                token_and_others = torch.cat([token, others])
                inputs = x_full[token_and_others], x_quantized[token_and_others]
                gate, up, down = mlp_quantized.names
                moments = self._moments(quantized, gate)
                moments.add(*inputs, weight)
                moments.tokens = len(token)
                self._replace(quantized, (gate, up), moments)
                moments = self._moments(quantized, down)
                moments.add(mlp_full.hidden(inputs[0]), mlp_quantized.hidden(inputs[1]), weight)
                moments.tokens = len(token)
                self._replace(quantized, (down,), moments)
        else:
            self._replace(quantized, [name for mlp in quantized.mlps for name in mlp.names], None)
        for batch, h_full, h_quantized in self._both():
            self._full[batch] = h_full + full.mlp(full.mlp_input(h_full))
            self._quantized[batch] = h_quantized + quantized.mlp(quantized.mlp_input(h_quantized))

    def _moments(self, block: DecoderBlock, module: str) -> Moments:
        size = block.linears[module].in_features
        return Moments(size, self._options.target_share > 0, self._device)

    def _replace(self, block: DecoderBlock, modules: Sequence[str], moments: Moments | None) -> None:
        """Put quantized weights, new or stored, into linear modules that read the same inputs."""
        metric: Metric | SingularHessianError | None = None
        for module in modules:
            if module not in self._schemes:
                continue
            linear = block.linears[module]
            matrix = self._store.get(module)
            if matrix is None:
                assert moments is not None
                if metric is None:
                    metric = self._metric(moments)
                self._progress(0, module)
                weight = linear.weight.float()
                matrix, outcome = self._solve(module, weight, metric, moments.tokens)
                self._store.put(module, matrix, outcome, weight.cpu().numpy())
                self._progress(weight.numel(), module)
            linear.weight.data = torch.from_numpy(hlq.dequantize(matrix)).to(linear.weight)

    def _metric(self, moments: Moments) -> Metric | SingularHessianError:
        try:
            return Metric(moments.hessian, moments.cross, self._options)
        except SingularHessianError as error:
            return error

    def _solve(
        self, module: str, weight: Tensor, metric: Metric | SingularHessianError, tokens: int
    ) -> tuple[HlqMatrix, Outcome]:
        """Quantize a matrix with its metric; without data where there is none."""
        scheme = self._schemes[module]
        if isinstance(metric, SingularHessianError):
            values = weight.cpu().numpy()
            matrix = hlq.fit(values, scheme.bits, scheme.group_size, name=module)
            if scheme.param_bits == 8:
                matrix = hlq.to_8bit(values, matrix)
            return matrix, Outcome(None, tokens, None, str(metric))
        solution = solve(weight, metric, scheme, name=module)
        return solution.matrix, Outcome(solution.output_error, tokens, metric.damp)

    def _both(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Number and residual streams of every batch, on the device."""
        for batch in range(len(self._ids)):
            yield batch, self._full[batch].to(self._device), self._quantized[batch].to(self._device)

    def _calibrated(self, stream: Activations) -> Iterator[Tensor]:
        return (stream[batch].to(self._device) for batch in range(self._calibrating))

    def _input(self, batch: int) -> Tensor:
        return self._inputs[batch].to(self._device)

    def head_importance(self) -> NDArray[np.float32]:
        """Mean square of what the head reads, float32 [hidden_size]; after the last block."""
        total = torch.zeros(self._full[0].shape[-1], dtype=torch.float64)
        for hidden in self._calibrated(self._quantized):
            total += self._reader.head_input(hidden).square().sum(0, dtype=torch.float64).cpu()
        return (total / total.max()).float().numpy()

    def evaluate(self, head: NDArray[np.float32] | None = None) -> HeldOut | None:
        """Compare both models on the windows held out; after the last block.

        Args:
            head: float32 [vocab_size, hidden_size], of the quantized model if it is another one.

        Returns:
            None when no windows are held out.
        """
        full_head = self._reader.head()
        quantized_head = full_head if head is None else torch.from_numpy(head).to(full_head)
        tokens, nll_full, nll_quantized, kl = 0, 0.0, 0.0, 0.0
        for batch in range(self._calibrating, len(self._ids)):
            for i, ids in enumerate(self._ids[batch]):
                log_p = self._log_probabilities(self._full[batch][i], full_head)
                log_q = self._log_probabilities(self._quantized[batch][i], quantized_head)
                target = ids[1:, None].to(log_p.device)
                nll_full -= float(log_p.gather(1, target).sum())
                nll_quantized -= float(log_q.gather(1, target).sum())
                kl += float((log_p.exp() * (log_p - log_q)).sum())
                tokens += len(target)
        return HeldOut(nll_full / tokens, nll_quantized / tokens, kl / tokens, tokens) if tokens else None

    def _log_probabilities(self, hidden: Tensor, head: Tensor) -> Tensor:
        """Of the token after each of a window's tokens but the last, [length - 1, vocab_size]."""
        x = self._reader.head_input(hidden[:-1].to(self._device))
        return torch.log_softmax((x @ head.T).float(), dim=-1)
