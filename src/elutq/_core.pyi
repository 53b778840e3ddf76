"""Types of the compiled core."""

import numpy as np
from numpy.typing import NDArray

from elutq.architectures import EngineConfig
from elutq.packing import HlqMatrix

class Sequence:
    """Keys and values of one sequence."""

    @property
    def max_positions(self) -> int: ...
    @property
    def memory_bytes(self) -> int: ...
    def __len__(self) -> int: ...
    def truncate(self, length: int) -> None: ...
    def fork(self, length: int) -> Sequence: ...

class Engine:
    """A model on this machine."""

    def __init__(self, config: EngineConfig, isa: str, threads: int, exact: bool, kv_cache: str) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def weight_memory_bytes(self) -> int: ...
    @property
    def weight_bytes_per_token(self) -> int: ...
    @property
    def kv_cache(self) -> str: ...
    @property
    def kv_layer_bytes(self) -> int: ...
    def set_hlq(self, name: str, matrix: HlqMatrix) -> None: ...
    def set_float32(self, name: str, values: NDArray[np.float32]) -> None: ...
    def set_float16(self, name: str, values: NDArray[np.uint16]) -> None: ...
    def set_bfloat16(self, name: str, values: NDArray[np.uint16]) -> None: ...
    def set_vector(self, name: str, values: NDArray[np.float32]) -> None: ...
    def new_sequence(self, max_positions: int) -> Sequence: ...
    def step(
        self, batch: list[tuple[Sequence, NDArray[np.int32]]], all_logits: bool
    ) -> NDArray[np.float32]: ...

class Sampler:
    """Chooses tokens from logits."""

    def __init__(
        self,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repetition_penalty: float,
        frequency_penalty: float,
        presence_penalty: float,
        logit_bias: list[tuple[int, float]],
        seed: int,
    ) -> None: ...
    def sample(
        self,
        logits: NDArray[np.float32],
        tokens: NDArray[np.int32],
        prompt_length: int,
        allowed: NDArray[np.int32] | None = None,
    ) -> int: ...

def log_probabilities(logits: NDArray[np.float32], token: int, count: int) -> list[tuple[int, float]]:
    """Log-probability of the token, then those of the `count` most likely ones, most likely first."""

def available_isas() -> list[str]:
    """Instruction sets this machine can run, slowest first."""

def read_bandwidth(threads: int, bytes: int = ..., passes: int = ...) -> float:  # noqa: A002
    """GB/s at which `threads` threads read `bytes` bytes of memory, best of `passes`."""

def cpu_model_name() -> str:
    """Marketing name of the CPU, or 'unknown'."""

class LinearRunner:
    """Kernels and threads for linears outside a model; products run one after the other."""

    def __init__(self, isa: str, threads: int, exact: bool = False) -> None: ...
    @property
    def isa(self) -> str: ...

class PackedLinear:
    """One HLQ matrix, packed for this machine: the same product, bit for bit, as inside a model."""

    def __init__(self, runner: LinearRunner, matrix: HlqMatrix) -> None: ...
    @property
    def memory_bytes(self) -> int: ...
    def multiply(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Product of x [tokens, in_features] and the transposed matrix, float32 [tokens, out_features]."""

def fit_hlq(
    weights: NDArray[np.generic],
    type: str,  # noqa: A002
    group_size: int,
    method: str,
    importance: NDArray[np.float32] | None,
    planes: NDArray[np.uint8],
    scales: NDArray[np.uint16],
    zeros: NDArray[np.uint16],
    threads: int,
) -> float:
    """Quantize weights into planes, scales and zeros; the largest magnitude, NaN when a weight is NaN."""

def solve_group(
    target: NDArray[np.float32],
    metric: NDArray[np.float32],
    feedback: NDArray[np.float32] | None,
    row_scales: NDArray[np.float32] | None,
    resume: bool,
    rounds: int,
    descents: int,
    parameters: NDArray[np.float32],
    codes: NDArray[np.uint8],
    values: NDArray[np.float32],
    threads: int,
) -> None:
    """Quantize a group of columns in the metric of a Hessian, in place; see `elutq.group_problem`."""

def soft_values(
    latent: NDArray[np.float32],
    levels: NDArray[np.float32],
    temperature: float,
    values: NDArray[np.float32],
    threads: int,
) -> None:
    """Weights between two levels of their group each; see `elutq.finetune.soft_weights`."""

def soft_gradients(
    latent: NDArray[np.float32],
    levels: NDArray[np.float32],
    temperature: float,
    gradient: NDArray[np.float32],
    for_latent: NDArray[np.float32],
    for_levels: NDArray[np.float32],
    threads: int,
) -> None:
    """Gradients of what `soft_values` was given from those of its weights."""

def settle(latent: NDArray[np.float32], levels: NDArray[np.float32], distance: float, threads: int) -> None:
    """Move latent weights to the nearest levels of their group, by at most a distance."""

def dequantize(matrix: HlqMatrix, values: NDArray[np.float32], threads: int) -> None:
    """Write what a quantized matrix stands for."""

def squared_error(
    weights: NDArray[np.generic],
    type: str,  # noqa: A002
    matrix: HlqMatrix,
    threads: int,
) -> tuple[float, float]:
    """||W - W~||^2 and ||W||^2 of weights and their quantized form."""
