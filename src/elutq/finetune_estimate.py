"""What finetuning will need: time, memory and disk, counted before it begins."""

import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from elutq.architectures import EngineConfig, block_linears
from elutq.calibrated import BASE_BYTES, Estimate, check_memory, speed
from elutq.finetune.end_to_end import activation_bytes, recomputes
from elutq.finetune.options import FinetuneOptions, TuningText
from elutq.finetune.soft_weights import FUSED, PART
from elutq.layerwise import may_round
from elutq.scheme import ModelScheme
from elutq.world import World

# Bytes that go through memory, as `_traffic` measures it, fitted to what `QuantizedLinear` and Adam take.
_PLANE_BYTES = 25  # per weight and bit plane: to build W~, and as many for the gradients of scales and zeros
_LEVEL_BYTES = 10  # per weight and level: to find the nearest one of a latent weight
# While weights are soft: moved in a step, per latent weight; by torch more, and held by it.
_SOFT, _SOFT_BY_TORCH, _SOFT_HELD = 80, 400, 48
_ADAM_BYTES = 50  # per parameter and step, with the gradients' norm
_LOGIT_BYTES = 60  # per logit of both models, softmax and gradient

_STATE_BYTES = 20  # of a trained parameter: itself, its gradient, two moments, the best that was seen
_LOGITS_BYTES = 5 * 4 * (1 << 24)  # of the logits in work at once
_PIECE_TOKENS = 4096  # that go through a block together, at least


class _Sizes(NamedTuple):
    """Of a block, or of all; a token meets `active` of the weights. Planes and levels: sums over weights."""

    weights: float
    active: float
    parameters: float
    planes: float
    levels: float


