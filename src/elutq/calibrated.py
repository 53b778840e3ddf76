"""The calibrated half of the pipeline: joins checkpoint, calibration text and writer to the block walk."""

import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elutq import hlq
from elutq.architectures import EMBEDDING, HEAD, EngineConfig, block_linears
from elutq.blocks import BlockReader, WeightSource
from elutq.calibration import Calibration
from elutq.checkpoint import CheckpointWriter, Part
from elutq.errors import InsufficientMemoryError, InvalidArgumentError
from elutq.gptq import GPTQ, PUBLISHED, SolverOptions
from elutq.layerwise import BlockOutcome, HeldOut, LayerwiseQuantizer, Outcome
from elutq.packing import HlqMatrix
from elutq.world import World

METHODS: Mapping[str, SolverOptions] = {
    "hlq-gptq": SolverOptions(),
    "gptq": GPTQ,
    "ao-gptq": PUBLISHED,
}
#: `hlq-gptq` in a hurry.
FAST = SolverOptions(rounds=2)

# What the estimates rest on: rough figures of two cores (`benchmarks/quantize_memory.py` shows what is true).
_PROBE = 1536  # side of the matrices that are multiplied to see how fast that is
_COLUMN_SECONDS = 90e-6  # one column of up to 4096 rows in one pass over the codes
BASE_BYTES = 700 << 20  # Python, torch and transformers themselves
_SOLVER_COPIES = 8  # float32 arrays of a piece of a matrix that the solver holds


@dataclass(frozen=True)
class Estimate:
    """What calibrated quantization will need, roughly: time, memory, and disk for activations."""

    seconds: float
    memory_bytes: int
    offload_bytes: int


