"""Calibrated quantization of a model, block by block.

Two streams of activations go through the blocks side by side, on the same tokens: the full model's, and that
of the model as quantized so far. At every linear module they give its inputs x and x^, from which
`elutq.gptq` takes its Hessian and targets; what it returns takes the module's place before the next one is
calibrated (true-sequential).

    memory    two blocks, both streams [tokens, hidden_size], the inputs of o_proj or down_proj, one Hessian
    processes each has some windows and their streams; moments are summed over all of them, and each solves
              some rows of the modules that read the same inputs, or some of the experts
    resuming  finished matrices are read back and both streams computed again, to the same bits

The experts of a mixture are calibrated one after the other, on the tokens that the quantized model routes to
them, each weighed by its squared routing weight, which is what its error counts. A few other tokens join in
at a small weight, so that an expert hardly ever chosen is calibrated too.
"""

import os
import tempfile
import weakref
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from elutq.moments import Moments
from elutq.packing import HlqMatrix, join_rows
from elutq.precision import products_in_float32
from elutq.scheme import QuantScheme
from elutq.world import World

#: Tokens that go through a block together.
_BATCH_TOKENS = 4096
#: What tokens of other experts weigh together, relative to an expert's own, and how many there are at most.
_OTHERS_SHARE = 0.05
_OTHERS = 1024


#: Where activations are kept: in the memory of a device, or in a folder.
Place = torch.device | Path
MEMORY: Place = torch.device("cpu")


class MatrixStore(Protocol):
    """Where quantized matrices go, and come from when work is resumed; every process calls it alike."""

    def __contains__(self, module: object) -> bool:
        """Whether a matrix is stored."""

    def get(self, module: str) -> HlqMatrix | None:
        """A matrix stored by this run or an earlier one."""

    def put(
        self, module: str, matrix: HlqMatrix, outcome: "Outcome", squared_error: tuple[float, float]
    ) -> None:
        """Store a matrix, with squared error and squared norm of its weights."""

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
    """A tensor per batch, in a device's memory, or in a file that has no name and goes with this object.

    Args:
        place: the device that keeps them, or the folder of the file.
        rounded: the batches that are kept in bfloat16, see `may_round`; others are kept as they are.

    Raises:
        DiskSpaceError: the disk is full; by `self[batch] = tensor`.
    """

    def __init__(self, place: Place, rounded: Container[int] = ()) -> None:
        self._rounded = rounded
        self.device = place if isinstance(place, torch.device) else torch.device("cpu")
        self._tensors: dict[int, Tensor] = {}  # of a batch, or without data if that is in the file
        self._places: dict[int, tuple[int, int]] = {}  # where in the file, and how much room is there
        self._end = 0
        self._file: int | None = None
        if isinstance(place, Path):
            with tempfile.TemporaryFile(dir=place) as file:
                self._file = os.dup(file.fileno())
            weakref.finalize(self, os.close, self._file)

    def __setitem__(self, batch: int, tensor: Tensor) -> None:
        tensor = self._round(batch, tensor).to(self.device)
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

    def overwrite(self, batch: int, tensor: Tensor) -> None:
        """Store a copy where the batch's tensor is, which nobody else may hold; memory stays in one piece."""
        kept, tensor = self._tensors.get(batch), self._round(batch, tensor)
        if (
            self._file is None
            and kept is not None
            and (kept.shape, kept.dtype) == (tensor.shape, tensor.dtype)
        ):
            kept.copy_(tensor)
        else:
            self[batch] = tensor.clone()

    def _round(self, batch: int, tensor: Tensor) -> Tensor:
        return tensor.bfloat16() if batch in self._rounded else tensor

    def on(self, batch: int, device: torch.device) -> Tensor:
        """A batch's tensor on a device; what was rounded, in float32."""
        tensor = self[batch].to(device)
        return tensor.float() if batch in self._rounded else tensor

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


def may_round(device: torch.device) -> bool:
    """Whether activations of text that is learned from are kept in bfloat16: on GPUs.

    It halves their memory and the way to it. Models run in bfloat16 there, and the streams of both models are
    rounded alike, by far less than quantization changes them. Text to be judged by is kept in float32.
    """
    return device.type == "cuda"


@dataclass(frozen=True)
class _Rows:
    """Some rows of a module, quantized.

    Attributes:
        matrix: the rows.
        outcome: of them, but for the output error.
        output_error: squared error and squared norm of their outputs, up to a factor; None for a fallback.
        squared_error: the same of their weights.
    """

    matrix: HlqMatrix
    outcome: Outcome
    output_error: tuple[float, float] | None
    squared_error: tuple[float, float]


