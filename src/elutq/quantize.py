"""The pipeline of `elutq quantize`: checks what is asked for, plans it, and has it done (`elutq.stages`).

Without calibration data, weights go through one piece of a tensor at a time, so peak memory does not grow
with the model. Matrices are independent of each other, and so are their rows; the result depends on neither
the pieces nor the threads. With it, the blocks are walked one after the other (`elutq.layerwise`); embedding
and head are still quantized on their own. Finetuning follows, block by block and as a whole
(`elutq.finetune`). Processes that torchrun started share the walk and the tuning; the first does everything
else, and alone writes (`elutq.world`).
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from elutq import __version__, hlq
from elutq.architectures import EMBEDDING, HEAD, EngineConfig
from elutq.budget import Target
from elutq.calibration import SELF, Calibration, load_calibration
from elutq.checkpoint import DEFAULT_SHARD_BYTES, Checkpoint, TensorInfo, check_replaceable
from elutq.data_free import Progress
from elutq.errors import InvalidArgumentError, MissingDependencyError
from elutq.finetune.options import FinetuneOptions, TuningText, choose
from elutq.rotation import RotatedCheckpoint
from elutq.runtime import load
from elutq.scheme import MAX_BITS, OUTER_SCHEME, ModelScheme, QuantScheme
from elutq.stages import Job, QuantizationReport
from elutq.tokenizer import Tokenizer
from elutq.world import World

if TYPE_CHECKING:
    from elutq.allocation import Allocation
    from elutq.gptq import SolverOptions

#: Methods that need calibration data: HLQ, and for comparison plain GPTQ on the best-clipped uniform grid,
#: and HLQ-GPTQ as published (`elutq.gptq`).
CALIBRATED_METHODS = ("hlq-gptq", "gptq", "ao-gptq")
METHODS = (*hlq.METHODS, *CALIBRATED_METHODS)

#: `embedding_bits` and `lm_head_bits` that leave the matrix as it is.
KEEP_BITS = 16
#: Embedding and head are quantized by default from this many weights on.
LARGE_MATRIX = 1 << 24
#: Tokens in a calibration window, where the model allows.
DEFAULT_LENGTH = 2048
#: Windows that are not calibrated on, but show what it was good for.
HELD_OUT = 8
#: Further windows that finetuning is not trained on, but that decide which state is the best.
JUDGES = 16


def quantize(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    bits: int | None = None,
    group_size: int | None = None,
    target_bpw: float | None = None,
    target_bytes: int | None = None,
    param_bits: int = 16,
    method: str | None = None,
    lm_head_bits: int | None = None,
    embedding_bits: int | None = None,
    importance: bool | None = None,
    calibration: Sequence[str] = (SELF,),
    calibration_samples: int = 128,
    calibration_length: int | None = None,
    calibration_seed: int = 0,
    finetune: Sequence[str] | FinetuneOptions | None = None,
    finetune_samples: int | None = None,
    effort: str | None = None,
    shard: bool = False,
    rotate: bool = False,
    solver: "SolverOptions | None" = None,
    device: str | None = None,
    offload: bool = False,
    threads: int | None = None,
    overwrite: bool = False,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
) -> QuantizationReport:
    """Quantize a model folder.

    Interrupted or killed, it leaves `OUT.partial`, with finetuning `OUT.stages`, and the same call goes on
    from there; `out` appears only when it is complete. The weight files are the same, byte for byte, however
    often the work was interrupted.

    Under torchrun all processes call it alike, share the calibrated work and get the report.

    Args:
        source: a local Hugging Face folder or a hub id.
        out: the folder to make.
        bits: of the linear modules inside the decoder blocks, 1 to 4; by default 2.
        group_size: of the same; 32, 64, 128, 256, or -1 for a whole row; by default 128.
        target_bpw: instead of both, bits per weight that the decoder blocks may take, scales included. Each
            of their matrices gets 2, 3 or 4 bits in groups of 64 or 128, by how much it matters
            (`elutq.sensitivity`), which is measured on calibration text with any method.
        target_bytes: or the size of all weight files, embedding and head included.
        param_bits: of a scale or zero, in all matrices that are quantized: 16, or 8 under one fp16 factor per
            row. With 8, `hlq.to_8bit` follows a method without calibration, and a uniform grid does not stay
            quite uniform; one with calibration rounds as it goes.
        method: one of `METHODS`; by default "hlq", or "hlq-gptq" with an effort or finetuning.
        lm_head_bits: 1 to 4 (in groups of 128), or 16 to leave the head as it is. By default 4 if it has at
            least 2^24 weights, else 16. A tied head is the embedding.
        embedding_bits: the same for the embedding.
        importance: weigh columns by `importance.input_importance`; by default for method "hlq" alone, so that
            the others stay what they are known as.
        calibration: texts for a method or target that needs them, as in `elutq.calibration.load_calibration`.
        calibration_samples: windows of text to calibrate on.
        calibration_length: tokens in a window; by default 2048, or the model's limit.
        calibration_seed: decides which windows of the texts are taken.
        finetune: what follows a method with calibration: some of "block" and "e2e", in this order, or all
            options.
        finetune_samples: windows of the same texts to finetune on; by default 512, with effort "best" 2048.
        effort: "fast" is calibration alone, with fewer rounds; "balanced" adds both stages of finetuning;
            "best" has more text for them, and changes codes in the second, too. What is said besides wins.
        shard: spread the model over the processes of torchrun in end-to-end tuning, where one device cannot
            hold it.
        rotate: quantize the model in rotated axes (`elutq.rotation`).
        solver: options of the calibrated solver, in place of the method's own.
        device: where torch calibrates, such as "cuda"; by default a GPU if there is one.
        offload: keep activations in a file beside `out`, not in memory.
        threads: all CPUs by default, or this process's share of them.
        overwrite: replace an existing quantized model at `out`, or partial output of another run.
        shard_bytes: most tensor bytes in one weight file.
        progress: called with weights done, weights in all, and the name of the tensor in work; by the first
            process only.
        announce: called with what a person may want to know before long work starts; the same.

    Raises:
        MissingDependencyError: a method with calibration or a target, and torch or transformers are not
            installed.
        InsufficientMemoryError: calibration would not fit into memory.
        InvalidArgumentError: an option is outside what is supported, or two contradict each other.
        TensorValueError: a tensor holds NaN or infinity, or values beyond fp16's range.
        OutputExistsError: `out` exists.
        ResumeMismatchError: `OUT.partial` is of another source, or made with other settings.
        DiskSpaceError: the disk is too small, or full.
        WorkerLostError: another process of the job ended.
        ElutqError: the source cannot be read (see `Checkpoint.open`).
    """
    with World.join(device) as world:
        if not world.is_main:
            progress = announce = None
        progress = progress or (lambda done, total, name: None)
        announce = announce or (lambda text: None)
        asked = world.everywhere(
            lambda: _Asked.of(
                method,
                finetune,
                finetune_samples,
                effort,
                shard,
                threads,
                shard_bytes,
                QuantScheme(
                    2 if bits is None else bits, 128 if group_size is None else group_size, param_bits
                ),
                _target(bits, group_size, target_bpw, target_bytes),
            )
        )
        method, tuned, calibrated = asked.method, asked.finetune, asked.method in CALIBRATED_METHODS
        weigh = (calibrated or method == "hlq") if importance is None else importance
        if effort == "fast" and method == "hlq-gptq" and solver is None:
            from elutq.calibrated import FAST

            solver = FAST
        with world.everywhere(lambda: _open(source)) as original:
            checkpoint = RotatedCheckpoint(original) if rotate else original
            found = {name: checkpoint.info(name) for name in checkpoint.names()}
            allocation: Allocation | None = None

            def decide() -> tuple[ModelScheme, Calibration | None, TuningText | None]:
                nonlocal allocation
                scheme = plan(checkpoint.engine, asked.blocks, lm_head_bits, embedding_bits)
                limit = checkpoint.engine.max_position_embeddings
                data = text = None
                if asked.target:
                    allocation = _allocation(checkpoint, scheme, found, asked.target, shard_bytes)
                    check_replaceable(Path(out), overwrite)  # long work comes before the writer
                if calibrated:
                    _require_torch(f"method {method}")
                    length = calibration_length or min(DEFAULT_LENGTH, limit)
                    samples = max(calibration_samples, tuned.samples if tuned else 0)
                    held_out = HELD_OUT + (JUDGES if tuned else 0)
                    data = _calibration_data(
                        checkpoint, calibration, samples, length, held_out, calibration_seed
                    )
                    if tuned:
                        data, text = _share(data, calibration_samples, tuned)
                elif allocation:
                    length = min(calibration_length or allocation.length, limit)
                    samples = max(allocation.windows, len(calibration))
                    data = _calibration_data(checkpoint, calibration, samples, length, 0, calibration_seed)
                if allocation and data:
                    scheme = allocation.choose(
                        data.token_ids,
                        "hlq" if calibrated else method,
                        weigh,
                        threads=threads,
                        device=device,
                        offload=offload,
                        out=Path(out).resolve(),
                        fingerprint=_fingerprint(checkpoint, None, method, weigh, data),
                        announce=announce,
                    )
                return scheme, data, text

            scheme, data, text = world.from_main(decide)
            job = Job(
                world=world,
                source=os.fspath(source),
                checkpoint=checkpoint,
                found=found,
                scheme=scheme,
                method=method,
                importance=weigh,
                calibration=data if calibrated else None,
                solver=solver,
                settings={
                    **scheme.to_config(),
                    "method": method,
                    "importance": weigh,
                    "rotate": rotate,
                    "target": asked.target and asdict(asked.target),
                    "finetune": tuned and tuned.record,
                },
                text=None if data is None else data.record,
                sensitivity=allocation.record if allocation else None,
                warnings=list(data.warnings if data else ()),
                fingerprint=_fingerprint(checkpoint, scheme, method, weigh, data, solver, tuned),
                seed=calibration_seed,
                offload=Path(out).resolve().parent if offload else None,
                threads=threads,
                overwrite=overwrite,
                shard_bytes=shard_bytes,
                progress=progress,
                announce=announce,
            )
            report = job.run(Path(out).resolve(), tuned, text)
            if allocation:
                allocation.forget()
            return report


def _open(source: str | os.PathLike[str]) -> Checkpoint:
    checkpoint = Checkpoint.open(source)
    if checkpoint.scheme is not None:
        checkpoint.close()
        raise InvalidArgumentError(f"{source} is quantized already; give the original model")
    return checkpoint


@dataclass(frozen=True)
class _Asked:
    """The options that depend on each other."""

    method: str
    finetune: FinetuneOptions | None
    blocks: QuantScheme
    target: Target | None

    @classmethod
    def of(
        cls,
        method: str | None,
        finetune: Sequence[str] | FinetuneOptions | None,
        samples: int | None,
        effort: str | None,
        shard: bool,
        threads: int | None,
        shard_bytes: int,
        blocks: QuantScheme,
        target: Target | None,
    ) -> "_Asked":
        if threads is not None and threads < 1:
            raise InvalidArgumentError(f"threads must be at least 1, not {threads}")
        if type(shard_bytes) is not int or shard_bytes < 1:
            raise InvalidArgumentError(f"shard_bytes must be a positive integer, not {shard_bytes!r}")
        tuned = choose(effort, finetune, samples)
        if shard:
            if tuned is None or "e2e" not in tuned.stages:
                raise InvalidArgumentError("shard is for finetuning end to end; add e2e, or leave it out")
            tuned = replace(tuned, shard=True)
        method = method or ("hlq-gptq" if tuned or effort else "hlq")
        if method not in METHODS:
            raise InvalidArgumentError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
        if tuned and method not in CALIBRATED_METHODS:
            raise InvalidArgumentError(
                f"finetuning follows a method with calibration, not {method}; take hlq-gptq"
            )
        return cls(method, tuned, blocks, target)


def _share(data: Calibration, samples: int, tuned: FinetuneOptions) -> tuple[Calibration, TuningText]:
    """Windows to calibrate on, and those to finetune on, which may be the same; none of those to judge by."""
    reported = np.arange(len(data.held_out)) % (1 + JUDGES // HELD_OUT) == 0
    text = TuningText(data.token_ids[: tuned.samples], data.held_out[~reported], data.held_out[reported])
    if len(text.train) < tuned.batch or not len(text.held_out):
        raise InvalidArgumentError(
            f"the text has room for {len(text.train)} windows to finetune on and {len(text.held_out)} to "
            "judge by; give a longer text, fewer finetune_samples, or a smaller calibration_length"
        )
    token_ids = data.token_ids[:samples]
    record = {
        **data.record,
        "samples": len(token_ids),
        "tokens": token_ids.size,
        "held_out": len(text.report),
        "finetune": {"samples": len(text.train), "held_out": len(text.held_out)},
    }
    return replace(data, token_ids=token_ids, held_out=text.report, record=record), text


def _target(
    bits: int | None, group_size: int | None, target_bpw: float | None, target_bytes: int | None
) -> Target | None:
    if target_bpw is None and target_bytes is None:
        return None
    if bits is not None or group_size is not None:
        raise InvalidArgumentError(
            "a target size decides on bits and group sizes; leave bits and group_size out"
        )
    return Target(target_bpw, target_bytes)


def _allocation(
    checkpoint: Checkpoint | RotatedCheckpoint,
    scheme: ModelScheme,
    found: Mapping[str, TensorInfo],
    target: Target,
    shard_bytes: int,
) -> "Allocation":
    _require_torch("a target size")
    from elutq.allocation import Allocation

    return Allocation(checkpoint, scheme, found, target, shard_bytes)


def _require_torch(what: str) -> None:
    try:
        import matplotlib  # noqa: F401
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(f"{what} needs {error.name}: pip install 'elutq[quantize]'") from error


def _calibration_data(
    checkpoint: Checkpoint | RotatedCheckpoint,
    sources: Sequence[str],
    samples: int,
    length: int,
    held_out: int,
    seed: int,
) -> Calibration:
    limit = checkpoint.engine.max_position_embeddings
    if not 2 <= length <= limit:
        raise InvalidArgumentError(
            f"calibration_length must be from 2 to the model's limit {limit}, not {length}"
        )
    return load_calibration(
        sources,
        Tokenizer.from_folder(checkpoint.path),
        samples=samples,
        length=length,
        held_out=held_out,
        seed=seed,
        model=lambda: load(checkpoint.path, context=length),
    )


def plan(
    engine: EngineConfig, blocks: QuantScheme, lm_head_bits: int | None, embedding_bits: int | None
) -> ModelScheme:
    """Which matrices are quantized, and how; the options are those of `quantize`.

    Raises:
        InvalidArgumentError: a number of bits is not supported, or a tied head is to differ.
    """
    for option, value in (("lm_head_bits", lm_head_bits), ("embedding_bits", embedding_bits)):
        if value not in (None, KEEP_BITS, *range(1, MAX_BITS + 1)):
            raise InvalidArgumentError(f"{option} must be 1 to {MAX_BITS} or {KEEP_BITS}, not {value!r}")
    chosen = {EMBEDDING: embedding_bits}
    if not engine.tie_word_embeddings:
        chosen[HEAD] = lm_head_bits
    elif embedding_bits is None:
        chosen[EMBEDDING] = lm_head_bits
    elif lm_head_bits not in (None, embedding_bits):
        raise InvalidArgumentError(
            f"lm_head_bits {lm_head_bits} contradicts embedding_bits {embedding_bits}: this model's head "
            "is its embedding (tie_word_embeddings); give one of them"
        )
    default = OUTER_SCHEME.bits if engine.vocab_size * engine.hidden_size >= LARGE_MATRIX else KEEP_BITS
    overrides = {}
    for name, bits in chosen.items():
        bits = default if bits is None else bits
        if bits != KEEP_BITS:
            overrides[name] = replace(OUTER_SCHEME, bits=bits, param_bits=blocks.param_bits)
    return ModelScheme(blocks, overrides)


def _fingerprint(
    checkpoint: Checkpoint | RotatedCheckpoint,
    scheme: ModelScheme | None,
    method: str,
    importance: bool,
    data: Calibration | None,
    solver: "SolverOptions | None" = None,
    finetune: FinetuneOptions | None = None,
) -> str:
    """Names the source's content and every setting that the result depends on; `scheme` if it is known."""
    return json.dumps(
        {
            "elutq": __version__,
            "method": method,
            "importance": importance,
            "calibration": None if data is None else data.record,
            "solver": None if solver is None else asdict(solver),
            "finetune": finetune and finetune.record,
            "rotation": checkpoint.seed if isinstance(checkpoint, RotatedCheckpoint) else None,
            "scheme": None if scheme is None else scheme.to_config(),
            "config": checkpoint.config,
            "files": checkpoint.files(),
        },
        sort_keys=True,
    )
