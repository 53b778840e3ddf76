"""The smoke test tells models that speak from those that do not."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from elutq.errors import ContextOverflowError, InvalidArgumentError, TokenizerError
from elutq.models import bundled_model
from elutq.quantize import quantize
from elutq.runtime import LanguageModel, load, random_model
from elutq.smoke import GenerationCheck, check_generation, diagnose, is_loop

PROMPTS = ["Once upon a time", "The little dog ran to the", "In the morning, the old man went"]

Edit = Callable[[NDArray[np.float32]], NDArray[np.float32]]


@pytest.fixture(scope="module")
def model() -> Iterator[LanguageModel]:
    with load(bundled_model(), threads=1) as full:
        yield full


def check(folder: Path) -> GenerationCheck:
    with load(folder, threads=1) as model:
        return check_generation(model, PROMPTS, max_new_tokens=64)


def damaged(folder: Path, name: str, edit: Edit) -> Path:
    """A copy of the bundled model with the tensors whose name ends so changed."""
    shutil.copytree(bundled_model(), folder)
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    for tensor, info in json.loads(content[8:start]).items():
        if tensor.endswith(name):
            first, end = (start + offset for offset in info["data_offsets"])
            values = np.frombuffer(content[first:end], ml_dtypes.bfloat16).astype(np.float32)
            content[first:end] = edit(values).astype(ml_dtypes.bfloat16).tobytes()
    file.write_bytes(content)
    return folder


def test_the_full_model_speaks_and_says_the_same_again(model: LanguageModel) -> None:
    first = check_generation(model, PROMPTS, samples=2)
    assert (first.collapsed, first.reason, first.prompt) == (False, None, PROMPTS[0])
    assert len(first.text.split()) > 10
    assert first == check_generation(model, PROMPTS, samples=2)
    assert first.text != check_generation(model, PROMPTS, samples=2, seed=1).text


@pytest.mark.parametrize("prompt", PROMPTS)
def test_one_prompt_is_enough_for_a_sane_model(model: LanguageModel, prompt: str) -> None:
    assert not check_generation(model, [prompt]).collapsed


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_hlq_speaks(tmp_path: Path, bits: int) -> None:
    quantize(bundled_model(), tmp_path / "q", bits=bits)
    assert check(tmp_path / "q").reason is None


def test_the_one_bit_min_max_grid_does_not(tmp_path: Path) -> None:
    quantize(bundled_model(), tmp_path / "q", bits=1, method="rtn")
    result = check(tmp_path / "q")
    assert result.collapsed
    assert "nearly random" in (result.reason or "")


@pytest.mark.parametrize(
    ("name", "edit", "reason"),
    [
        ("_proj.weight", np.zeros_like, "12 of 12 texts run into a loop"),
        ("model.norm.weight", np.zeros_like, "nearly random: 8.32 nats"),
        ("_proj.weight", lambda x: np.random.default_rng(0).permutation(x), "nearly random"),
        ("2.input_layernorm.weight", lambda x: x * np.nan, "weights are damaged"),
        ("2.input_layernorm.weight", lambda x: x * 1e38, "weights are damaged"),
    ],
    ids=["zeroed linears", "zeroed norm", "shuffled weights", "nan", "overflow"],
)
def test_a_damaged_model_has_collapsed(tmp_path: Path, name: str, edit: Edit, reason: str) -> None:
    result = check(damaged(tmp_path / "m", name, edit))
    assert result.collapsed
    assert reason in (result.reason or "")


def test_random_weights_have_no_tokenizer_and_no_sense(model: LanguageModel) -> None:
    with random_model(model.config, threads=1) as random:
        result = check_generation(random, [[5], [7, 8]], samples=2, max_new_tokens=32)
        assert (result.collapsed, result.prompt) == (True, "5")
        assert len(result.text.split()) == 32
        with pytest.raises(TokenizerError, match="token ids"):
            check_generation(random, [[5], "Once"])


def test_token_ids_as_prompt(model: LanguageModel) -> None:
    ids = model.tokenizer.encode(PROMPTS[0])
    by_ids, by_text = (check_generation(model, [prompt], samples=1) for prompt in (ids, PROMPTS[0]))
    assert by_ids == by_text


def test_bad_arguments(model: LanguageModel) -> None:
    with pytest.raises(InvalidArgumentError, match="at least one prompt"):
        check_generation(model, [])
    with pytest.raises(InvalidArgumentError, match="one sample"):
        check_generation(model, PROMPTS, samples=0)
    with pytest.raises(InvalidArgumentError, match="at least 32, not 8"):
        check_generation(model, PROMPTS, max_new_tokens=8)
    with pytest.raises(InvalidArgumentError, match="greedy"):
        check_generation(model, PROMPTS, temperature=0)
    with pytest.raises(InvalidArgumentError, match="0 tokens"):
        check_generation(model, [[]])
    with pytest.raises(ContextOverflowError):
        check_generation(model, [[1] * (model.context + 1)])


def varied(length: int) -> NDArray[np.int32]:
    return np.arange(length, dtype=np.int32)


@pytest.mark.parametrize(
    ("tokens", "loops"),
    [
        ([*range(20), *[7] * 32], True),
        ([*range(20), *[7] * 31], False),
        ([*range(20), *[50, 51, 52] * 11], True),
        ([*range(20), *[50, 51, 52] * 11, *range(20)], True),
        (list(range(24)) * 4, True),
        (list(range(24)) * 3, False),
        (list(range(33)) * 4, False),
        ([1, 2, 3, *[4] * 10] * 3, False),
        ([], False),
        ([5], False),
    ],
)
def test_loops(tokens: list[int], loops: bool) -> None:
    assert is_loop(np.array(tokens, np.int32)) is loops


def test_half_of_the_texts_decide() -> None:
    loop, empty, sane = np.zeros(40, np.int32), varied(0), varied(96)
    assert diagnose([sane, loop], 3.0, 4096) == ("1 of 2 texts run into a loop", 1)
    assert diagnose([sane, loop, sane], 3.0, 4096) == (None, 0)
    assert diagnose([sane, empty, empty, loop], 3.0, 4096) == ("2 of 4 texts end at once", 1)
    assert diagnose([empty, sane, sane], 3.0, 4096) == (None, 0)


def test_few_different_words_without_a_loop() -> None:
    babble = np.random.default_rng(0).integers(0, 8, 96, dtype=np.int32)
    assert not is_loop(babble)
    reason, _ = diagnose([babble], 3.0, 4096)
    assert reason == "1 of 1 texts have almost no different words"
    assert diagnose([babble[:20]], 3.0, 4096) == (None, 0)


@pytest.mark.parametrize(
    ("entropy", "vocab_size", "sane"),
    [
        (5.1, 4096, True),
        (5.2, 4096, False),
        (5.2, 150_000, False),
        (2.7, 100, True),
        (3.0, 100, False),
        (0.1, 4096, True),
        (0.01, 4096, False),
    ],
)
def test_entropy_limits(entropy: float, vocab_size: int, sane: bool) -> None:
    assert entropy < math.log(vocab_size)
    reason, _ = diagnose([varied(96)], entropy, vocab_size)
    assert (reason is None) == sane
