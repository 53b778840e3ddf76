"""The pipeline of `elutq quantize`: plan, run, report.

Without calibration data, weights go through one piece of a tensor at a time, so peak memory does not grow
with the model. Matrices are independent of each other, and so are their rows; the result depends on neither
the pieces nor the threads. With it, the blocks are walked one after the other (`elutq.layerwise`); embedding
and head are still quantized on their own. Processes that torchrun started share that walk; the first does
everything else, and alone writes (`elutq.world`).
"""

import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from elutq import __version__, hlq
from elutq.architectures import EMBEDDING, HEAD, EngineConfig
from elutq.budget import Target
from elutq.calibration import SELF, Calibration, load_calibration
from elutq.checkpoint import (
    DEFAULT_SHARD_BYTES,
    Checkpoint,
    CheckpointWriter,
    Part,
    TensorInfo,
    check_replaceable,
    model_parts,
    side_files,
    write_atomically,
)
from elutq.data_free import DataFreeJob, Progress
from elutq.errors import InvalidArgumentError, MissingDependencyError, TokenizerError
from elutq.model_card import CARD_FILE, model_card
from elutq.report import ModelSummary, SquaredError, summarize
from elutq.rotation import RotatedCheckpoint
from elutq.runtime import load
from elutq.scheme import MAX_BITS, OUTER_SCHEME, ModelScheme, QuantScheme
from elutq.smoke import check_generation
from elutq.tokenizer import Tokenizer
from elutq.world import World

if TYPE_CHECKING:
    from elutq.allocation import Allocation
    from elutq.calibrated import CalibratedJob
    from elutq.gptq import SolverOptions

#: Methods that need calibration data: HLQ, and for comparison plain GPTQ on the best-clipped uniform grid,
#: and HLQ-GPTQ as published (`elutq.gptq`).
CALIBRATED_METHODS = ("hlq-gptq", "gptq", "ao-gptq")
METHODS = (*hlq.METHODS, *CALIBRATED_METHODS)

REPORT_FILE = "quantization_report.json"
PAGE_FILE = "quantization_report.html"
FIGURE_FILE = "quantization_report.png"

# Of the smoke test.
_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 4, 16, 96

#: `embedding_bits` and `lm_head_bits` that leave the matrix as it is.
KEEP_BITS = 16
#: Embedding and head are quantized by default from this many weights on.
LARGE_MATRIX = 1 << 24
#: Tokens in a calibration window, where the model allows.
DEFAULT_LENGTH = 2048
#: Windows that are not calibrated on, but show what it was good for.
HELD_OUT = 8


@dataclass(frozen=True)
class QuantizationReport:
    """What was made, how, and how close it is to the original.

    Attributes:
        source: the model as it was given.
        out: the folder that was made.
        model_type: Hugging Face's name of the family.
        settings: the options in effect, `None` resolved.
        versions: of this package, the format, Python and NumPy.
        file_bytes: size of the weight files.
        seconds: of this run; less than the whole work if it continued an earlier one.
        weights_per_second: quantized in this run, over its seconds.
        summary: sizes and errors per tensor and per kind.
        calibration: what it was calibrated on (`Calibration.record`), None without.
        outputs: module -> how its calibration went (`layerwise.Outcome`).
        blocks: error of the residual stream after each block (`layerwise.BlockOutcome`).
        nll: both models on windows held out of the calibration (`layerwise.HeldOut`), None without.
        sensitivity: how much each matrix matters, and what it got (`Allocation.record`); None without a
            target.
        generation: whether it still writes text (`smoke.GenerationCheck`), None without calibration.
        warnings: what is to be known of the result.
    """

    source: str
    out: str
    model_type: str
    settings: dict[str, Any]
    versions: dict[str, Any]
    file_bytes: int
    seconds: float
    weights_per_second: float
    summary: ModelSummary
    calibration: dict[str, Any] | None
    outputs: dict[str, dict[str, Any]]
    blocks: list[dict[str, Any]]
    nll: dict[str, Any] | None
    sensitivity: dict[str, Any] | None
    generation: dict[str, Any] | None
    warnings: list[str]

    def to_json(self) -> str:
        """The content of `quantization_report.json`."""
        return json.dumps(asdict(self), indent=2) + "\n"


