"""What finetuning is said to need: counted by hand, and refused where it is not there."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from elutq import finetune_estimate
from elutq.architectures import EngineConfig, block_linears, engine_config
from elutq.calibrated import BASE_BYTES, Estimate, check_memory, place
from elutq.errors import InsufficientMemoryError
from elutq.finetune.options import FinetuneOptions, TuneOptions, TuningText
from elutq.models import bundled_model
from elutq.quantize import quantize
from elutq.scheme import ModelScheme, QuantScheme
from elutq.world import World

LENGTH = 8
OPTIONS = FinetuneOptions(block=TuneOptions(2, batch=4, latent_rate=1, checks=4), e2e=TuneOptions(1, batch=4))


@pytest.fixture
def engine(golden: Any) -> EngineConfig:
    return engine_config(golden.CONFIG)


@pytest.fixture
def world() -> Any:
    with World.join("cpu") as alone:
        yield alone


def text(train: int = 18, held_out: int = 3, report: int = 1, length: int = LENGTH) -> TuningText:
    parts = (np.zeros((count, length), np.int64) for count in (train, held_out, report))
    return TuningText(*parts)


def needs(
    stage: str,
    engine: EngineConfig,
    world: World,
    *,
    options: Any = OPTIONS,
    windows: Any = None,
) -> Estimate:
    scheme = ModelScheme(QuantScheme(2, 32))
    return finetune_estimate.estimate(stage, engine, scheme, windows or text(), options, world)


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds are operations alone."""
    monkeypatch.setattr(finetune_estimate, "speed", lambda *_: 1.0)
    monkeypatch.setattr(finetune_estimate, "_traffic", lambda *_: float("inf"))


def in_passes(engine: EngineConfig) -> int:
    """Weights that a token meets, attention counted as such."""
    attention = 2 * LENGTH * engine.num_attention_heads * engine.head_dim * engine.num_hidden_layers
    return attention + sum(linear.out_features * linear.in_features for linear in block_linears(engine))


@pytest.mark.usefixtures("operations")
def test_operations_are_those_of_the_passes(engine: EngineConfig, world: World) -> None:
    weights = in_passes(engine)
    head = engine.vocab_size * engine.hidden_size
    # 16 of 18 windows make 4 batches. Block: 8 steps, looks at 0, 2, 4, 6 and 8, all of 3 windows.
    passes = 4 * (16 + 3 + 1) + 6 * 32 + 2 * 5 * 3
    assert needs("block", engine, world).seconds == LENGTH * (passes * weights + 14 * head)
    # End to end: 4 steps, five looks.
    passes = 2 * (16 + 3 + 1) + 6 * 16 + 2 * (5 * 3 + 1)
    heads = 6 * (16 + 5 * 3) + 14
    assert needs("e2e", engine, world).seconds == LENGTH * (passes * weights + heads * head)
    plain = needs("e2e", engine, world, options=replace(OPTIONS, objective="lm"))
    assert plain.seconds == LENGTH * (passes * weights + (4 * (16 + 5 * 3) + 14) * head)


