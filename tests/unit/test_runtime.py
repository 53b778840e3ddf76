import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import elutq
from elutq import _core
from elutq.architectures import EngineConfig, engine_config, outer_linears
from elutq.checkpoint import Checkpoint
from elutq.errors import InvalidArgumentError, TensorValueError, TokenizerError
from elutq.quantize import quantize
from elutq.runtime import LanguageModel, PromptCache, default_threads, load, random_model, read_bandwidth
from elutq.shapes import SHAPES, shape_config

REFERENCE_MODEL = Path(__file__).parents[2] / "src" / "elutq" / "models" / "llama-7m"


def tiny(**keys: object) -> EngineConfig:
    config = {
        "model_type": "qwen3",
        "vocab_size": 300,
        "hidden_size": 96,
        "intermediate_size": 200,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 700,
    }
    return engine_config({**config, **keys})


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return random_model(tiny(), bits=3, group_size=32, threads=2)


@pytest.fixture(scope="module")
def story() -> LanguageModel:
    return load(REFERENCE_MODEL, threads=2)


def tokens(count: int, seed: int = 0) -> list[int]:
    result: list[int] = np.random.default_rng(seed).integers(0, 300, count).tolist()
    return result


# ---- Steps and sequences ---------------------------------------------------------------------


def test_logits_do_not_depend_on_threads_batch_or_cutting(model: LanguageModel) -> None:
    ids = tokens(400)
    expected = model.logits(ids)
    for chunk in (1, 63, 64, 129):
        assert np.array_equal(model.logits(ids, chunk=chunk), expected)
    for threads in (1, 3):
        other = random_model(tiny(), bits=3, group_size=32, threads=threads)
        assert np.array_equal(other.logits(ids), expected)
    crowd = [(model.new_sequence(), tokens(n, seed=n)) for n in (1, 200, 3)]
    mine = model.new_sequence()
    model.step([(mine, ids[:100]), *crowd])
    result = model.step([(crowd[1][0], tokens(5)), (mine, ids[100:]), (crowd[2][0], [1])], all_logits=True)
    assert np.array_equal(result[1], expected[100:])
    assert [len(logits) for logits in result] == [5, 300, 1]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_random_weights_of_8_bit_parameters_are_much_the_same(bits: int) -> None:
    """The same bits and nearly the same levels: only smaller."""
    fine, coarse = (
        random_model(tiny(), bits, 32, param_bits, threads=1, exact=True) for param_bits in (16, 8)
    )
    expected, found = (model.logits([1, 2, 3, 4]) for model in (fine, coarse))
    assert np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)
    assert coarse.bytes_per_token(0) < fine.bytes_per_token(0)


def test_8_bit_keys_and_values_promise_the_same_and_change_little(story: LanguageModel) -> None:
    ids = (story.tokenizer.encode("Once upon a time there was a little girl. ") * 40)[:400]
    with load(REFERENCE_MODEL, threads=2, kv_cache="int8") as model:
        assert model.kv_cache == "int8"
        logits = model.logits(ids)
        assert np.array_equal(model.logits(ids, chunk=47), logits)
        sequence, full = model.new_sequence(), story.new_sequence()
        for language_model, state in ((model, sequence), (story, full)):
            language_model.step([(state, ids)])
        assert sequence.memory_bytes < 0.6 * full.memory_bytes
        assert model.bytes_per_token(100) < story.bytes_per_token(100)
    reference = story.logits(ids)
    p, q = (np.exp(x - np.logaddexp.reduce(x, axis=1, keepdims=True)) for x in (reference, logits))
    assert 0 < (p * np.log(p / q)).sum(axis=1).mean() < 1e-3
    with pytest.raises(InvalidArgumentError, match="kv_cache must be fp16 or int8, not fp8"):
        random_model(tiny(), kv_cache="fp8")  # type: ignore[arg-type]


def test_windows_do_not_depend_on_cutting() -> None:
    config = tiny(model_type="mistral", sliding_window=50)
    model = random_model(config, threads=2)
    ids = tokens(300)
    assert np.array_equal(model.logits(ids, chunk=1), model.logits(ids))
    assert np.array_equal(model.logits(ids, chunk=47), model.logits(ids))


def test_last_logits_only(model: LanguageModel) -> None:
    ids = tokens(20)
    (last,) = model.step([(model.new_sequence(), ids)])
    assert last.shape == (300,)
    assert last.dtype == np.float32
    assert np.array_equal(last, model.logits(ids)[-1])


