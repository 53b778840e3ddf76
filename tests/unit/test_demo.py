from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from elutq import demo as module
from elutq.demo import DemoResult, run_demo, sample_text
from elutq.errors import OutputExistsError


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"BITS": (2,), "_SEQUENCES": 24, "_CONTEXT": 128, "_SPEED_TOKENS": 4}.items():
            patch.setattr(module, name, value)
        steps: list[tuple[int, int, str]] = []
        found = run_demo(tmp_path_factory.mktemp("demo"), threads=1, progress=lambda *s: steps.append(s))
    assert [done for done, _, _ in steps] == list(range(steps[0][1]))
    return found


def test_the_full_model_comes_first(result: DemoResult) -> None:
    assert [(row.method, row.bits) for row in result.rows] == [
        ("full", 16),
        ("rtn", 2),
        ("uniform", 2),
        ("hlq", 2),
    ]
    full = result.rows[0]
    assert (full.kl, full.top1_agreement, full.bits_per_weight) == (0, 1, 16)
    assert result.tokens == 24 * 127


def test_the_methods_rank_as_they_should(result: DemoResult) -> None:
    _, rtn, uniform, hlq = result.rows
    assert 0 < hlq.kl < uniform.kl < rtn.kl
    assert hlq.top1_agreement > rtn.top1_agreement
    assert hlq.bits_per_weight == pytest.approx(2.375)
    assert all(row.decode_tok_s > 0 for row in result.rows)
    assert all(row.nbytes < result.rows[0].nbytes / 3 for row in (rtn, uniform, hlq))


def test_the_increase_in_nll_estimates_kl(result: DemoResult) -> None:
    full = result.rows[0]
    for row in result.rows[1:]:
        assert row.nll - full.nll == pytest.approx(row.kl, abs=0.03)


def test_both_models_tell_a_story(result: DemoResult) -> None:
    assert len(result.full_story) > 100
    assert len(result.hlq_story) > 100
    assert result.full_story != result.hlq_story


def test_the_demo_keeps_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "hlq-4bit").mkdir()
    with pytest.raises(OutputExistsError, match="hlq-4bit exists"):
        run_demo(tmp_path)


def test_sample_text_follows_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    probabilities = np.array([0.5, 0.25, 0.2, 0.05])

    class FakeModel:
        config = SimpleNamespace(vocab_size=4)
        tokenizer = SimpleNamespace(eos_token_ids=frozenset([3]))

        def new_sequence(self) -> None:
            return None

        def step(self, work: list) -> list:
            return [np.log(probabilities).astype(np.float32) for _ in work]

    ids = sample_text(FakeModel(), sequences=100, length=101, seed=0)
    assert ids.shape == (100, 101)
    assert (ids[:, 0] == 3).all()
    frequencies = np.bincount(ids[:, 1:].ravel(), minlength=4) / 10_000
    assert np.abs(frequencies - probabilities).max() < 0.02
    assert (sample_text(FakeModel(), 100, 101, seed=0) == ids).all()