def estimate(
    stage: str,
    engine: EngineConfig,
    scheme: ModelScheme,
    text: TuningText,
    options: FinetuneOptions,
    world: World,
) -> Estimate:
    """Count operations and bytes of a stage in one process; short trials tell how fast its device is.

    Per token and weight of a block, the full model spends 2 operations, as does the tuned one where it is
    only looked at, and 6 where it is trained, 8 if activations are computed again on the way back. Heads are
    run by both models. A token that attends to n others is 2 n more weights for each head's dimension. In
    every step, and for every window held out, W~ is built anew from codes and scales.

    """
    tuning = options.tuning(stage)
    latent = tuning.latent_rate > 0
    blocks = _sizes(engine, scheme)
    total, largest = _Sizes(*blocks.sum(0)), _Sizes(*blocks.max(0))
    trained = total.parameters + (total.weights if latent else 0)

    length = text.train.shape[1]
    batches = len(text.train) // tuning.batch
    steps = batches * tuning.epochs
    share = math.ceil(tuning.batch / world.size)
    held_out, reported = (math.ceil(len(part) / world.size) for part in (text.held_out, text.report))
    looks = 1 + math.ceil(steps / max(1, steps // tuning.checks)) if steps else 1
    windows, seen, judged = batches * share + held_out + reported, steps * share, looks * held_out
    again = stage == "e2e" and recomputes(engine, length, tuning, world)

    layers, head = engine.num_hidden_layers, engine.vocab_size * engine.hidden_size
    active = total.active + layers * 2 * length * engine.num_attention_heads * engine.head_dim
    if stage == "block":
        full_passes, tuned_passes, judged_builds, at_heads = 4 * windows, 2 * judged, judged, 0
    else:
        judged_builds = judged + reported
        full_passes, tuned_passes, at_heads = 2 * windows, 2 * judged_builds, seen + judged
    tuned_passes += (8 if again else 6) * seen
    heads = (6 if options.objective == "kl" else 4) * at_heads + 14 * reported
    full = length * (active * full_passes + head * heads)
    device = world.device
    soft = _SOFT if device.type in FUSED else _SOFT_BY_TORCH
    planes = _PLANE_BYTES * total.planes
    if latent:
        moved = judged_builds * (planes + _LEVEL_BYTES * total.levels) + steps * soft * total.weights
    else:
        moved = (judged_builds + steps * (3 if again else 2)) * planes
    moved += steps * _ADAM_BYTES * trained
    moved += _LOGIT_BYTES * engine.vocab_size * length * (at_heads + 2 * reported)
    moved += activation_bytes(engine, length) * layers * (full_passes + tuned_passes)
    fast = torch.bfloat16 if device.type == "cuda" else torch.float32
    seconds = full / speed(device) + length * active * tuned_passes / speed(device, fast)
    largest_matrix = max(a.out_features * a.in_features for a in block_linears(engine))
    seconds += moved / _traffic(device, largest_matrix)

    shards = world.size if stage == "e2e" and options.shard else 1
    memory = _memory(stage, engine, total, largest, share * length, latent, again, shards)
    if latent and device.type not in FUSED:
        memory += _SOFT_HELD * min(largest_matrix, PART)
    streams = 3 if stage == "block" else 2
    kept = 4 * windows
    if stage == "block" and may_round(device):
        kept -= 2 * (windows - reported)
    return Estimate(float(seconds), round(memory), streams * kept * length * engine.hidden_size)


def _memory(
    stage: str,
    engine: EngineConfig,
    total: _Sizes,
    largest: _Sizes,
    tokens: int,
    latent: bool,
    again: bool,
    shards: int,
) -> float:
    """Bytes beside activations kept, in steps of so many tokens; so many `shards` of the model."""
    trained = largest if stage == "block" else total
    built = total if stage == "e2e" and not again else largest  # W~, which the way back needs
    memory = trained.weights + _STATE_BYTES * (trained.parameters + (trained.weights if latent else 0))
    if shards > 1:  # two blocks are whole at a time: one at work, one on its way
        whole = largest.weights + 4 * (largest.parameters + (largest.weights if latent else 0))
        memory = memory / shards + 2 * whole
    memory += 4 * built.weights + 4 * largest.weights
    memory += activation_bytes(engine, max(tokens, _PIECE_TOKENS))
    at_the_head = 2 * 4 * engine.vocab_size * engine.hidden_size + _LOGITS_BYTES
    if stage == "block":
        return BASE_BYTES + max(memory, at_the_head)
    kept = 4 * engine.hidden_size * tokens if again else activation_bytes(engine, tokens)
    return BASE_BYTES + memory + at_the_head + kept * engine.num_hidden_layers


def check(stage: str, needed: Estimate, offload: Path | None, world: World) -> None:
    """Compare what a stage needs with what is free on this machine.

    Raises:
        InsufficientMemoryError: it is more; says what would help.
    """
    name = {"block": "finetuning block by block", "e2e": "finetuning end to end"}[stage]
    advice = [*(["--finetune block"] if stage == "e2e" else []), "fewer or shorter windows"]
    check_memory(needed, offload, world.device, world.local_size, work=name, advice=advice)


def _sizes(engine: EngineConfig, scheme: ModelScheme) -> NDArray[np.float64]:
    """`_Sizes` of each block, [blocks, 5]."""
    sizes = np.zeros((engine.num_hidden_layers, 5))
    for linear in block_linears(engine):
        weights = linear.out_features * linear.in_features
        own = scheme.for_block_linear(linear.name)
        met = engine.num_experts_per_tok / engine.num_experts if ".experts." in linear.name else 1
        parameters = planes = levels = 0
        if own is not None:
            groups = 1 if own.group_size == -1 else -(-linear.in_features // own.group_size)
            parameters = linear.out_features * groups * (own.bits + 1)
            planes, levels = weights * own.bits, weights * 2**own.bits
        block = int(linear.name.split(".")[2])
        sizes[block] += weights, weights * met, parameters, planes, levels
    return sizes


def _traffic(device: torch.device, size: int) -> float:
    """Bytes per second of a product, element by element, of arrays as large as the largest matrix."""
    a = torch.ones(size, device=device)
    repeats = max(1, (1 << 24) // size)
    a * a
    started = time.perf_counter()
    for _ in range(repeats):
        product = a * a
    float(product[0])
    return 12 * size * repeats / (time.perf_counter() - started)
