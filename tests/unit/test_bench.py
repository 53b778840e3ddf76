import resource
from types import SimpleNamespace

import numpy as np
import pytest

from elutq import __version__
from elutq import bench as module
from elutq.bench import bench
from elutq.errors import InvalidArgumentError
from elutq.runtime import cpu_name
from elutq.scheme import QuantScheme

VOCAB = 20


class FakeSequence(list[int]):
    def truncate(self, length: int) -> None:
        del self[length:]


class FakeModel:
    """Takes 1 ms per prompt token and 10 ms per step of tokens after it, on the fake clock."""

    isa = "scalar"
    kv_cache = "fp16"
    threads = 3
    load_seconds = 1.5
    config = SimpleNamespace(vocab_size=VOCAB, max_position_embeddings=100)

    def __init__(self, clock: "FakeClock") -> None:
        self.clock = clock
        self.lengths: list[int] = []

    def new_sequence(self) -> "FakeSequence":
        return FakeSequence()

    def step(self, work: list) -> list:
        for sequence, ids in work:
            sequence.extend(ids)
            self.lengths.append(len(sequence))
        prompt = sum(len(ids) for _, ids in work if len(ids) > 1)
        self.clock.now += 0.001 * prompt or 0.01
        return [np.arange(VOCAB, dtype=np.float32) for _ in work]

    def bytes_per_token(self, context: int) -> int:
        return 1_000_000 + 1000 * context


class FakeClock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    clock = FakeClock()
    monkeypatch.setattr(module, "time", clock)
    bandwidths = iter([30.0, 10.0, 20.0, 20.0])
    monkeypatch.setattr("elutq.runtime.read_bandwidth", lambda threads: next(bandwidths))
    return FakeModel(clock)


def test_figures(model: FakeModel) -> None:
    result = bench(model, QuantScheme(2, 64), prompt=40, gen=20, repeat=3)
    assert result.prefill_tok_s == pytest.approx(1000)
    assert result.decode_tok_s == pytest.approx(100)
    assert result.read_bandwidth_gb_s == 20
    assert result.decode_bytes_per_token == 1_050_000  # at the mean context, 50
    assert result.decode_roofline_fraction == pytest.approx(1_050_000 * 100 / 20e9)
    assert max(model.lengths) == 60
    assert (result.isa, result.threads, result.load_s) == ("scalar", 3, 1.5)
    assert (result.bits, result.group_size) == (2, 64)
    assert (result.prompt, result.gen, result.repeat, result.version) == (40, 20, 3, __version__)
    assert result.cpu == cpu_name() != ""
    assert result.peak_rss_bytes <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_sequences_together_share_the_weights(model: FakeModel) -> None:
    result = bench(model, QuantScheme(2, 64), prompt=40, gen=20, batch=4, repeat=3)
    assert result.prefill_tok_s == pytest.approx(1000)
    assert result.decode_tok_s == pytest.approx(400)
    assert result.decode_bytes_per_token == 250_000 + 50_000
    assert result.decode_roofline_fraction == pytest.approx(300_000 * 400 / 20e9)
    assert result.batch == 4


def test_decoding_after_a_long_context_is_timed_in_turn(model: FakeModel) -> None:
    result = bench(model, None, prompt=4, gen=5, context=60, repeat=3)
    assert (result.context, result.kv_cache) == (60, "fp16")
    assert result.context_decode_tok_s == pytest.approx(100)
    assert model.lengths.count(60) == 1  # filled once
    assert model.lengths.count(65) == 3
    assert bench(model, None, prompt=4, gen=2, repeat=1).context_decode_tok_s is None


def test_an_unquantized_model_has_16_bits(model: FakeModel) -> None:
    result = bench(model, None, prompt=4, gen=2, repeat=1)
    assert (result.bits, result.group_size) == (16, None)


def test_progress(model: FakeModel) -> None:
    seen: list[tuple[int, int]] = []
    bench(model, None, prompt=4, gen=2, repeat=3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"prompt": 0}, "prompt must be at least 1, not 0"),
        ({"gen": 0}, "gen must be at least 1, not 0"),
        ({"batch": 0}, "batch must be at least 1, not 0"),
        ({"repeat": -1}, "repeat must be at least 1, not -1"),
        ({"prompt": 90, "gen": 11}, "prompt and gen are 101 tokens together, but the model's limit is 100"),
        ({"context": 0}, "context must be at least 1, not 0"),
        ({"prompt": 4, "context": 90, "gen": 11}, "context and gen are 101 tokens together"),
    ],
)
def test_bad_counts(counts: dict[str, int], message: str, model: FakeModel) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        bench(model, None, **counts)
