"""The stages of quantization, and the folders that they write.

Without finetuning there is one. With it, quantization writes a folder of its own in `OUT.stages`, each stage
of finetuning begins with the folder before it, and the last one writes OUT. A stage that is finished is not
done again; one that was killed goes on from its own partial output.
"""

import json
import math
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from elutq import __version__
from elutq.architectures import EMBEDDING, HEAD
from elutq.calibration import Calibration
from elutq.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    TensorInfo,
    check_replaceable,
    model_parts,
    side_files,
    write_atomically,
)
from elutq.data_free import DataFreeJob, Progress
from elutq.errors import InvalidArgumentError, ResumeMismatchError, TokenizerError
from elutq.finetune.options import FinetuneOptions, TuningText
from elutq.model_card import CARD_FILE, model_card
from elutq.report import ModelSummary, SquaredError, summarize
from elutq.rotation import RotatedCheckpoint
from elutq.runtime import load
from elutq.scheme import ModelScheme
from elutq.smoke import check_generation
from elutq.tokenizer import Tokenizer
from elutq.world import World

if TYPE_CHECKING:
    from elutq.calibrated import CalibratedJob, Estimate
    from elutq.gptq import SolverOptions

REPORT_FILE = "quantization_report.json"
PAGE_FILE = "quantization_report.html"
FIGURE_FILE = "quantization_report.png"

# Of the smoke test.
_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 4, 16, 96

# In `OUT.stages`: names what they are stages of; what end-to-end tuning goes on from.
_FINGERPRINT, _STATE = "fingerprint", "e2e"


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
        weights_per_second: of the first stage, in this run.
        summary: sizes and errors per tensor and per kind.
        calibration: what it was calibrated on (`Calibration.record`), None without.
        outputs: module -> how its calibration went (`layerwise.Outcome`).
        blocks: error of the residual stream after each block (`layerwise.BlockOutcome`).
        nll: both models on windows held out of the calibration (`layerwise.HeldOut`), None without.
        stages: the name of each stage, `nll` after it, its seconds, and what else it says of itself; the last
            one's `nll` is that above.
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
    stages: list[dict[str, Any]]
    sensitivity: dict[str, Any] | None
    generation: dict[str, Any] | None
    warnings: list[str]

    def to_json(self) -> str:
        """The content of `quantization_report.json`."""
        return json.dumps(asdict(self), indent=2) + "\n"