@pytest.mark.usefixtures("operations")
def test_activations_that_are_computed_again_cost_two_more(
    engine: EngineConfig, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = needs("e2e", engine, world)
    monkeypatch.setattr("elutq.finetune.end_to_end._KEPT_BYTES", 0)
    weights = in_passes(engine)
    assert needs("e2e", engine, world).seconds - before.seconds == 2 * 16 * LENGTH * weights
    assert needs("block", engine, world).seconds < before.seconds * 4


@pytest.mark.usefixtures("operations")
def test_processes_share_the_windows(
    engine: EngineConfig, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = text(16, 4, 4)
    alone = [needs(stage, engine, world, windows=windows) for stage in ("block", "e2e")]
    monkeypatch.setattr(world, "size", 4)
    shared = [needs(stage, engine, world, windows=windows) for stage in ("block", "e2e")]
    for one, four in zip(alone, shared, strict=True):
        assert four.seconds == one.seconds / 4
        assert four.activation_bytes == one.activation_bytes / 4
        assert four.memory_bytes <= one.memory_bytes


def test_experts_are_met_by_their_share_of_tokens(golden: Any) -> None:
    sparse = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2}
    sparse |= {"moe_intermediate_size": 32, "norm_topk_prob": True, "decoder_sparse_step": 1}
    engine = engine_config(golden.CONFIG | sparse | {"mlp_only_layers": []})
    sizes = finetune_estimate._Sizes(*finetune_estimate._sizes(engine, ModelScheme(QuantScheme(2, 32)))[0])
    experts = 8 * 3 * 32 * engine.hidden_size
    assert sizes.weights - sizes.active == experts * 3 / 4


def test_memory_is_counted(engine: EngineConfig, world: World) -> None:
    weights = sum(linear.out_features * linear.in_features for linear in block_linears(engine))
    fixed = needs("e2e", engine, world)
    latent = needs("e2e", engine, world, options=replace(OPTIONS, e2e=replace(OPTIONS.e2e, latent_rate=1)))
    assert latent.memory_bytes - fixed.memory_bytes == 20 * weights
    for stage, streams in (("block", 3), ("e2e", 2)):
        needed = needs(stage, engine, world)
        assert needed.activation_bytes == streams * 4 * 20 * LENGTH * engine.hidden_size
        assert needed.memory_bytes > BASE_BYTES
        assert needed.seconds > 0


def test_a_sharded_model_is_held_together(
    engine: EngineConfig, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world, "size", 2)
    latent = replace(OPTIONS, e2e=replace(OPTIONS.e2e, latent_rate=1))
    whole, sharded = (needs("e2e", engine, world, options=replace(latent, shard=s)) for s in (False, True))
    sizes = finetune_estimate._sizes(engine, ModelScheme(QuantScheme(2, 32)))
    weights, _, parameters, *_ = sizes.sum(0)
    saved = (20 * (weights + parameters) + weights) / 2
    weights, _, parameters, *_ = sizes.max(0)
    assert whole.memory_bytes - sharded.memory_bytes == round(saved - 2 * (5 * weights + 4 * parameters))
    alone = needs("block", engine, world, options=replace(latent, shard=True))
    assert alone == replace(needs("block", engine, world, options=latent), seconds=alone.seconds)


def test_bits_and_latent_weights_cost_time(
    engine: EngineConfig, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune_estimate, "speed", lambda *_: float("inf"))
    monkeypatch.setattr(finetune_estimate, "_traffic", lambda *_: 1.0)
    monkeypatch.setattr(finetune_estimate, "activation_bytes", lambda *_: 0)
    fixed = replace(OPTIONS, block=replace(OPTIONS.block, latent_rate=0))
    assert needs("block", engine, world).seconds > 1.5 * needs("block", engine, world, options=fixed).seconds


@pytest.mark.parametrize(
    ("stage", "offload", "advice"),
    [
        ("block", False, r"block by block needs .* try --offload, or fewer or shorter windows"),
        ("block", True, r"try fewer or shorter windows"),
        ("e2e", False, r"end to end needs .* try --offload, or --finetune block, or fewer"),
    ],
)
def test_what_does_not_fit_is_refused(
    stage: str,
    offload: bool,
    advice: str,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("elutq.calibrated._free_memory", lambda device: 10**9)
    folder = tmp_path if offload else None
    kept = 10**12 if offload else 10**8
    finetune_estimate.check(stage, Estimate(1.0, 9 * 10**8, kept), folder, world)
    with pytest.raises(InsufficientMemoryError, match=advice):
        finetune_estimate.check(stage, Estimate(1.0, 10**9 + 1 - kept % 10**12, kept), folder, world)


@pytest.mark.parametrize(
    ("on_gpu", "on_cpu", "refused"),
    [(10, 3, None), (9, 10, None), (4, 10, "on the GPU"), (9, 3, "5.7 GB of memory, but 3.0 GB are free")],
)
def test_what_a_gpu_cannot_keep_goes_to_the_cpu(
    on_gpu: int, on_cpu: int, refused: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = torch.device("cuda")
    free = {"cuda": on_gpu * 10**9, "cpu": on_cpu * 10**9}
    monkeypatch.setattr("elutq.calibrated._free_memory", lambda device: free[device.type])
    needed = Estimate(1.0, 5 * 10**9, 5 * 10**9)
    assert place(needed, None, gpu).type == ("cuda" if on_gpu >= 10 else "cpu")
    assert place(needed, tmp_path, gpu) == tmp_path
    if refused is None:
        check_memory(needed, None, gpu)
    else:
        with pytest.raises(InsufficientMemoryError, match=refused):
            check_memory(needed, None, gpu)


def test_nothing_is_begun_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_words: Callable[[Path], Path]
) -> None:
    monkeypatch.setattr("elutq.calibrated._free_memory", lambda device: 1 << 20)
    said: list[str] = []
    with pytest.raises(InsufficientMemoryError, match="finetuning"):
        quantize(
            bundled_model(),
            tmp_path / "out",
            calibration=[str(make_words(tmp_path / "words.txt"))],
            calibration_length=32,
            calibration_samples=4,
            finetune=["block"],
            finetune_samples=4,
            announce=said.append,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["words.txt"]
    assert not said


@pytest.fixture
def make_words() -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        words = np.random.default_rng(0).choice(["the", "cat", "sat", "on", "a", "mat", "and", "ran"], 4000)
        path.write_text(" ".join(words))
        return path

    return make
