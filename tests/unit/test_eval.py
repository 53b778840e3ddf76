import importlib
import itertools
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray

from elutq.errors import InvalidArgumentError, MissingDependencyError, TensorValueError
from elutq.eval import Evaluation, evaluate, evaluate_all, mean_evaluation, score_all
from elutq.eval import perplexity as module
from elutq.models import bundled_model
from elutq.runtime import load

VOCAB = 50


class FakeModel:
    """Logits that depend on every token seen so far, so that a window that leaks into the next one shows."""

    def __init__(self, seed: int, vocab: int = VOCAB, limit: int = 64) -> None:
        self.config = SimpleNamespace(vocab_size=vocab, max_position_embeddings=limit)
        rng = np.random.default_rng(seed)
        self.table = rng.normal(size=(vocab, vocab)).astype(np.float32)
        self.decay = rng.uniform(0.3, 0.6)
        self.most_rows = 0

    def new_sequence(self) -> dict[str, NDArray[np.float32]]:
        return {"state": np.zeros(self.config.vocab_size, np.float32)}

    def step(self, work: list, all_logits: bool = False) -> list[NDArray[np.float32]]:
        assert all_logits
        self.most_rows = max(self.most_rows, sum(len(ids) for _, ids in work))
        return [np.stack([self.advance(sequence, i) for i in ids]) for sequence, ids in work]

    def advance(self, sequence: dict, token_id: int) -> NDArray[np.float32]:
        sequence["state"] = self.decay * sequence["state"] + self.table[token_id]
        return sequence["state"] * 3


def naive(
    model: FakeModel, ids: list[int], context: int, reference: FakeModel | None = None
) -> tuple[float, ...]:
    """The definition, one position at a time in float64."""
    windows = [ids[i : i + context] for i in range(0, len(ids) - context + 1, context)] or [ids]
    nll, kl, agreed = [], [], []
    for window in windows:
        own, other = model.new_sequence(), reference.new_sequence() if reference else None
        for token, target in itertools.pairwise(window):
            p = np.exp(np.float64(model.advance(own, token)))
            p /= p.sum()
            nll.append(-math.log(p[target]))
            if reference:
                q = np.exp(np.float64(reference.advance(other, token)))
                q /= q.sum()
                kl.append((q * np.log(q / p)).sum())
                agreed.append(p.argmax() == q.argmax())
    return len(nll), np.mean(nll), np.mean(kl or 0), np.mean(agreed or 0)


@pytest.fixture
def ids() -> list[int]:
    return np.random.default_rng(0).integers(0, VOCAB, 200).tolist()