class CalibratedJob:
    """Quantizes the block linears of a model; all processes of `world` together, which call it alike.

    Args:
        source: the full model.
        parts: of the model to be written; those of blocks that have a scheme are quantized.
        writer: takes the matrices, and gives back those of an earlier run; of the first process, others have
            None.
        calibration: token windows.
        options: of the solver.
        world: the processes that share the work, and their devices.
        offload: folder for activations, made if need be; None keeps them in memory.
        threads: of each process; by default its share of the CPUs.
        progress: called with weights done and the module in work.

    Attributes:
        blocks: outcome of each block, once `run` returns.
        estimate: what it will need, in each process.

    Raises:
        InvalidArgumentError: there are more processes than windows to calibrate on.
        InsufficientMemoryError: it would not fit into the memory that is free; says what would help.
    """

    def __init__(
        self,
        source: WeightSource,
        parts: Sequence[Part],
        writer: CheckpointWriter | None,
        calibration: Calibration,
        options: SolverOptions,
        *,
        world: World,
        offload: Path | None,
        threads: int | None,
        progress: Callable[[int, str], None],
    ) -> None:
        self._threads = threads or world.threads
        in_blocks = {linear.name for linear in block_linears(source.engine)}
        self._schemes = {part.name: part.scheme for part in parts if part.scheme and part.name in in_blocks}
        self._engine = source.engine
        self._store = _Store(world, writer, {part.name: part for part in parts})
        self.blocks: list[BlockOutcome] = []
        with torch_threads(self._threads):
            self.estimate = estimate(source.engine, calibration, options, world, offload is not None)
        world.everywhere(lambda: self._check(calibration, world, offload))
        embedding = self._store.get(EMBEDDING)
        self._walk = LayerwiseQuantizer(
            BlockReader(source, world.device),
            calibration.token_ids,
            calibration.held_out,
            self._schemes,
            self._store,
            options,
            world=world,
            offload=offload,
            threads=self._threads,
            embed_quantized=None if embedding is None else embedder(embedding, world.device),
            progress=progress,
        )

    def _check(self, calibration: Calibration, world: World, offload: Path | None) -> None:
        windows = len(calibration.token_ids)
        if windows < world.size:
            raise InvalidArgumentError(
                f"{world.size} processes cannot share {windows} calibration windows; take more windows"
            )
        check_memory(self.estimate, offload is not None, world.device, world.local_size)
        if offload is not None:
            offload.mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        """Quantize every block, or read it back if an earlier run did."""
        with self._working():
            for index in range(self._engine.num_hidden_layers):
                self.blocks.append(self._walk.block(index))

    def outcomes(self) -> dict[str, Outcome]:
        """How each module went; for the first process."""
        return {name: self._store.outcome(name) for name in self._schemes}

    def warnings(self) -> list[str]:
        """What is to be known of the calibration; for the first process."""
        outcomes = self.outcomes()
        warnings = [
            f"{name} was quantized without calibration data: {outcome.fallback}"
            for name, outcome in outcomes.items()
            if outcome.fallback
        ]
        unseen = sum(outcome.tokens == 0 for outcome in outcomes.values())
        if unseen:
            warnings.append(
                f"{unseen} modules of experts were calibrated on tokens that are not routed to them"
            )
        return warnings

    def head_importance(self) -> NDArray[np.float32]:
        """Importance of the head's columns, for `hlq.fit`."""
        with self._working():
            return self._walk.head_importance()

    def evaluate(self) -> HeldOut | None:
        """Both models on the held-out windows, once embedding and head are written."""
        head = self._store.get(EMBEDDING if self._engine.tie_word_embeddings else HEAD)
        with self._working():
            return self._walk.evaluate(None if head is None else hlq.dequantize(head))

    @contextmanager
    def _working(self) -> Iterator[None]:
        with torch_threads(self._threads), torch.inference_mode():
            yield


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Let torch use so many threads; None: as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def estimate(
    engine: EngineConfig,
    calibration: Calibration,
    options: SolverOptions,
    world: World,
    offload: bool,
) -> Estimate:
    """Count operations and bytes of a process; a short multiplication tells how fast its device is.

    Per token, each stream spends 2 operations per weight, and each Hessian, or cross moments, 2
    in_features^2; per module, a factorization takes in_features^3, the solver in_features^2 per row and
    pass, and a step of its own for every column. Processes share tokens, rows and experts, but each
    factors the Hessians of dense modules itself.
    """
    tokens = sum(
        math.ceil(len(part) / world.size) * part.shape[1]
        for part in (calibration.token_ids, calibration.held_out)
    )
    first = [linear for linear in block_linears(engine) if linear.name.startswith("model.layers.0.")]
    weights = sum(linear.out_features * linear.in_features for linear in first)
    active = weights
    if engine.sparse_layers[0]:
        in_experts = sum(linear.out_features * linear.in_features for linear in first[4:])
        active = weights - in_experts + in_experts * engine.num_experts_per_tok // engine.num_experts
    passes = 1 + options.rounds * options.descents
    passes += options.sweeps * options.sweep_rounds * options.descents
    moments = 2 if options.target_share > 0 else 1
    # Modules that read the same inputs share a Hessian; one for each input: q, o, gate and down.
    inputs = [first[0].in_features, first[3].in_features]
    inputs += [linear.in_features for i, linear in enumerate(first[4:]) if i % 3 != 1]
    sparse_share = engine.num_experts_per_tok / engine.num_experts if engine.sparse_layers[0] else 1.0
    counted = [tokens * (1.0 if i < 2 else sparse_share) for i in range(len(inputs))]
    operations = 4.0 * tokens * active
    operations += sum(2.0 * moments * seen * size**2 for seen, size in zip(counted, inputs, strict=True))
    sharing = world.size if engine.sparse_layers[0] else 1  # experts are solved whole
    operations += sum(float(size) ** 3 / (sharing if i > 1 else 1) for i, size in enumerate(inputs))
    operations += (
        sum(2.0 * linear.out_features * linear.in_features**2 * (1 + options.sweeps) for linear in first)
        / world.size
    )
    columns = sum(linear.in_features * -(-linear.out_features // 4096) for linear in first) / world.size
    # However few rows a process has, it passes every column of each input.
    columns = max(columns, sum(inputs[:2] if engine.sparse_layers[0] else inputs))
    per_block = operations / speed(world.device) + columns * passes * _COLUMN_SECONDS

    widest = max(linear.in_features for linear in first)
    largest = max(linear.out_features * linear.in_features for linear in first)
    between = engine.hidden_size if engine.sparse_layers[0] else engine.intermediate_size
    activations = 4 * tokens * (2 * engine.hidden_size + max(between, first[3].in_features))
    # A block, twice, with the Hessian and solver of its widest module; in the end, heads and logits.
    solving = max(40 * widest**2, 16 * widest**2 + _SOLVER_COPIES * 4 * (1 << 24))
    in_blocks = 2 * 4 * weights + solving + 3 * 4 * largest
    at_the_head = 4 * engine.vocab_size * (3 * engine.hidden_size + 4 * calibration.token_ids.shape[1])
    memory = BASE_BYTES + max(in_blocks, at_the_head)
    return Estimate(
        seconds=per_block * engine.num_hidden_layers,
        memory_bytes=memory + (0 if offload else activations),
        offload_bytes=activations if offload else 0,
    )


def speed(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Operations per second of a matrix product."""
    a = torch.ones((_PROBE, _PROBE), device=device, dtype=dtype)
    a @ a
    started = time.perf_counter()
    float((a @ a)[0, 0])
    return 2 * _PROBE**3 / (time.perf_counter() - started)


def check_memory(
    needed: Estimate,
    offload: bool,
    device: torch.device,
    processes: int = 1,
    *,
    work: str = "calibrating",
    advice: str = "",
) -> None:
    """Compare what work needs, in each of some processes on this machine, with what is free.

    Raises:
        InsufficientMemoryError: it is more; says what would help, by default fewer windows.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_memory() // processes
    if needed.memory_bytes > free:
        advice = advice or (
            "fewer or shorter calibration windows" if offload else "--offload, or fewer calibration windows"
        )
        raise InsufficientMemoryError(
            f"{work} needs about {needed.memory_bytes / 1e9:.1f} GB of memory, "
            f"but {free / 1e9:.1f} GB are free{' for each process' if processes > 1 else ''}; try {advice}"
        )


def _free_memory() -> int:
    """Bytes that this process may still use: of the machine, its control group and its own limit."""
    limits = []
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    limits.append(int(meminfo["MemAvailable"].split()[0]) << 10)
    group = Path("/sys/fs/cgroup")
    try:
        most, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        if most != "max":
            limits.append(int(most) - int(used))
    except (OSError, ValueError):
        pass  # no control group of version 2 limits this process
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limits.append(soft - pages * resource.getpagesize())
    return max(0, min(limits))


def embedder(embedding: HlqMatrix, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A quantized embedding: int64 [...] on the CPU -> float32 [..., hidden_size] on the device."""

    def embed(token_ids: Tensor) -> Tensor:
        rows, place = np.unique(token_ids.numpy(), return_inverse=True)
        arrays: dict[str, Any] = {
            name: array[:, rows] if name == "planes" else array[rows]
            for name, array in embedding.arrays.items()
        }
        some = replace(embedding, **arrays)
        return torch.from_numpy(hlq.dequantize(some)[place.reshape(token_ids.shape)]).to(device)

    return embed


class _Store:
    """A `MatrixStore` that writes to a checkpoint, in the first process; the others learn what it has."""

    def __init__(self, world: World, writer: CheckpointWriter | None, parts: Mapping[str, Part]) -> None:
        self._world, self._writer, self._parts = world, writer, parts
        self._stored = world.broadcast_object(set(writer.done if writer else ()))

    def __contains__(self, module: object) -> bool:
        return module in self._stored

    def get(self, module: str) -> HlqMatrix | None:
        return self._world.from_main(lambda: self._read(module))

    def _read(self, module: str) -> HlqMatrix | None:
        part = self._parts.get(module)
        if part is None or part.scheme is None or module not in self._own.done:
            return None
        arrays = {name.rpartition(".")[2]: self._own.read(name) for name in part.tensors}
        return HlqMatrix(in_features=part.shape[1], group_size=part.scheme.group_size, **arrays)

    def put(
        self, module: str, matrix: HlqMatrix, outcome: Outcome, squared_error: tuple[float, float]
    ) -> None:
        self._world.on_main(lambda: self._write(module, matrix, outcome, squared_error))
        self._stored.add(module)

    def _write(
        self, module: str, matrix: HlqMatrix, outcome: Outcome, squared_error: tuple[float, float]
    ) -> None:
        for name, array in matrix.arrays.items():
            self._own.write(f"{module}.{name}", array)
        error, norm = squared_error
        record = {"error": error, "norm": norm, "outcome": asdict(outcome)}
        self._own.commit(module, self._parts[module].tensors, record)

    def outcome(self, module: str) -> Outcome:
        record: dict[str, Any] = self._own.done[module]["outcome"]
        return Outcome(**record)

    def flush(self) -> None:
        self._world.on_main(lambda: self._own.sync())

    @property
    def _own(self) -> CheckpointWriter:
        """The writer, which the first process has."""
        assert self._writer is not None
        return self._writer