@dataclass(frozen=True)
class Job:
    """What all stages of one call share; the processes of `world` run them together.

    Attributes:
        world: the processes.
        source: the model as it was given.
        checkpoint: the full model, perhaps rotated.
        found: its tensors.
        scheme: how it is quantized.
        method: of the first stage.
        importance: whether columns are weighed there.
        calibration: what it is calibrated on; None for a method without data.
        solver: of its calibrated part.
        settings: what the report says of the options.
        text: likewise, of the text that was calibrated on, or measured on to choose bits.
        sensitivity: likewise, of the bits that were chosen.
        warnings: likewise.
        fingerprint: names the source's content and every setting that the result depends on.
        seed: of the order in which windows are trained on.
        offload: folder for activations; None keeps them in memory.
        threads: of each process.
        overwrite: replace what is there.
        shard_bytes: most tensor bytes in one weight file.
        progress: called by the first process, as in `quantize`.
        announce: likewise.
    """

    world: World
    source: str
    checkpoint: Checkpoint | RotatedCheckpoint
    found: Mapping[str, TensorInfo]
    scheme: ModelScheme
    method: str
    importance: bool
    calibration: Calibration | None
    solver: "SolverOptions | None"
    settings: dict[str, Any]
    text: dict[str, Any] | None
    sensitivity: dict[str, Any] | None
    warnings: list[str]
    fingerprint: str
    seed: int
    offload: Path | None
    threads: int | None
    overwrite: bool
    shard_bytes: int
    progress: Progress
    announce: Callable[[str], None]

    def run(self, out: Path, finetune: FinetuneOptions | None, text: TuningText | None) -> QuantizationReport:
        """Everything, up to the report.

        Args:
            out: the folder to make.
            finetune: what follows quantization, if anything does.
            text: for that.
        """
        if finetune is None or text is None:
            report = self._quantize(out, overwrite=self.overwrite)
        else:
            report = self._climb(out, finetune, text)
        return self.world.from_main(lambda: self._try_out(report))

    def _quantize(self, out: Path, *, overwrite: bool) -> QuantizationReport | None:
        """The first stage; the report is the first process's, as those below."""
        started = time.monotonic()
        parts = model_parts(self.checkpoint.engine, self.scheme)
        writer = self._writer(out, self.found, overwrite)
        with writer or nullcontext():
            job = DataFreeJob(
                self.world,
                self.checkpoint,
                writer,
                parts,
                "hlq" if self.calibration else self.method,
                self.importance,
                self.threads,
                self.progress,
            )
            blocks = self._calibrate(job, writer) if self.calibration else None
            job.run(parts)
            nll = None if blocks is None else blocks.evaluate()

            def finish() -> QuantizationReport:
                assert writer is not None
                records = {part.name: writer.done[part.name] for part in parts if part.scheme}
                errors = {
                    name: SquaredError(record["error"], record["norm"]) for name, record in records.items()
                }
                seconds = time.monotonic() - started
                scores = None if nll is None else asdict(nll)
                stage = {"name": self.method, "seconds": seconds, "nll": scores}
                report = QuantizationReport(
                    source=self.source,
                    out=str(writer.out),
                    model_type=self.checkpoint.engine.model_type,
                    settings=self.settings,
                    versions={
                        "elutq": __version__,
                        "format": self.scheme.version,
                        "python": platform.python_version(),
                        "numpy": np.__version__,
                    },
                    file_bytes=writer.file_bytes,
                    seconds=seconds,
                    weights_per_second=job.quantized / seconds,
                    summary=summarize(parts, self.found, errors),
                    calibration=self.text,
                    outputs={} if blocks is None else {k: asdict(v) for k, v in blocks.outcomes().items()},
                    blocks=[] if blocks is None else [asdict(block) for block in blocks.blocks],
                    nll=scores,
                    stages=[stage] if self.calibration else [],
                    sensitivity=self.sensitivity,
                    generation=None,
                    warnings=[*self.warnings, *(blocks.warnings() if blocks else ())],
                )
                self._finish(writer, report)
                return report

            return self.world.on_main(finish)

    def _climb(self, out: Path, options: FinetuneOptions, text: TuningText) -> QuantizationReport | None:
        """All stages."""
        started = time.monotonic()
        work = out.with_name(f"{out.name}.stages")
        self.world.on_main(lambda: self._prepare(work, out, options))
        folders = [work / self.method, *(work / stage for stage in options.stages[:-1]), out]
        missing = [
            (stage, base, target)
            for stage, base, target in zip(options.stages, folders[:-1], folders[1:], strict=True)
            if target == out or not self._exists(target)
        ]
        needed = self._estimate([stage for stage, _, _ in missing], options, text)
        self.world.on_main(lambda: self._begin(work))
        if not self._exists(folders[0]):
            self._quantize(folders[0], overwrite=False)
        report = None
        for stage, base, target in missing:
            overwrite = target == out and self.overwrite
            report = self._finetune(
                stage, base, target, overwrite, options, text, work / _STATE, needed[stage]
            )

        def finish() -> QuantizationReport:
            assert report is not None
            shutil.rmtree(work)
            return replace(report, seconds=time.monotonic() - started)

        return self.world.on_main(finish)

    def _estimate(
        self, stages: Sequence[str], options: FinetuneOptions, text: TuningText
    ) -> dict[str, "Estimate"]:
        """Say what stages of finetuning will need, and make sure that it is there."""
        from elutq.calibrated import torch_settings
        from elutq.finetune_estimate import check, estimate

        engine, world = self.checkpoint.engine, self.world
        needed = {}
        with torch_settings(self.threads or world.threads, world.device):
            for stage in stages:
                needed[stage] = estimate(stage, engine, self.scheme, text, options, world)
        for stage, part in needed.items():
            world.everywhere(partial(check, stage, part, self.offload, world))
        self._announce("finetuning", text.train.size, *needed.values())
        return needed

    def _announce(self, work: str, tokens: int, *needed: "Estimate") -> None:
        """What such work on so many tokens will need, one part after the other."""
        memory = max(part.memory_bytes for part in needed) / 1e9
        kept = max(part.activation_bytes for part in needed) / 1e9
        room = f"{memory:.1f} GB of memory, {kept:.1f} GB of disk"
        self.announce(
            f"{work} on {tokens} tokens, {self.world.device.type}: "
            f"about {max(1, round(sum(part.seconds for part in needed) / 60))} min, "
            + (room if self.offload else f"{memory + kept:.1f} GB of memory")
            + (f" in each of {self.world.size} processes" if self.world.size > 1 else "")
        )

    def _exists(self, folder: Path) -> bool:
        return self.world.from_main(folder.exists)

    def _prepare(self, work: Path, out: Path, options: FinetuneOptions) -> None:
        """Make sure that a folder of stages is this call's, and that OUT can be made: long work follows."""
        if options.shard and any(self.checkpoint.engine.sparse_layers):
            raise InvalidArgumentError(
                "mixtures of experts cannot be sharded: not every process uses each expert"
            )
        for stage in options.stages:
            options.tuning(stage).check_processes(self.world.size)
        check_replaceable(out, self.overwrite)
        name = work / _FINGERPRINT
        # Without a name they are what is left of others.
        if work.exists() and not (name.exists() and name.read_text() == self.fingerprint):
            if not self.overwrite:
                raise ResumeMismatchError(
                    f"{work} holds stages of another source or of other settings; delete it, or say overwrite"
                )
            shutil.rmtree(work)

    def _begin(self, work: Path) -> None:
        """Make the folder of the stages."""
        work.mkdir(parents=True, exist_ok=True)
        write_atomically(work / _FINGERPRINT, self.fingerprint.encode())

    def _finetune(
        self,
        stage: str,
        base: Path,
        out: Path,
        overwrite: bool,
        options: FinetuneOptions,
        text: TuningText,
        state: Path,
        needed: "Estimate",
    ) -> QuantizationReport | None:
        """One stage of finetuning."""
        from elutq.calibrated import place
        from elutq.finetuned import FinetuneJob

        started = time.monotonic()
        # What is trained is stored as it is.
        found = {
            name: replace(info, dtype="F32") if len(info.shape) == 1 else info
            for name, info in self.found.items()
        }
        parts = model_parts(self.checkpoint.engine, self.scheme)
        opened = self.world.on_main(lambda: Checkpoint.open(base))
        writer = self._writer(out, found, overwrite)
        with opened or nullcontext(), writer or nullcontext():
            total = sum(math.prod(part.shape) for part in parts)
            job = FinetuneJob(
                self.checkpoint,
                opened,
                parts,
                writer,
                text,
                options.tuning(stage),
                seed=self.seed,
                world=self.world,
                place=place(needed, self.offload, self.world.device),
                threads=self.threads,
                progress=lambda share, what: self.progress(round(share * total), total, what),
            )
            if stage == "block":
                blocks, nll = job.blocks()
                record: dict[str, Any] = {"blocks": [asdict(block) for block in blocks]}
            else:
                outcome, nll = job.end_to_end(state, options)
                record = asdict(outcome)

            def finish() -> QuantizationReport:
                assert writer is not None
                before = json.loads((base / REPORT_FILE).read_text())
                seconds = time.monotonic() - started
                now = {"name": stage, "seconds": seconds, "nll": nll and asdict(nll), **record}
                report = QuantizationReport(
                    **{
                        **before,
                        "out": str(writer.out),
                        "settings": self.settings,
                        "file_bytes": writer.file_bytes,
                        "seconds": seconds,
                        "summary": summarize(parts, found, job.errors()),
                        "nll": now["nll"],
                        "stages": [*before["stages"], now],
                    }
                )
                self._finish(writer, report)
                return report

            return self.world.on_main(finish)

    def _writer(self, out: Path, found: Mapping[str, TensorInfo], overwrite: bool) -> CheckpointWriter | None:
        parts = model_parts(self.checkpoint.engine, self.scheme)
        return self.world.on_main(
            lambda: CheckpointWriter(
                out,
                [spec for part in parts for spec in part.specs(found)],
                self.fingerprint,
                shard_bytes=self.shard_bytes,
                overwrite=overwrite,
            )
        )

    def _calibrate(self, job: DataFreeJob, writer: CheckpointWriter | None) -> "CalibratedJob":
        """Quantize the blocks with calibration data; embedding and head are for `job`."""
        from elutq.calibrated import METHODS as SOLVERS
        from elutq.calibrated import CalibratedJob

        assert self.calibration is not None
        world, parts = self.world, model_parts(self.checkpoint.engine, self.scheme)
        job.run(part for part in parts if part.name == EMBEDDING)  # the walk begins with it
        blocks = CalibratedJob(
            self.checkpoint,
            parts,
            writer,
            self.calibration,
            self.solver or SOLVERS[self.method],
            world=world,
            offload=self.offload,
            threads=self.threads,
            progress=job.advance,
        )
        self._announce("calibrating", self.calibration.token_ids.size, blocks.estimate)
        blocks.run()
        if HEAD in {part.name for part in parts if part.scheme}:
            job.known_importance[HEAD] = blocks.head_importance()
        return blocks

    def _finish(self, writer: CheckpointWriter, report: QuantizationReport) -> None:
        """Put a folder in place."""
        config = {**self.checkpoint.config, "quantization_config": self.scheme.to_config()}
        card = model_card(
            self.source,
            self.checkpoint.path,
            report.settings,
            report.summary,
            chat=_has_chat_template(self.checkpoint.path),
        )
        texts = {REPORT_FILE: report.to_json(), CARD_FILE: card}
        writer.finish(config, side_files(self.checkpoint.path), texts)

    def _try_out(self, report: QuantizationReport | None) -> QuantizationReport:
        """Let a calibrated model write, and draw the report, beside the weights that are in place already."""
        assert report is not None
        data, out = self.calibration, Path(report.out)
        if data is None:
            return report
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
            histograms = level_histograms(self.checkpoint, quantized, calibrated=True)
        drawn = asdict(report)
        for name, content in (
            (REPORT_FILE, report.to_json().encode()),
            (PAGE_FILE, report_page(drawn, histograms).encode()),
            (FIGURE_FILE, report_figure(drawn, histograms)),
        ):
            write_atomically(out / name, content)
        return report


def _has_chat_template(folder: Path) -> bool:
    try:
        return Tokenizer.from_folder(folder).has_chat_template
    except TokenizerError:  # models without a tokenizer may be quantized, too
        return False