@dataclass(frozen=True)
class _Routed:
    """The tokens that calibrate an expert.

    Attributes:
        tokens: which of this process's; those routed to it come first.
        weight: what each counts.
        routed: how many are routed to it, in all processes.
    """

    tokens: Tensor
    weight: Tensor
    routed: int


class LayerwiseQuantizer:
    """Quantizes the blocks of a model with calibration data.

    Args:
        reader: of the full model.
        windows: int64 [windows, length], token ids.
        held_out: int64 [held, length], possibly none; not calibrated on.
        schemes: module name -> how it is quantized; block linears not in it stay as they are.
        store: takes the matrices.
        options: of the solver.
        world: the processes that share the work; every one of them needs a window to calibrate on.
        place: where activations are kept.
        threads: of the data-free solver; all CPUs by default.
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
        world: World,
        place: Place = MEMORY,
        threads: int | None = None,
        embed_quantized: Callable[[Tensor], Tensor] | None = None,
        progress: Callable[[int, str], None] = lambda done, module: None,
    ) -> None:
        self._reader, self._schemes, self._store = reader, schemes, store
        self._options, self._progress = options, progress
        self._world, self._device, self._threads = world, world.device, threads
        per_batch = max(1, _BATCH_TOKENS // windows.shape[1])
        mine, mine_held_out = (
            part[share.start : share.stop]
            for part, share in ((part, world.share(len(part))) for part in (windows, held_out))
        )
        self._ids = [
            torch.from_numpy(part[i : i + per_batch])
            for part in (mine, mine_held_out)
            for i in range(0, len(part), per_batch)
        ]
        self._calibrating = -(-len(mine) // per_batch)
        rounded = range(self._calibrating if may_round(self._device) else 0)
        self._full, self._quantized, self._inputs = (Activations(place, rounded) for _ in range(3))
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
        self._calibrate(quantized, quantized.qkv, moments)

        moments = None if known else self._moments(quantized, quantized.o_proj)
        for batch, h_full, h_quantized in self._both():
            x_full = full.attend(full.attention_input(h_full), *position)
            x_quantized = quantized.attend(quantized.attention_input(h_quantized), *position)
            if moments and batch < self._calibrating:
                moments.add(x_full, x_quantized)
            self._full[batch] = full.add_attention(h_full, x_full)
            self._inputs[batch] = x_quantized
        self._calibrate(quantized, (quantized.o_proj,), moments)
        for batch, _, h_quantized in self._both():
            self._quantized[batch] = quantized.add_attention(h_quantized, self._input(batch))

        self._experts(full, quantized, known) if quantized.sparse else self._mlp(full, quantized, known)
        self._store.flush()
        error = norm = 0.0
        for batch, h_full, h_quantized in self._both():
            if batch < self._calibrating:
                error += float((h_quantized - h_full).square().sum(dtype=torch.float64))
                norm += float(h_full.square().sum(dtype=torch.float64))
        error, norm = self._world.totals(error, norm)
        return BlockOutcome(index, error / norm)

    def _mlp(self, full: DecoderBlock, quantized: DecoderBlock, known: bool) -> None:
        (mlp_full,), (mlp_quantized,) = full.mlps, quantized.mlps
        gate, up, down = mlp_quantized.names
        moments = None if known else self._moments(quantized, gate)
        for batch, h_full, h_quantized in self._both():
            if moments and batch < self._calibrating:
                moments.add(full.mlp_input(h_full), quantized.mlp_input(h_quantized))
        self._calibrate(quantized, (gate, up), moments)

        moments = None if known else self._moments(quantized, down)
        for batch, h_full, h_quantized in self._both():
            x_full = mlp_full.hidden(full.mlp_input(h_full))
            x_quantized = mlp_quantized.hidden(quantized.mlp_input(h_quantized))
            if moments and batch < self._calibrating:
                moments.add(x_full, x_quantized)
            self._full[batch] = h_full + mlp_full.down(x_full)
            self._inputs[batch] = x_quantized
        self._calibrate(quantized, (down,), moments)
        for batch, _, h_quantized in self._both():
            self._quantized[batch] = h_quantized + mlp_quantized.down(self._input(batch))

    def _experts(self, full: DecoderBlock, quantized: DecoderBlock, known: bool) -> None:
        if known:
            self._replace(quantized, {name: slice(0) for mlp in quantized.mlps for name in mlp.names}, None)
        else:
            self._calibrate_experts(full, quantized)
        for batch, h_full, h_quantized in self._both():
            self._full[batch] = h_full + full.mlp(full.mlp_input(h_full))
            self._quantized[batch] = h_quantized + quantized.mlp(quantized.mlp_input(h_quantized))

    def _calibrate_experts(self, full: DecoderBlock, quantized: DecoderBlock) -> None:
        """Quantize experts, as many at a time as there are processes, each of which solves one."""
        x_full, x_quantized = (
            torch.cat([block.mlp_input(h).flatten(0, 1) for h in self._calibrated(stream)])
            for block, stream in ((full, self._full), (quantized, self._quantized))
        )
        routed = self._route(*quantized.route(x_quantized), len(quantized.mlps))
        count, size, rank = len(quantized.mlps), self._world.size, self._world.rank
        for first in range(0, count, size):
            together = range(first, min(first + size, count))
            for names in (slice(0, 2), slice(2, 3)):  # gate and up, then down
                rows: dict[str, slice] = {}
                own = None
                for index in together:
                    mlps, tokens = (full.mlps[index], quantized.mlps[index]), routed[index].tokens
                    modules = mlps[1].names[names]
                    read_full, read_quantized = x_full[tokens], x_quantized[tokens]
                    if names.start:
                        read_full, read_quantized = mlps[0].hidden(read_full), mlps[1].hidden(read_quantized)
                    moments = self._moments(quantized, modules[0])
                    moments.add_weighted(read_full, read_quantized, routed[index].weight)
                    moments.sum_over(self._world)
                    moments.tokens = routed[index].routed
                    mine = index - first == rank
                    rows |= {name: slice(0, quantized.linears[name].out_features * mine) for name in modules}
                    own = moments if mine else own
                self._replace(quantized, rows, own)

    def _route(self, chosen: Tensor, weights: Tensor, experts: int) -> list[_Routed]:
        """The tokens for each expert, from the experts of each token and their weights.

        Of the tokens of other experts, at most `_OTHERS` join in, at equal distances among those of all
        processes.
        """
        found, counts = [], []
        for index in range(experts):
            token, rank = torch.where(chosen == index)
            others = torch.where(~(chosen == index).any(1))[0]
            own = weights[token, rank].float().square()
            found.append((token, own, others))
            counts.append((len(token), float(own.sum()), len(others)))
        everybody = np.array(self._world.gather_objects(counts))  # [processes, experts, 3]
        routed = []
        for (token, own, others), before, all_ in zip(
            found, everybody[: self._world.rank].sum(0), everybody.sum(0), strict=True
        ):
            step = max(1, int(all_[2]) // _OTHERS)
            earlier = int(before[2])
            others = others[-earlier % step :: step][: max(0, _OTHERS - -(-earlier // step))]
            joining = min(-(-int(all_[2]) // step), _OTHERS)
            share = _OTHERS_SHARE * (float(all_[1]) or 1.0) / max(joining, 1)
            weight = torch.cat([own, own.new_full((len(others),), share)])
            routed.append(_Routed(torch.cat([token, others]), weight, int(all_[0])))
        return routed

    def _moments(self, block: DecoderBlock, module: str) -> Moments:
        size = block.linears[module].in_features
        return Moments(size, self._options.target_share > 0, self._device)

    def _calibrate(self, block: DecoderBlock, modules: Sequence[str], moments: Moments | None) -> None:
        """Quantize modules that read the same inputs, each process some of their rows.

        Args:
            block: the modules' block.
            modules: their names.
            moments: of this process's inputs; None where all modules are stored.
        """
        if moments is not None:
            moments.sum_over(self._world)
        wanted = [module for module in modules if module in self._schemes]
        self._replace(block, self._share(block, wanted), moments)

    def _replace(self, block: DecoderBlock, rows: Mapping[str, slice], moments: Moments | None) -> None:
        """Put quantized weights, new or stored, into linear modules.

        Args:
            block: the modules' block.
            rows: names of the modules, and which of their rows this process solves.
            moments: of the inputs of these rows, in all processes; None where there are none.
        """
        wanted = [module for module in rows if module in self._schemes]
        new = [module for module in wanted if module not in self._store]
        solved = self._solve(block, {module: rows[module] for module in new}, moments)
        if self._world.size > 1:
            solved = iter(list(solved))  # processes wait for each other only when all have done their share
        for module in wanted:
            linear = block.linears[module]
            if module in new:
                parts = [part for part in self._world.gather_objects(next(solved)) if part is not None]
                matrix = join_rows([part.matrix for part in parts])
                error = _sum_pairs([part.squared_error for part in parts])
                self._store.put(module, matrix, _outcome(parts), error)
                self._progress(linear.weight.numel(), module)
            else:
                stored = self._store.get(module)
                assert stored is not None
                matrix = stored
            linear.weight.data = torch.from_numpy(hlq.dequantize(matrix, threads=self._threads)).to(
                linear.weight
            )

    def _share(self, block: DecoderBlock, modules: Sequence[str]) -> dict[str, slice]:
        """Rows of modules with equally long rows that this process solves; whole modules where possible."""
        counts = [block.linears[module].out_features for module in modules]
        mine = self._world.share(sum(counts))
        rows, first = {}, 0
        for module, count in zip(modules, counts, strict=True):
            rows[module] = slice(max(mine.start - first, 0), max(min(mine.stop - first, count), 0))
            first += count
        return rows

    def _solve(
        self, block: DecoderBlock, rows: Mapping[str, slice], moments: Moments | None
    ) -> Iterator[_Rows | None]:
        """Quantize rows of modules that read the same inputs; None for a module without rows."""
        metric: Metric | SingularHessianError | None = None
        for module, some in rows.items():
            if some.start >= some.stop:
                yield None
                continue
            assert moments is not None
            if metric is None:
                metric = self._metric(moments)
            self._progress(0, module)
            yield self._solve_rows(module, block.linears[module].weight[some].float(), metric, moments.tokens)

    def _metric(self, moments: Moments) -> Metric | SingularHessianError:
        try:
            return Metric(moments.hessian, moments.cross, self._options)
        except SingularHessianError as error:
            return error

    def _solve_rows(
        self, module: str, weight: Tensor, metric: Metric | SingularHessianError, tokens: int
    ) -> _Rows:
        """Quantize rows with their metric; without data where there is none."""
        scheme, threads = self._schemes[module], self._threads
        values = weight.cpu().numpy()
        error = None
        if isinstance(metric, SingularHessianError):
            matrix = hlq.fit(values, scheme.bits, scheme.group_size, threads=threads, name=module)
            if scheme.param_bits == 8:
                matrix = hlq.to_8bit(values, matrix, threads=threads)
            outcome = Outcome(None, tokens, None, str(metric))
        else:
            solution = solve(weight, metric, scheme, threads=threads, name=module)
            matrix, error = solution.matrix, (solution.error, solution.norm)
            outcome = Outcome(None, tokens, metric.damp)
        return _Rows(matrix, outcome, error, hlq.squared_error(values, matrix, threads=threads))

    def _both(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Number and residual streams of every batch, on the device."""
        for batch in range(len(self._ids)):
            yield batch, self._full.on(batch, self._device), self._quantized.on(batch, self._device)

    def _calibrated(self, stream: Activations) -> Iterator[Tensor]:
        return (stream.on(batch, self._device) for batch in range(self._calibrating))

    def _input(self, batch: int) -> Tensor:
        return self._inputs.on(batch, self._device)

    def head_importance(self) -> NDArray[np.float32]:
        """Mean square of what the head reads, float32 [hidden_size]; after the last block."""
        total = torch.zeros(self._full[0].shape[-1], dtype=torch.float64)
        for hidden in self._calibrated(self._quantized):
            total += self._reader.head_input(hidden).square().sum(0, dtype=torch.float64).cpu()
        self._world.sum_(total)
        return (total / total.max()).float().numpy()

    @products_in_float32()
    def evaluate(self, head: NDArray[np.float32] | None = None) -> HeldOut | None:
        """Compare both models on the windows held out; after the last block.

        Args:
            head: float32 [vocab_size, hidden_size], of the quantized model if it is another one.

        Returns:
            None when no windows are held out.
        """
        full_head = self._reader.head()
        quantized_head = full_head if head is None else torch.from_numpy(head).to(full_head)
        tokens = nll_full = nll_quantized = kl = 0.0
        for batch in range(self._calibrating, len(self._ids)):
            for i, ids in enumerate(self._ids[batch]):
                log_p = self._log_probabilities(self._full[batch][i], full_head)
                log_q = self._log_probabilities(self._quantized[batch][i], quantized_head)
                target = ids[1:, None].to(log_p.device)
                nll_full -= float(log_p.gather(1, target).sum())
                nll_quantized -= float(log_q.gather(1, target).sum())
                kl += float((log_p.exp() * (log_p - log_q)).sum())
                tokens += len(target)
        tokens, *sums = self._world.totals(tokens, nll_full, nll_quantized, kl)
        if not tokens:
            return None
        nll_full, nll_quantized, kl = (total / tokens for total in sums)
        return HeldOut(nll_full, nll_quantized, kl, int(tokens))

    def _log_probabilities(self, hidden: Tensor, head: Tensor) -> Tensor:
        """Of the token after each of a window's tokens but the last, [length - 1, vocab_size]."""
        x = self._reader.head_input(hidden[:-1].to(self._device))
        return torch.log_softmax((x @ head.T).float(), dim=-1)


def _outcome(parts: Sequence[_Rows]) -> Outcome:
    """Of a module, from those of its rows."""
    outcome = parts[0].outcome
    pairs = [part.output_error for part in parts if part.output_error is not None]
    if not pairs:
        return outcome
    error, norm = _sum_pairs(pairs)
    return replace(outcome, output_error=error / norm if norm > 0 else error)


def _sum_pairs(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return sum(first for first, _ in pairs), sum(second for _, second in pairs)
