from pathlib import Path

import pytest

from elutq import demo as module
from elutq.demo import DemoResult, run_demo
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