def test_truncate_goes_back(model: LanguageModel) -> None:
    ids = tokens(150)
    sequence = model.new_sequence()
    (first,) = model.step([(sequence, ids)])
    full = sequence.memory_bytes
    sequence.truncate(70)
    assert len(sequence) == 70
    assert sequence.memory_bytes < full
    assert np.array_equal(model.step([(sequence, ids[70:])])[0], first)
    with pytest.raises(ValueError, match="truncated"):
        sequence.truncate(151)


def test_a_fork_and_its_origin_go_their_own_ways(model: LanguageModel) -> None:
    ids = tokens(150)
    origin = model.new_sequence()
    model.step([(origin, ids)])
    fork = origin.fork(130)
    assert len(fork) == 130
    for sequence, rest in ((fork, tokens(40, 1)), (origin, tokens(40, 2)), (fork, tokens(40, 3))):
        before = (
            ids
            if sequence is origin
            else ids[:130]
            if rest == tokens(40, 1)
            else [*ids[:130], *tokens(40, 1)]
        )
        (logits,) = model.step([(sequence, rest)])
        assert np.array_equal(logits, model.logits([*before, *rest])[-1])
    origin.truncate(70)  # within a page that the fork reads
    (logits,) = model.step([(origin, tokens(30, 4))])
    assert np.array_equal(logits, model.logits([*ids[:70], *tokens(30, 4)])[-1])
    (logits,) = model.step([(fork, [7])])
    assert np.array_equal(logits, model.logits([*ids[:130], *tokens(40, 1), *tokens(40, 3), 7])[-1])
    del origin
    (logits,) = model.step([(fork.fork(100), [7])])
    assert np.array_equal(logits, model.logits([*ids[:100], 7])[-1])
    with pytest.raises(ValueError, match="truncated"):
        fork.fork(len(fork) + 1)


def test_cache_memory_is_two_bytes_per_value(model: LanguageModel) -> None:
    sequence = model.new_sequence()
    assert sequence.memory_bytes == 0
    model.step([(sequence, tokens(65))])
    positions = 128  # two pages
    assert sequence.memory_bytes == positions * 2 * 2 * 16 * 2 * 2  # layers, heads, head_dim, k and v, bytes


def test_bad_steps_change_nothing(model: LanguageModel) -> None:
    sequence, other = model.new_sequence(), model.new_sequence()
    model.step([(sequence, [1, 2, 3])])
    bad = [
        ([(sequence, [300])], "token 300"),
        ([(sequence, [-1])], "token -1"),
        ([(sequence, [2**40])], "token ids"),
        ([(sequence, [0.5])], "token ids"),
        ([(sequence, [])], "at least one token"),
        ([(sequence, [1]), (sequence, [2])], "twice"),
        ([(other, [1]), (sequence, tokens(698))], "limited to 700"),
    ]
    for batch, match in bad:
        with pytest.raises(InvalidArgumentError, match=match):
            model.step(batch)  # type: ignore[arg-type]
    assert (len(sequence), len(other)) == (3, 0)


def test_a_sequence_of_another_shape_of_model_is_refused(model: LanguageModel) -> None:
    other = random_model(tiny(num_hidden_layers=1), threads=1)
    with pytest.raises(InvalidArgumentError, match="another model"):
        model.step([(other.new_sequence(), [1])])


def test_the_context_can_be_filled_to_the_last_position() -> None:
    model = random_model(tiny(max_position_embeddings=33), threads=1)
    sequence = model.new_sequence()
    model.step([(sequence, tokens(32))])
    model.step([(sequence, [5])])
    with pytest.raises(InvalidArgumentError, match="limited to 33"):
        model.step([(sequence, [5])])
    assert len(list(model.generate_ids(tokens(33), max_new_tokens=5))) == 1
    assert len(list(model.generate_ids(tokens(30), max_new_tokens=50))) == 4


def test_threads_may_share_a_model(model: LanguageModel) -> None:
    expected = {seed: model.logits(tokens(40, seed)) for seed in range(4)}
    results: dict[int, bool] = {}

    def work(seed: int) -> None:
        results[seed] = all(
            np.array_equal(model.logits(tokens(40, seed), chunk=8), expected[seed]) for _ in range(5)
        )

    workers = [threading.Thread(target=work, args=(seed,)) for seed in expected]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert results == dict.fromkeys(expected, True)