@pytest.mark.parametrize("context", [2, 7, 32, 64])
@pytest.mark.parametrize("logits_bytes", [1, 4 * VOCAB * 10, 64 << 20])
def test_agrees_with_the_definition(
    context: int, logits_bytes: int, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOGITS_BYTES", logits_bytes)
    monkeypatch.setattr(module, "_BLOCK_VALUES", 3 * VOCAB)
    model, reference = FakeModel(1), FakeModel(2)
    result = evaluate(model, ids, context, reference=reference)
    tokens, nll, kl, agreement = naive(model, ids, context, reference)
    assert result.tokens == tokens == len(ids) // context * (context - 1)
    assert result.nll == pytest.approx(nll, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nll), rel=1e-4)
    assert result.nll_increase == pytest.approx(nll - naive(reference, ids, context)[1], rel=1e-4)
    assert result.kl == pytest.approx(kl, rel=1e-5)
    assert result.top1_agreement == pytest.approx(agreement)
    assert model.most_rows <= max(1, logits_bytes // (4 * VOCAB))


def test_without_a_reference(ids: list[int]) -> None:
    result = evaluate(FakeModel(1), ids, 32)
    assert result.nll == pytest.approx(naive(FakeModel(1), ids, 32)[1], rel=1e-5)
    assert (result.nll_increase, result.kl, result.top1_agreement) == (None, None, None)


def test_a_model_does_not_differ_from_itself(ids: list[int]) -> None:
    result = evaluate(FakeModel(1), ids, 32, reference=FakeModel(1))
    assert (result.nll_increase, result.kl, result.top1_agreement) == (0, 0, 1)


def test_several_models_at_once_are_each_as_alone(ids: list[int]) -> None:
    models = [FakeModel(1), FakeModel(2), FakeModel(3)]
    together = evaluate_all(models, ids, 16, reference=FakeModel(4))
    assert together == [evaluate(m, ids, 16, reference=FakeModel(4)) for m in models]


def test_scores_are_per_token_and_the_mean_may_start_later(ids: list[int]) -> None:
    (scores,) = score_all([FakeModel(1)], ids, 16, reference=FakeModel(2))
    assert scores.nll.shape == scores.kl.shape == (len(ids) // 16, 15)
    assert scores.evaluation() == evaluate(FakeModel(1), ids, 16, reference=FakeModel(2))
    later = scores.evaluation(first=9)
    assert later.tokens == len(ids) // 16 * 7
    assert later.kl == pytest.approx(scores.kl[:, 8:].mean())
    assert later.nll_increase == pytest.approx((scores.nll - scores.reference_nll)[:, 8:].mean())
    model = FakeModel(1)
    sequence = model.new_sequence()
    for token in ids[16:25]:
        logits = np.float64(model.advance(sequence, token))
    assert scores.nll[1, 8] == pytest.approx(np.log(np.exp(logits).sum()) - logits[ids[25]], rel=1e-5)


def test_the_mean_gives_texts_equal_weight() -> None:
    long = Evaluation(
        nll=1.0, perplexity=math.e, tokens=1000, context=64, nll_increase=0.25, kl=0.5, top1_agreement=0.9
    )
    short = Evaluation(
        nll=3.0, perplexity=math.e**3, tokens=10, context=64, nll_increase=-0.5, kl=0.0, top1_agreement=0.5
    )
    mean = mean_evaluation([long, short])
    assert mean.nll == 2
    assert mean.perplexity == pytest.approx(math.e**2)
    assert (mean.tokens, mean.context) == (1010, 64)
    assert (mean.nll_increase, mean.kl) == (-0.125, 0.25)
    assert mean.top1_agreement == pytest.approx(0.7)
    alone = mean_evaluation([Evaluation(nll=1.0, perplexity=math.e, tokens=10, context=64)])
    assert (alone.nll_increase, alone.kl, alone.top1_agreement) == (None, None, None)


def test_max_tokens_takes_the_start_of_the_text(ids: list[int]) -> None:
    assert evaluate(FakeModel(1), ids, 16, max_tokens=100) == evaluate(FakeModel(1), ids[:96], 16)


def test_a_short_text_is_one_short_window(ids: list[int]) -> None:
    result = evaluate(FakeModel(1), ids[:5], 32)
    assert result.tokens == 4
    assert result.nll == pytest.approx(naive(FakeModel(1), ids[:5], 32)[1], rel=1e-5)


def test_progress_ends_at_the_total(ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOGITS_BYTES", 4 * VOCAB * 64)
    seen: list[tuple[int, int]] = []
    evaluate(FakeModel(1), ids, 16, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(60, 180), (120, 180), (180, 180)]


def test_errors(ids: list[int]) -> None:
    with pytest.raises(InvalidArgumentError, match="the text has 1 token"):
        evaluate(FakeModel(1), ids[:1], 16)
    with pytest.raises(InvalidArgumentError, match="the text has 0 token"):
        evaluate(FakeModel(1), [], 16)
    with pytest.raises(InvalidArgumentError, match="at least 2 tokens"):
        evaluate(FakeModel(1), ids, 1)
    with pytest.raises(InvalidArgumentError, match="the model's limit is 64"):
        evaluate(FakeModel(1), ids, 65)
    with pytest.raises(InvalidArgumentError, match="vocabularies differ: 50 and 60"):
        evaluate(FakeModel(1), ids, 16, reference=FakeModel(1, vocab=60))


def test_logits_that_are_not_finite(ids: list[int]) -> None:
    model = FakeModel(1)
    model.table[ids[3]] = np.nan
    with pytest.raises(TensorValueError, match="logits are not finite"):
        evaluate(model, ids, 16)


@pytest.mark.parametrize("context", [48, 512])
def test_agrees_with_transformers_on_the_bundled_model(context: int) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(bundled_model(), dtype=torch.float32)
    ours = load(bundled_model())
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundled_model())
    text = "Once upon a time there was a little fox. He liked to run, and one day he met a bear.\n" * 30
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    windows = ids[: len(ids) // context * context].view(-1, context)
    with torch.no_grad():
        logits = theirs(windows).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    found = evaluate(ours, ids.tolist(), context)
    assert found.tokens == windows[:, 1:].numel()
    assert found.nll == pytest.approx(expected, rel=1e-3)


def test_the_harness_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "elutq.eval.harness", raising=False)
    with pytest.raises(MissingDependencyError, match=r"pip install 'elutq\[lm-eval\]'"):
        importlib.import_module("elutq.eval.harness")
