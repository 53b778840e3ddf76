"""Calibration and finetuning of a block by one and by several gloo processes, each on a core of its own.

    python benchmarks/scale_out.py [--stage calibration|block] [--shape tinyllama-1.1b]
        [--windows 32] [--length 512] [--runs 3]

One decoder block with random weights, and random tokens. `--stage calibration` is the block walk: streams,
moments, solves and what the processes tell each other, but not what the first does alone (reading, embedding,
head, writing). `--stage block` is block reconstruction, codes too, each window seen once. Every
process has one thread and is pinned to one core. Runs with 1 and with N processes alternate. Prints one JSON
object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from random_block import Memory, RandomModel

from elutq.architectures import block_linears
from elutq.bench import source_commit
from elutq.blocks import BlockReader
from elutq.finetune.block import BlockTuner
from elutq.finetune.options import TuneOptions, TuningText
from elutq.finetune.task import TuningTask
from elutq.gptq import SolverOptions
from elutq.layerwise import LayerwiseQuantizer
from elutq.runtime import cpu_name
from elutq.scheme import QuantScheme
from elutq.shapes import SHAPES
from elutq.world import World

Modules = list[str]
Windows = NDArray[np.int64]


def calibration(
    reader: BlockReader, model: RandomModel, modules: Modules, windows: Windows, world: World
) -> Callable[[], float]:
    """Ready to walk the block; gives the relative error of its outputs."""
    walk = LayerwiseQuantizer(
        reader,
        windows,
        windows[:0],
        {name: QuantScheme(2, 128) for name in modules},
        Memory(),
        SolverOptions(),
        world=world,
        threads=1,
    )

    def run() -> float:
        with torch.inference_mode():
            return walk.block(0).output_error

    return run


def tuning(
    reader: BlockReader, model: RandomModel, modules: Modules, windows: Windows, world: World
) -> Callable[[], float]:
    """Ready to tune the block; gives the relative error of its outputs."""
    text = TuningText(windows, windows[:2], windows[:0])
    options = TuneOptions(epochs=1, latent_rate=0.05, checks=1)
    for module in modules:  # where it would be read from a folder
        model.read_hlq(module)
    tuner = BlockTuner(TuningTask(reader, model, modules, text, options, seed=0, world=world))
    return lambda: tuner.tune(0)[1].after


def work(options: argparse.Namespace) -> None:
    """Of one process: work on one block; print the seconds, and CPU seconds of the busiest process."""
    torch.set_num_threads(1)
    with World.join("cpu") as world:
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[world.rank]})
        model = RandomModel(options.shape)
        windows = np.random.default_rng(0).integers(
            0, model.engine.vocab_size, (options.windows, options.length)
        )
        modules = [name for name, _, _ in block_linears(model.engine)]
        prepare = tuning if options.stage == "block" else calibration
        step = prepare(BlockReader(model, world.device), model, modules, windows, world)
        world.totals(0)  # all are here
        started, used = time.perf_counter(), time.process_time()
        error = step()
        seconds, used = time.perf_counter() - started, time.process_time() - used
        busiest = max(world.gather_objects(used))
        if world.is_main:
            print(json.dumps({"seconds": seconds, "cpu_seconds": busiest, "output_error": error}))


def start(processes: int, arguments: list[str]) -> dict[str, float]:
    """Run this program in some processes; what the first prints."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), __file__, "--work", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout))


def main() -> None:
    """Compare, or do the work of one process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--stage", choices=("calibration", "block"), default="calibration")
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama-1.1b")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options)
        return
    if len(os.sched_getaffinity(0)) < options.processes:
        parser.error(f"{options.processes} processes need as many cores")
    settings = {name: getattr(options, name) for name in ("stage", "shape", "windows", "length")}
    arguments = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    runs: dict[int, list[dict[str, float]]] = {1: [], options.processes: []}
    for _ in range(options.runs):
        for processes, found in runs.items():
            found.append(start(processes, arguments))
    one, several = (statistics.median(run["seconds"] for run in found) for found in runs.values())
    result: dict[str, Any] = {
        "benchmark": "scale_out",
        "commit": source_commit(),
        "cpu": cpu_name(),
        "torch": torch.__version__,
        **settings,
        "processes": options.processes,
        "runs": {str(processes): found for processes, found in runs.items()},
        "seconds": {"1": one, str(options.processes): several},
        "speedup": one / several,
    }
    print(json.dumps(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