def quantize(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    bits: int | None = None,
    group_size: int | None = None,
    target_bpw: float | None = None,
    target_bytes: int | None = None,
    param_bits: int = 16,
    method: str = "hlq",
    lm_head_bits: int | None = None,
    embedding_bits: int | None = None,
    importance: bool | None = None,
    calibration: Sequence[str] = (SELF,),
    calibration_samples: int = 128,
    calibration_length: int | None = None,
    calibration_seed: int = 0,
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

    Interrupted or killed, it leaves `OUT.partial`, and the same call goes on from there; `out` appears only
    when it is complete. The weight files are the same, byte for byte, however often the work was interrupted.

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
        method: one of `METHODS`.
        lm_head_bits: 1 to 4 (in groups of 128), or 16 to leave the head as it is. By default 4 if it has at
            least 2^24 weights, else 16. A tied head is the embedding.
        embedding_bits: the same for the embedding.
        importance: weigh columns by `importance.input_importance`; by default for method "hlq" alone, so that
            the others stay what they are known as.
        calibration: texts for a method or target that needs them, as in `elutq.calibration.load_calibration`.
        calibration_samples: windows of text to calibrate on.
        calibration_length: tokens in a window; by default 2048, or the model's limit.
        calibration_seed: decides which windows of the texts are taken.
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
    started = time.monotonic()
    with World.join(device) as world:
        if not world.is_main:
            progress = announce = None
        progress = progress or (lambda done, total, name: None)
        announce = announce or (lambda text: None)
        target, blocks_scheme = world.everywhere(
            lambda: _check(
                method, threads, shard_bytes, bits, group_size, param_bits, target_bpw, target_bytes
            )
        )
        calibrated = method in CALIBRATED_METHODS
        weigh = (calibrated or method == "hlq") if importance is None else importance
        with world.everywhere(lambda: _open(source)) as original:
            checkpoint = RotatedCheckpoint(original) if rotate else original
            found = {name: checkpoint.info(name) for name in checkpoint.names()}
            allocation: Allocation | None = None

            def decide() -> tuple[ModelScheme, Calibration | None]:
                nonlocal allocation
                scheme = plan(checkpoint.engine, blocks_scheme, lm_head_bits, embedding_bits)
                limit = checkpoint.engine.max_position_embeddings
                data = None
                if target:
                    allocation = _allocation(checkpoint, scheme, found, target, shard_bytes)
                    check_replaceable(Path(out), overwrite)  # long work comes before the writer
                if calibrated:
                    _require_torch(f"method {method}")
                    length = calibration_length or min(DEFAULT_LENGTH, limit)
                    data = _calibration_data(
                        checkpoint, calibration, calibration_samples, length, HELD_OUT, calibration_seed
                    )
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
                return scheme, data

            scheme, data = world.from_main(decide)
            parts = model_parts(checkpoint.engine, scheme)
            writer = world.on_main(
                lambda: CheckpointWriter(
                    out,
                    [spec for part in parts for spec in part.specs(found)],
                    _fingerprint(checkpoint, scheme, method, weigh, data, solver),
                    shard_bytes=shard_bytes,
                    overwrite=overwrite,
                )
            )
            with writer or nullcontext():
                job = DataFreeJob(
                    world,
                    checkpoint,
                    writer,
                    parts,
                    "hlq" if calibrated else method,
                    weigh,
                    threads,
                    progress,
                )
                blocks = None
                if calibrated and data:
                    blocks = _quantize_blocks(
                        world,
                        checkpoint,
                        writer,
                        parts,
                        job,
                        data,
                        solver or method,
                        Path(out).resolve().parent if offload else None,
                        threads,
                        announce,
                    )
                job.run(parts)
                nll = None if blocks is None else blocks.evaluate()

                def finish() -> QuantizationReport:
                    assert writer is not None
                    records = {part.name: writer.done[part.name] for part in parts if part.scheme}
                    errors = {
                        name: SquaredError(record["error"], record["norm"])
                        for name, record in records.items()
                    }
                    seconds = time.monotonic() - started
                    config = {**checkpoint.config, "quantization_config": scheme.to_config()}
                    report = QuantizationReport(
                        source=os.fspath(source),
                        out=str(writer.out),
                        model_type=checkpoint.engine.model_type,
                        settings={
                            **scheme.to_config(),
                            "method": method,
                            "importance": weigh,
                            "rotate": rotate,
                            "target": target and asdict(target),
                        },
                        versions={
                            "elutq": __version__,
                            "format": scheme.version,
                            "python": platform.python_version(),
                            "numpy": np.__version__,
                        },
                        file_bytes=writer.file_bytes,
                        seconds=seconds,
                        weights_per_second=job.quantized / seconds,
                        summary=summarize(parts, found, errors),
                        calibration=None if data is None else data.record,
                        outputs={}
                        if blocks is None
                        else {k: asdict(v) for k, v in blocks.outcomes().items()},
                        blocks=[] if blocks is None else [asdict(block) for block in blocks.blocks],
                        nll=None if nll is None else asdict(nll),
                        sensitivity=allocation.record if allocation else None,
                        generation=None,
                        warnings=[*(data.warnings if data else ()), *(blocks.warnings() if blocks else ())],
                    )
                    card = model_card(
                        os.fspath(source),
                        checkpoint.path,
                        report.settings,
                        report.summary,
                        chat=_has_chat_template(checkpoint.path),
                    )
                    texts = {REPORT_FILE: report.to_json(), CARD_FILE: card}
                    writer.finish(config, side_files(checkpoint.path), texts)
                    if allocation:
                        allocation.forget()
                    return _try_out(report, checkpoint, writer.out, data) if calibrated and data else report

                return world.from_main(finish)


def _open(source: str | os.PathLike[str]) -> Checkpoint:
    checkpoint = Checkpoint.open(source)
    if checkpoint.scheme is not None:
        checkpoint.close()
        raise InvalidArgumentError(f"{source} is quantized already; give the original model")
    return checkpoint


def _check(
    method: str,
    threads: int | None,
    shard_bytes: int,
    bits: int | None,
    group_size: int | None,
    param_bits: int,
    target_bpw: float | None,
    target_bytes: int | None,
) -> tuple[Target | None, QuantScheme]:
    """The target, if there is one, and the scheme of the blocks that options ask for."""
    if method not in METHODS:
        raise InvalidArgumentError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    if threads is not None and threads < 1:
        raise InvalidArgumentError(f"threads must be at least 1, not {threads}")
    if type(shard_bytes) is not int or shard_bytes < 1:
        raise InvalidArgumentError(f"shard_bytes must be a positive integer, not {shard_bytes!r}")
    target = _target(bits, group_size, target_bpw, target_bytes)
    return target, QuantScheme(
        2 if bits is None else bits, 128 if group_size is None else group_size, param_bits
    )


def _try_out(
    report: QuantizationReport, source: Checkpoint | RotatedCheckpoint, out: Path, data: Calibration
) -> QuantizationReport:
    """Let the new model write, and draw the report, beside the weights that are in place already."""
    from elutq.report_page import level_histograms, report_figure, report_page

    windows = data.held_out if len(data.held_out) else data.token_ids
    prompts = [window[: min(_PROMPT_TOKENS, len(window) // 2)].tolist() for window in windows[:_PROMPTS]]
    with load(out) as model:
        longest = model.config.max_position_embeddings - max(map(len, prompts))
        check = check_generation(model, prompts, max_new_tokens=max(1, min(_NEW_TOKENS, longest)))
    warnings = list(report.warnings)
    if check.collapsed:
        warnings.append(f"generated text has collapsed: {check.reason}")
    report = replace(report, generation=asdict(check), warnings=warnings)
    with Checkpoint.open(out) as quantized:
        histograms = level_histograms(source, quantized, calibrated=True)
    drawn = asdict(report)
    for name, content in (
        (REPORT_FILE, report.to_json().encode()),
        (PAGE_FILE, report_page(drawn, histograms).encode()),
        (FIGURE_FILE, report_figure(drawn, histograms)),
    ):
        write_atomically(out / name, content)
    return report


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


def _quantize_blocks(
    world: World,
    checkpoint: Checkpoint | RotatedCheckpoint,
    writer: CheckpointWriter | None,
    parts: Sequence[Part],
    job: DataFreeJob,
    data: Calibration,
    solver: "SolverOptions | str",
    offload: Path | None,
    threads: int | None,
    announce: Callable[[str], None],
) -> "CalibratedJob":
    """Quantize the blocks with calibration data; embedding and head are for `job`."""
    from elutq.calibrated import METHODS as SOLVERS
    from elutq.calibrated import CalibratedJob

    job.run(part for part in parts if part.name == EMBEDDING)  # the walk begins with it
    blocks = CalibratedJob(
        checkpoint,
        parts,
        writer,
        data,
        SOLVERS[solver] if isinstance(solver, str) else solver,
        world=world,
        offload=offload,
        threads=threads,
        progress=job.advance,
    )
    needed = blocks.estimate
    each = f" in each of {world.size} processes" if world.size > 1 else ""
    announce(
        f"calibrating on {data.token_ids.size} tokens, {world.device.type}: "
        f"about {max(1, round(needed.seconds / 60))} min, {needed.memory_bytes / 1e9:.1f} GB of memory"
        + (f", {needed.offload_bytes / 1e9:.1f} GB of disk" if offload else "")
        + each
    )
    blocks.run()
    if HEAD in {part.name for part in parts if part.scheme}:
        job.known_importance[HEAD] = blocks.head_importance()
    return blocks


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
) -> str:
    """Names the source's content and every setting that the result depends on; `scheme` if it is known."""
    return json.dumps(
        {
            "elutq": __version__,
            "method": method,
            "importance": importance,
            "calibration": None if data is None else data.record,
            "solver": None if solver is None else asdict(solver),
            "rotation": checkpoint.seed if isinstance(checkpoint, RotatedCheckpoint) else None,
            "scheme": None if scheme is None else scheme.to_config(),
            "config": checkpoint.config,
            "files": checkpoint.files(),
        },
        sort_keys=True,
    )


def _has_chat_template(folder: Path) -> bool:
    try:
        return Tokenizer.from_folder(folder).has_chat_template
    except TokenizerError:  # models without a tokenizer may be quantized, too
        return False