def test_logits_of_nothing(model: LanguageModel) -> None:
    assert model.logits([]).shape == (0, 300)


# ---- Generation ------------------------------------------------------------------------------


def test_stream_is_generate_in_whole_characters(story: LanguageModel) -> None:
    options = {"temperature": 1.5, "seed": 3}
    pieces = list(story.stream("Once", max_new_tokens=60, **options))  # type: ignore[arg-type]
    assert len(pieces) > 5
    assert all(pieces)
    text = story.generate("Once", max_new_tokens=60, **options)  # type: ignore[arg-type]
    assert "".join(pieces) == text
    ids = story.tokenizer.encode("Once")
    out = list(
        story.generate_ids(ids, max_new_tokens=60, eos_token_ids=story.tokenizer.eos_token_ids, **options)  # type: ignore[arg-type]
    )
    assert story.tokenizer.decode(out) == text


def test_multi_byte_characters_come_whole(story: LanguageModel) -> None:
    """Tokens of é and 日本 as the model's would-be output."""
    wanted = story.tokenizer.encode(" é日本語🙂 ok")
    assert len(wanted) > len("é日本語🙂 ok")
    stream = story.tokenizer.stream()
    pieces = [stream.push(i) for i in wanted] + [stream.flush()]
    assert "".join(pieces) == " é日本語🙂 ok"
    assert not any("\ufffd" in piece for piece in pieces)


def test_seeds(story: LanguageModel) -> None:
    def text(seed: int | None) -> str:
        return story.generate("The", max_new_tokens=30, temperature=1.0, seed=seed)

    assert text(1) == text(1)
    assert len({text(1), text(2), text(-1), text(None), text(None)}) > 2


def test_stop_strings(story: LanguageModel) -> None:
    whole = story.generate("Once upon a time", max_new_tokens=60)
    for stop in (["girl"], [" girl named"], ["nonsense", "named L", "toys"]):
        end = min(whole.find(s) for s in stop if s in whole)
        assert story.generate("Once upon a time", max_new_tokens=60, stop=stop) == whole[:end]
    for bad in ("girl", ["", "girl"]):
        with pytest.raises(InvalidArgumentError, match="stop"):
            story.generate("Once", stop=bad)


def test_end_of_sequence_ends(story: LanguageModel) -> None:
    ids = story.tokenizer.encode("Once upon a time")
    out = list(story.generate_ids(ids, max_new_tokens=20))
    assert list(story.generate_ids(ids, max_new_tokens=20, eos_token_ids=frozenset([out[7], 1]))) == out[:7]


def test_repetition_penalty_counts_the_prompt_and_the_output(story: LanguageModel) -> None:
    ids = story.tokenizer.encode("Once upon a time, there was a")
    out = list(story.generate_ids(ids, max_new_tokens=40, repetition_penalty=1e6))
    assert len({*ids, *out}) == len({*ids}) + len(out)


def test_long_prompts_are_generated_from_in_pieces(model: LanguageModel) -> None:
    ids = tokens(650)
    (first, *_) = model.generate_ids(ids, max_new_tokens=3)
    assert first == model.logits(ids)[-1].argmax()


def test_options_are_checked_before_anything_runs(story: LanguageModel) -> None:
    for options, match in (
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -3}, "top_k"),
    ):
        with pytest.raises(InvalidArgumentError, match=match):
            story.stream("Once", **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="prompt has 0 tokens"):
        story.stream([])
    with pytest.raises(InvalidArgumentError, match="prompt has 600 tokens"):
        story.stream([5] * 600)


