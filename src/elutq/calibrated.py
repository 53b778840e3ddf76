"""The calibrated half of the pipeline: joins checkpoint, calibration text and writer to the block walk."""

import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
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
from elutq.gptq import GPTQ, PUBLISHED, SolverOptions, weights_at_once
from elutq.layerwise import BlockOutcome, HeldOut, LayerwiseQuantizer, Outcome, Place, may_round
from elutq.packing import HlqMatrix
from elutq.precision import products_in_tf32
from elutq.world import World

METHODS: Mapping[str, SolverOptions] = {
    "hlq-gptq": SolverOptions(),
    "gptq": GPTQ,
    "ao-gptq": PUBLISHED,
}
#: `hlq-gptq` in a hurry.
FAST = SolverOptions(rounds=2)

# What the estimates rest on: rough figures of two cores (`benchmarks/quantize_memory.py` shows what is true),
# and of an H200 (`benchmarks/one_block.py`).
_PROBE, _PROBE_ON_GPU = 1536, 8192  # side of the matrices that are multiplied to see how fast that is
_PASS_OPERATIONS = 1000  # of a weight in a group of 128 when codes are passed, at the speed of the above
_COLUMN_SECONDS_ON_GPU = 23e-6  # one column of however many rows in one pass, with what the CPU does for it
BASE_BYTES = 700 << 20  # Python, torch and transformers themselves
_SOLVER_COPIES = 8  # float32 arrays of a piece of a matrix that the solver holds


@dataclass(frozen=True)
class Estimate:
    """What some work will need, roughly, in each process.

    Attributes:
        seconds: time.
        memory_bytes: of the device, beside activations.
        activation_bytes: of activations, which `place` finds a place for.
    """

    seconds: float
    memory_bytes: int
    activation_bytes: int


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
        self._threads, self._world = threads or world.threads, world
        in_blocks = {linear.name for linear in block_linears(source.engine)}
        self._schemes = {part.name: part.scheme for part in parts if part.scheme and part.name in in_blocks}
        self._engine = source.engine
        self._store = _Store(world, writer, {part.name: part for part in parts})
        self.blocks: list[BlockOutcome] = []
        with self._settings():
            self.estimate = estimate(source.engine, calibration, options, world)
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
            place=place(self.estimate, offload, world.device),
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
        check_memory(self.estimate, offload, world.device, world.local_size)
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
        with self._settings(), torch.inference_mode():
            yield

    def _settings(self) -> AbstractContextManager[None]:
        return torch_settings(self._threads, self._world.device)


