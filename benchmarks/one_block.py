"""What it takes to quantize and to finetune a model on a device, from a block or a few of it.

    python benchmarks/one_block.py [--shape llama-3-8b] [--bits 2] [--device cuda] [--out FILE]

A block with random weights on random inputs. HLQ-GPTQ calibrates on `--windows`, then block reconstruction
tunes its result on `--tuned` windows, each as `elutq quantize --effort balanced` would. Counted is all that
is done for the block, with the streams of activations; not files, embedding and head. A smaller run before
it loads and compiles what comes first.

End-to-end tuning is measured with two and four blocks and fewer windows, and said to take a + b blocks +
c windows + d blocks windows, in seconds and in memory. Prints one JSON object.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from random_block import Memory, RandomModel
from torch import Tensor

from elutq.architectures import block_linears
from elutq.bench import source_commit
from elutq.blocks import BlockReader
from elutq.calibrated import torch_settings
from elutq.finetune.block import BlockTuner, TunedOutcome
from elutq.finetune.end_to_end import EndToEndOutcome, EndToEndTuner
from elutq.finetune.options import FinetuneOptions, TuningText
from elutq.finetune.task import TuningTask
from elutq.gptq import SolverOptions
from elutq.layerwise import LayerwiseQuantizer
from elutq.quantize import HELD_OUT, JUDGES
from elutq.runtime import cpu_name
from elutq.scheme import QuantScheme
from elutq.shapes import SHAPES
from elutq.world import World

#: Of end-to-end tuning: blocks, enough to recompute activations as a model does, and shares of the windows.
_BLOCKS = (2, 4)
_SHARES = (32, 8)


class RandomStreams(BlockReader):
    """Reads a block, and draws what goes into it."""

    def embed(self, token_ids: Tensor) -> Tensor:
        """Normal numbers, the same for the same tokens."""
        generator = torch.Generator(self._device).manual_seed(int(token_ids.sum()))
        shape = *token_ids.shape, self.engine.hidden_size
        return torch.randn(shape, generator=generator, device=self._device)


class Measured:
    """Seconds of some work on a device and, of a GPU, the most memory it took."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"

    def __call__(self, work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
        """What the work gives, and the figures."""
        if self._gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        given = work()
        if self._gpu:
            torch.cuda.synchronize()
        figures = {"seconds": time.perf_counter() - started}
        if self._gpu:
            figures["peak_bytes"] = torch.cuda.max_memory_allocated()
        return given, figures


class Blocks:
    """Blocks and their inputs."""

    def __init__(self, shape: str, bits: int, length: int, world: World, count: int = 1) -> None:
        self.model, self.world, self.length = RandomModel(shape, count), world, length
        self.reader = RandomStreams(self.model, world.device)
        self.modules = [name for name, _, _ in block_linears(self.model.engine)]
        self.schemes = {name: QuantScheme(bits, 128) for name in self.modules}
        for module in self.modules:  # drawn before the clock runs
            self.model.read_float32(f"{module}.weight")

    def tokens(self, windows: int) -> NDArray[np.int64]:
        """Token ids, [windows, length]; they stand for random inputs."""
        return np.random.default_rng(windows).integers(0, 1 << 20, (windows, self.length))

    def calibrate(self, windows: int, measured: Measured) -> dict[str, float]:
        """HLQ-GPTQ; its result is what `tune` begins with."""
        store, options = Memory(), SolverOptions()
        walk = LayerwiseQuantizer(
            self.reader,
            self.tokens(windows),
            self.tokens(HELD_OUT),
            self.schemes,
            store,
            options,
            world=self.world,
            place=self.world.device,
        )
        with torch.inference_mode():
            outcome, figures = measured(lambda: walk.block(0))
        self.model.quantized = store.matrices
        return {"windows": windows, "output_error": outcome.output_error, **figures}

    def task(self, stage: str, windows: int) -> TuningTask:
        """A stage of finetuning."""
        text = TuningText(self.tokens(windows), self.tokens(JUDGES), self.tokens(HELD_OUT))
        return TuningTask(
            self.reader,
            self.model,
            self.modules,
            text,
            FinetuneOptions().tuning(stage),
            seed=0,
            world=self.world,
            place=self.world.device,
        )

    def tune(self, windows: int, measured: Measured) -> dict[str, Any]:
        """Block reconstruction of the first."""
        tuner = BlockTuner(self.task("block", windows))

        def work() -> TunedOutcome:
            tuned, outcome = tuner.tune(0)
            tuner.advance(0, tuned)
            return outcome

        outcome, figures = measured(work)
        errors = {"before": outcome.before, "after": outcome.after}
        return {"windows": windows, "steps": outcome.steps, **errors, **figures}

    def tune_all(self, windows: int, measured: Measured) -> dict[str, Any]:
        """End-to-end tuning."""
        for module in self.modules:
            self.model.read_hlq(module)

        def work() -> EndToEndOutcome:
            tuner = EndToEndTuner(self.task("e2e", windows))
            return tuner.tune(Path("unused"), float("inf"))[1]

        outcome, figures = measured(work)
        return {"windows": windows, "steps": outcome.steps, **figures}


def extrapolate(runs: Sequence[Mapping[str, Any]], blocks: int, windows: int) -> dict[str, float]:
    """Seconds and bytes of so many blocks and windows, from four runs with two numbers of each."""
    terms = np.array([[1, run["blocks"], run["windows"], run["blocks"] * run["windows"]] for run in runs])
    wanted = np.array([1, blocks, windows, blocks * windows])
    names = [name for name in ("seconds", "peak_bytes") if name in runs[0]]
    return {name: float(wanted @ np.linalg.solve(terms, [run[name] for run in runs])) for name in names}


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=128, help="to calibrate on")
    parser.add_argument("--tuned", type=int, default=512, help="windows to finetune on")
    parser.add_argument("--device", help="by default a GPU if there is one")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    with World.join(options.device) as world, torch_settings(None, world.device):
        given = options.shape, options.bits, options.length, world
        block, measured = Blocks(*given), Measured(world.device)
        if world.device.type == "cuda":
            block.calibrate(2, measured)
            block.tune(8, measured)
        calibration = block.calibrate(options.windows, measured)
        tuning = block.tune(options.tuned, measured)
        del block
        end_to_end = []
        for count in _BLOCKS:
            few = Blocks(*given, count)
            few.tune_all(8, measured)
            numbers = [max(4, options.tuned // share) for share in _SHARES]
            end_to_end += [{"blocks": count, **few.tune_all(windows, measured)} for windows in numbers]
        device = torch.cuda.get_device_name() if world.device.type == "cuda" else cpu_name()
    layers = SHAPES[options.shape]["num_hidden_layers"]
    result: dict[str, Any] = {
        "benchmark": "one_block",
        "commit": source_commit(),
        "device": device,
        "cpu": cpu_name(),
        "torch": torch.__version__,
        **{name: getattr(options, name) for name in ("shape", "bits", "length")},
        "hlq_gptq": calibration,
        "block_reconstruction": tuning,
        "end_to_end": end_to_end,
        "model": {
            "hlq_gptq": {**calibration, "seconds": layers * calibration["seconds"]},
            "block_reconstruction": {**tuning, "seconds": layers * tuning["seconds"]},
            "end_to_end": extrapolate(end_to_end, layers, options.tuned),
        },
    }
    print(json.dumps(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