def test_nan_logits_are_an_error(tmp_path: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(REFERENCE_MODEL, broken)
    weights = broken / "model.safetensors"
    weights.chmod(0o644)
    data = bytearray(weights.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    begin, end = header["model.norm.weight"]["data_offsets"]
    data[start + begin : start + end] = np.full((end - begin) // 2, 0x7FC0, np.uint16).tobytes()
    weights.write_bytes(data)
    with load(broken, threads=1) as model, pytest.raises(TensorValueError, match="NaN"):
        model.generate("Once")


def test_file_pages_are_given_back_matrix_by_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "model"
    quantize(REFERENCE_MODEL, out, bits=2, method="rtn", lm_head_bits=4)
    held: set[str] = set()
    most = 0
    read, release = Checkpoint.read, Checkpoint.release

    def watched_read(self: Checkpoint, name: str, *part: slice) -> NDArray[Any]:
        nonlocal most
        held.add(name)
        most = max(most, len(held))
        return read(self, name, *part)

    def watched_release(self: Checkpoint, name: str) -> None:
        held.remove(name)
        release(self, name)

    monkeypatch.setattr(Checkpoint, "read", watched_read)
    monkeypatch.setattr(Checkpoint, "release", watched_release)
    with load(out, threads=2) as model:
        vectors = {name for name in held if name.endswith("norm.weight")}
        assert held == vectors, "the file's pages of a matrix are still held"
        assert model.weight_memory_bytes < 1.1 * (out / "model.safetensors").stat().st_size
    assert most == max(3, len(vectors)), "more than one matrix was held at once"


# ---- Conversations ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chatter(chat_folder: Path) -> LanguageModel:
    return load(chat_folder, threads=2)


MESSAGES = [{"role": "user", "content": "Once upon a time there was a fox."}]


def test_chat_continues_the_rendered_template(chatter: LanguageModel) -> None:
    answer = chatter.chat(MESSAGES, max_new_tokens=12)
    assert answer == chatter.generate(f"user: {MESSAGES[0]['content']}\nassistant: ", max_new_tokens=12)
    assert "".join(chatter.stream_chat(MESSAGES, max_new_tokens=12)) == answer
    word = answer.split()[2]
    assert word not in chatter.chat(MESSAGES, max_new_tokens=12, stop=[word])


def test_chat_shows_tools_to_the_template(chatter: LanguageModel) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    assert '"weather"' in chatter.tokenizer.decode(chatter.tokenizer.encode_chat(MESSAGES, tools=tools))
    assert chatter.chat(MESSAGES, tools=tools, max_new_tokens=8) != chatter.chat(MESSAGES, max_new_tokens=8)


def test_chat_needs_a_template(story: LanguageModel) -> None:
    with pytest.raises(TokenizerError, match="has no chat template"):
        story.chat(MESSAGES)


def test_threads_may_chat_at_once(chatter: LanguageModel) -> None:
    talks = [[{"role": "user", "content": f"Tell of {n} animals."}] for n in range(6)]
    options = {"max_new_tokens": 10, "temperature": 0.8, "seed": 5}
    alone = [chatter.chat(talk, **options) for talk in talks]  # type: ignore[arg-type]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda talk: chatter.chat(talk, **options), talks)) == alone  # type: ignore[arg-type]


def test_a_prompt_cache_computes_only_what_is_new(
    chatter: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    step = LanguageModel.step

    def counted(self: LanguageModel, batch: list[tuple[object, list[int]]], all_logits: bool) -> object:
        computed.append(sum(len(ids) for _, ids in batch))
        return step(self, batch, all_logits)  # type: ignore[arg-type]

    monkeypatch.setattr(LanguageModel, "step", counted)
    cache, talk = PromptCache(chatter), list(MESSAGES)
    for turn in range(3):
        computed.clear()
        answer = "".join(chatter.stream_chat(talk, max_new_tokens=9, cache=cache))
        new = sum(computed)
        assert len(cache) == len(chatter.tokenizer.encode_chat(talk)) + 8  # nothing follows the last token
        assert new == len(cache) if turn == 0 else new < 25
        assert answer == chatter.chat(talk, max_new_tokens=9)
        talk += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And then?"}]


def test_a_prompt_cache_survives_interrupts_and_other_texts(story: LanguageModel) -> None:
    cache, prompt = PromptCache(story), tokens(40)
    expected = list(story.generate_ids(prompt, max_new_tokens=6))
    for ids in (prompt, tokens(40, seed=1), prompt[:20], [*prompt[:30], *tokens(20, seed=2)], prompt):
        stream = story.generate_ids(ids, max_new_tokens=50, cache=cache)
        assert next(stream) == next(story.generate_ids(ids, max_new_tokens=1))
        stream.close()  # type: ignore[attr-defined]
    cache._tokens += [1, 2, 3]  # as an interrupt leaves it: noted, not computed
    assert list(story.generate_ids(prompt, max_new_tokens=6, cache=cache)) == expected


# ---- Loading ---------------------------------------------------------------------------------


def test_public_names() -> None:
    assert elutq.load is load
    assert elutq.LanguageModel is LanguageModel
    assert elutq.PromptCache is PromptCache


@pytest.mark.parametrize("isa", _core.available_isas())
def test_isa_can_be_forced(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert random_model(tiny(), isa=isa, threads=1).isa == isa
    monkeypatch.setenv("ELUTQ_ISA", isa)
    assert random_model(tiny(), threads=1).isa == isa


def test_the_best_isa_is_the_default() -> None:
    assert random_model(tiny(), threads=1, isa="").isa == _core.available_isas()[-1]


def test_unknown_isa_lists_the_known_ones() -> None:
    with pytest.raises(InvalidArgumentError, match="scalar"):
        random_model(tiny(), isa="mmx")


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= default_threads() <= len(os.sched_getaffinity(0))
    monkeypatch.setenv("ELUTQ_THREADS", "3")
    assert random_model(tiny()).threads == 3
    assert random_model(tiny(), threads=2).threads == 2
    for bad in ("two", "0", "-1"):
        monkeypatch.setenv("ELUTQ_THREADS", bad)
        with pytest.raises(InvalidArgumentError, match=r"integer|from 1"):
            random_model(tiny())
    with pytest.raises(InvalidArgumentError, match="threads"):
        random_model(tiny(), threads=0)


def test_context_limits_sequences() -> None:
    with load(REFERENCE_MODEL, context=10, threads=1) as model:
        with pytest.raises(InvalidArgumentError, match="limited to 10"):
            model.logits(list(range(1, 12)))
        assert model.logits(list(range(1, 11))).shape == (10, 4096)
    for bad in (0, 513):
        with pytest.raises(InvalidArgumentError, match="512"):
            load(REFERENCE_MODEL, context=bad)


def test_closed_models_say_so(model: LanguageModel) -> None:
    closed = random_model(tiny(), threads=1)
    closed.close()
    with pytest.raises(InvalidArgumentError, match="closed"):
        closed.logits([1])


def test_random_models_have_no_tokenizer(model: LanguageModel) -> None:
    with pytest.raises(TokenizerError, match="token ids"):
        model.generate("text")


def test_bytes_per_token() -> None:
    config = tiny(tie_word_embeddings=True)
    model = random_model(config, bits=2, group_size=64, threads=1)
    blocks = 2 * (64 * 96 + 2 * 32 * 96 + 96 * 64 + 3 * 200 * 96)
    rows = 2 * (64 + 32 + 32 + 200 + 200) * 2 + 2 * (96 * 1 + 96 * 4)  # rows x groups
    head = 300 * (96 // 8 * 4 + 2 * 5)
    norms = 4 * (96 * 5 + 16 * 4)
    weights = blocks // 4 + rows * 2 * 3 + head + head // 300 + norms
    assert model.bytes_per_token(0) == weights
    assert model.bytes_per_token(100) == weights + 100 * 2 * 2 * 16 * 2 * 2
    windowed = random_model(tiny(model_type="mistral", sliding_window=30), threads=1)
    assert windowed.bytes_per_token(500) == windowed.bytes_per_token(30)


def test_bytes_per_token_of_a_mixture() -> None:
    keys = {"model_type": "qwen3_moe", "num_experts": 6, "moe_intermediate_size": 64}
    one, three = (
        random_model(tiny(**keys, num_experts_per_tok=n), bits=2, group_size=32, threads=1) for n in (1, 3)
    )
    expert = 3 * 96 * 64 // 4 + (2 * 64 * 3 + 96 * 2) * 2 * 3  # planes; rows x groups of scales and zeros
    assert three.bytes_per_token(0) - one.bytes_per_token(0) == 2 * 2 * expert
    assert three.weight_memory_bytes == one.weight_memory_bytes
    assert np.isfinite(three.logits(tokens(40))).all()


def test_memory_of_packed_weights_is_near_what_is_stored() -> None:
    model = random_model("smollm-135m", bits=2, threads=2)
    linears = sum(s.out_features * s.in_features for s in outer_linears(model.config))
    assert model.weight_memory_bytes < 1.1 * (106e6 * 2.4 + linears * 4.7) / 8
    assert model.load_seconds > 0


def test_random_activations_stay_tame() -> None:
    for bits in (1, 2, 3, 4):
        logits = random_model(tiny(), bits=bits, threads=1).logits(tokens(10))
        assert 0.2 < logits.std() < 5


def test_every_shape_is_a_config() -> None:
    for name in SHAPES:
        shape_config(name)
    with pytest.raises(InvalidArgumentError, match="llama-2-7b"):
        random_model("llama-9")


def test_read_bandwidth_is_plausible() -> None:
    assert 0.1 < read_bandwidth(1) < 10000