@contextmanager
def torch_settings(threads: int | None, device: torch.device) -> Iterator[None]:
    """Let torch use so many threads, None: as many as before, and a GPU multiply fast."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with products_in_tf32(device):
            yield
    finally:
        torch.set_num_threads(before)


def estimate(
    engine: EngineConfig,
    calibration: Calibration,
    options: SolverOptions,
    world: World,
) -> Estimate:
    """Count operations and bytes of a process; a short multiplication tells how fast its device is.

    Per token, each stream spends 2 operations per weight, a Hessian in_features^2, cross moments 2
    in_features^2. Per module, a factorization takes in_features^3, and for each row targets 4 in_features^2,
    the first visit of all groups 1, a sweep 2, and what the report states 1. Passes over the codes come on
    top, which take a GPU a step of its own for every column. Processes share tokens, rows and experts, but
    each factors the Hessians of dense modules itself.
    """
    learned, judged = (
        math.ceil(len(part) / world.size) * part.shape[1]
        for part in (calibration.token_ids, calibration.held_out)
    )
    tokens = learned + judged
    first = [linear for linear in block_linears(engine) if linear.name.startswith("model.layers.0.")]
    weights = sum(linear.out_features * linear.in_features for linear in first)
    active = weights
    if engine.sparse_layers[0]:
        in_experts = sum(linear.out_features * linear.in_features for linear in first[4:])
        active = weights - in_experts + in_experts * engine.num_experts_per_tok // engine.num_experts
    passes = 1 + options.rounds * options.descents
    passes += options.sweeps * options.sweep_rounds * options.descents
    aware = options.target_share > 0
    # Modules that read the same inputs share a Hessian; one for each input: q, o, gate and down.
    inputs = [first[0].in_features, first[3].in_features]
    inputs += [linear.in_features for i, linear in enumerate(first[4:]) if i % 3 != 1]
    sparse_share = engine.num_experts_per_tok / engine.num_experts if engine.sparse_layers[0] else 1.0
    counted = [tokens * (1.0 if i < 2 else sparse_share) for i in range(len(inputs))]
    operations = 4.0 * tokens * active
    operations += sum(
        (3.0 if aware else 1.0) * seen * size**2 for seen, size in zip(counted, inputs, strict=True)
    )
    sharing = world.size if engine.sparse_layers[0] else 1  # experts are solved whole
    operations += sum(float(size) ** 3 / (sharing if i > 1 else 1) for i, size in enumerate(inputs))
    visits = 2 + 2 * options.sweeps + (4 if aware else 0)
    operations += (
        sum(float(linear.out_features) * linear.in_features**2 * visits for linear in first) / world.size
    )
    columns = 0.0
    if world.device.type == "cpu":
        operations += float(_PASS_OPERATIONS) * passes * weights / world.size
    else:
        most = weights_at_once(world.device)
        columns = sum(
            linear.in_features * -(-linear.out_features // (most // linear.in_features)) for linear in first
        )
        # However few rows a process has, it passes every column of each input.
        columns = max(columns / world.size, sum(inputs[:2] if engine.sparse_layers[0] else inputs))
    per_block = operations / speed(world.device) + columns * passes * _COLUMN_SECONDS_ON_GPU

    widest = max(linear.in_features for linear in first)
    largest = max(linear.out_features * linear.in_features for linear in first)
    between = engine.hidden_size if engine.sparse_layers[0] else engine.intermediate_size
    kept = (2 if may_round(world.device) else 4) * learned + 4 * judged
    activations = kept * (2 * engine.hidden_size + max(between, first[3].in_features))
    # A block, twice, with the Hessian and solver of its widest module; in the end, heads and logits.
    solving = max(40 * widest**2, 16 * widest**2 + _SOLVER_COPIES * 4 * weights_at_once(world.device))
    in_blocks = 2 * 4 * weights + solving + 3 * 4 * largest
    at_the_head = 4 * engine.vocab_size * (3 * engine.hidden_size + 4 * calibration.token_ids.shape[1])
    memory = BASE_BYTES + max(in_blocks, at_the_head)
    return Estimate(
        seconds=per_block * engine.num_hidden_layers,
        memory_bytes=memory,
        activation_bytes=activations,
    )


def speed(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Operations per second of a matrix product."""
    size = _PROBE if device.type == "cpu" else _PROBE_ON_GPU
    a = torch.ones((size, size), device=device, dtype=dtype)
    float((a @ a)[0, 0])
    started = time.perf_counter()
    float((a @ a)[0, 0])
    return 2 * size**3 / (time.perf_counter() - started)


def place(needed: Estimate, offload: Path | None, device: torch.device) -> Place:
    """Where activations are kept: in a folder to offload to, on the device if they fit, else on the CPU."""
    if offload is not None:
        return offload
    fits = needed.memory_bytes + needed.activation_bytes <= _free_memory(device)
    return device if fits else torch.device("cpu")


def check_memory(
    needed: Estimate,
    offload: Path | None,
    device: torch.device,
    processes: int = 1,
    *,
    work: str = "calibrating",
    advice: Sequence[str] = ("fewer or shorter calibration windows",),
) -> None:
    """Compare what work needs, in each of some processes on this machine, with what is free.

    Raises:
        InsufficientMemoryError: it is more; says what would help: the advice, by default fewer windows, and
            to offload.
    """
    demands = {device: needed.memory_bytes}
    kept = place(needed, offload, device)
    if isinstance(kept, torch.device):
        demands[kept] = demands.get(kept, BASE_BYTES) + needed.activation_bytes
    for where, demand in demands.items():
        free = _free_memory(where) // (processes if where.type == "cpu" else 1)
        if demand > free:
            on = " on the GPU" if where.type != "cpu" else ""
            ways = ", or ".join([*(["--offload"] if where == kept else []), *advice])
            raise InsufficientMemoryError(
                f"{work} needs about {demand / 1e9:.1f} GB of memory{on}, but {free / 1e9:.1f} GB are free"
                f"{' for each process' if processes > 1 else ''}; try {ways}"
            )


def _free_memory(device: torch.device) -> int:
    """Bytes this process may still use: of a GPU, or of the machine, its control group and its own limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
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
