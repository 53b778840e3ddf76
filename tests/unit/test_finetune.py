"""Finetuning: the loop around quantized linears, losses, and options."""

import io
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from elutq import hlq
from elutq.errors import InvalidArgumentError, TensorValueError
from elutq.finetune.options import FinetuneOptions, TuneOptions, choose
from elutq.world import World

torch = pytest.importorskip("torch", reason="needs pip install '.[quantize]'")
own_windows = pytest.importorskip("elutq.finetune.task").own_windows
objective = pytest.importorskip("elutq.finetune.objective")
QuantizedLinear = pytest.importorskip("elutq.finetune.quantized_linear").QuantizedLinear
tuning = pytest.importorskip("elutq.finetune.tuning")
Tuning = tuning.Tuning


def linear(*, train_codes: bool = True) -> Any:
    weight = np.random.default_rng(0).normal(0, 0.1, (6, 96)).astype(np.float32)
    return QuantizedLinear(hlq.fit(weight, 2, 32), None, torch.device("cpu"), train_codes=train_codes)


class Problem:
    """A quantized linear to be fitted to another weight; windows are batches of inputs."""

    def __init__(
        self, options: TuneOptions, *, windows: int = 12, train_codes: bool = True, world: World | None = None
    ) -> None:
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(windows + 3, 16, 96, generator=generator)
        self.module = linear(train_codes=train_codes)
        self.target = self.module.weight().detach() + 0.06 * torch.randn(6, 96, generator=generator)
        self.world = world or World("cpu")
        self.tuning = Tuning([self.module], windows, options, 7, self.world)
        self.seen: list[list[int]] = []

    def error(self, windows: list[int]) -> "torch.Tensor":
        x = self.x[windows]
        return (self.module(x) - x @ self.target.T).square().mean((1, 2)).sum()

    def loss(self, batch: list[int]) -> "torch.Tensor":
        self.seen.append(batch)
        return self.error(batch)

    @torch.no_grad()
    def held_out(self) -> float:
        return float(self.error(list(range(len(self.x) - 3, len(self.x))))) / 3

    def values(self) -> list[Any]:
        return [parameter.detach().clone() for parameter in self.tuning.parameters]


OPTIONS = TuneOptions(epochs=4, batch=3, latent_rate=0.02, scale_rate=0.01, warmup=2)


class TestTuning:
    def test_it_pays_and_says_so(self) -> None:
        problem = Problem(replace(OPTIONS, epochs=16, latent_rate=0.05, scale_rate=0.02))
        before = problem.held_out()
        problem.tuning.run(problem.loss, problem.held_out)
        assert problem.tuning.start == before
        assert problem.tuning.best == problem.held_out() < 0.9 * before
        assert problem.tuning.step == problem.tuning.steps == 64
        assert not any(parameter.requires_grad for parameter in problem.tuning.parameters)

    def test_the_pull_decides_between_two_levels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        undecided = []
        monkeypatch.setattr(tuning, "_LEAST_BITS_PULLED", 2)
        for pull in (0.0, tuning._PULL, 2.0):
            monkeypatch.setattr(tuning, "_PULL", pull)
            options = replace(OPTIONS, epochs=32, latent_rate=0.05, scale_rate=0.0, patience=99)
            problem = Problem(options)
            problem.target += 0.5 * problem.module.unit  # fits best in the middle
            kept = iter(range(99, 0, -1))  # the last
            problem.tuning.run(problem.loss, lambda kept=kept: float(next(kept)))
            hard, problem.module.temperature = problem.module.weight(), 0.2
            distance = (problem.module.weight() - hard).abs() / problem.module.unit
            undecided.append(float((distance > 0.1).float().mean()))
        assert undecided[0] > undecided[1] > undecided[2]
        assert undecided[0] > 0.3
        assert undecided[2] < 0.05

    def test_codes_stay_where_they_are_not_trained(self) -> None:
        problem = Problem(replace(OPTIONS, latent_rate=0.0), train_codes=False)
        codes = problem.module.codes.clone()
        problem.tuning.run(problem.loss, problem.held_out)
        assert problem.tuning.best < problem.tuning.start
        assert (problem.module.codes == codes).all()

    def test_it_never_ends_worse_than_it_began(self) -> None:
        problem = Problem(OPTIONS)
        before, losses = problem.values(), iter(range(1, 99))
        problem.tuning.run(problem.loss, lambda: float(next(losses)))
        assert (problem.tuning.start, problem.tuning.best) == (1, 1)
        assert problem.seen
        assert all(map(torch.equal, problem.values(), before))

    def test_it_keeps_the_best_that_was_seen(self) -> None:
        problem = Problem(replace(OPTIONS, checks=16))
        losses = [5.0, 4.0, 3.0, 3.5, *[6.0] * 20]
        found: list[Any] = []

        def held_out() -> float:
            found.append(problem.values())
            return losses[len(found) - 1]

        problem.tuning.run(problem.loss, held_out)
        assert problem.tuning.best == 3
        assert all(map(torch.equal, problem.values(), found[2]))

    def test_patience_ends_it(self) -> None:
        problem = Problem(replace(OPTIONS, epochs=8, checks=32, patience=3))
        problem.tuning.run(problem.loss, lambda: 1.0)
        assert problem.tuning.step == 3

    def test_without_epochs_nothing_happens(self) -> None:
        problem = Problem(replace(OPTIONS, epochs=0))
        before = problem.values()
        problem.tuning.run(problem.loss, problem.held_out)
        assert problem.tuning.best == problem.tuning.start
        assert all(map(torch.equal, problem.values(), before))

    @pytest.mark.parametrize("step", [1, 5, 15, 16])
    def test_it_goes_on_from_its_state_to_the_same_bits(self, step: int) -> None:
        whole = Problem(OPTIONS)
        saved: list[io.BytesIO] = []

        def save() -> None:
            if whole.tuning.step == step:
                saved.append(io.BytesIO())
                torch.save(whole.tuning.state(), saved[0])

        whole.tuning.run(whole.loss, whole.held_out, save)
        saved[0].seek(0)
        resumed = Problem(OPTIONS)
        resumed.tuning.restore(torch.load(saved[0]))
        assert resumed.tuning.step == step
        resumed.tuning.run(resumed.loss, resumed.held_out)
        assert resumed.seen == whole.seen[step:]
        assert all(map(torch.equal, resumed.values(), whole.values()))
        assert (resumed.tuning.start, resumed.tuning.best) == (whole.tuning.start, whole.tuning.best)
        assert (hlq.dequantize(resumed.module.matrix()) == hlq.dequantize(whole.module.matrix())).all()

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_divergence_is_an_error(self, value: float) -> None:
        problem = Problem(OPTIONS)

        def loss(batch: list[int]) -> Any:
            return problem.loss(batch) * (value if len(problem.seen) == 3 else 1)

        with pytest.raises(TensorValueError, match="diverged"):
            problem.tuning.run(loss, problem.held_out)
        assert problem.tuning.step == 2

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_loss_that_is_hopeless_from_the_start_is_an_error(self, value: float) -> None:
        problem = Problem(OPTIONS)
        with pytest.raises(TensorValueError, match="begin"):
            problem.tuning.run(problem.loss, lambda: value)

    def test_a_held_out_loss_that_becomes_nan_is_not_taken(self) -> None:
        problem = Problem(OPTIONS)
        before, losses = problem.values(), iter([1.0, *[math.nan] * 99])
        problem.tuning.run(problem.loss, lambda: next(losses))
        assert problem.tuning.best == 1
        assert all(map(torch.equal, problem.values(), before))

    def test_each_epoch_sees_every_window_once(self) -> None:
        problem = Problem(replace(OPTIONS, epochs=3))
        problem.tuning.run(problem.loss, problem.held_out)
        epochs = [tuple(itertools.chain(*problem.seen[i : i + 4])) for i in range(0, 12, 4)]
        assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
        assert len(set(epochs)) == 3
        assert all([window % 3 for window in batch] == [0, 1, 2] for batch in problem.seen)

    def test_windows_beyond_whole_batches_are_left_out(self) -> None:
        problem = Problem(OPTIONS, windows=14)
        problem.tuning.run(problem.loss, problem.held_out)
        assert {window for batch in problem.seen for window in batch} == set(range(12))

    @pytest.mark.parametrize("size", [1, 2, 3])
    def test_batches_are_those_of_any_number_of_processes(self, size: int) -> None:
        alone = Problem(OPTIONS)
        alone.tuning.run(alone.loss, alone.held_out)
        parts = []
        for rank in range(size):
            world = World("cpu", rank=rank, size=size)
            tuning = Tuning([linear()], 12, OPTIONS, 7, world)
            own = set(own_windows(12, OPTIONS, world))
            assert own
            batches = []
            for tuning.step in range(tuning.steps):  # noqa: B020
                batches.append([window for window in tuning._batch() if window in own])
            parts.append(batches)
        for step, batch in enumerate(alone.seen):
            shares = [batches[step] for batches in parts]
            assert all(shares)
            assert sorted(itertools.chain(*shares)) == sorted(batch)

    def test_too_many_processes_or_too_few_windows_are_refused(self) -> None:
        with pytest.raises(InvalidArgumentError, match="4 processes"):
            own_windows(12, OPTIONS, World("cpu", size=4))
        with pytest.raises(InvalidArgumentError, match="2 windows"):
            own_windows(2, OPTIONS, World("cpu"))

    def test_what_a_step_does_not_reach_counts_as_no_gradient(self) -> None:
        # An expert without tokens in one process: the others add up a gradient of it all the same.
        summed: list[int] = []

        class Counting(World):
            def sum_(self, *tensors: Any) -> None:
                summed.append(len(tensors))

        problem = Problem(OPTIONS, world=Counting("cpu"))
        idle = linear()
        tuning = Tuning([problem.module, idle], 12, OPTIONS, 7, problem.world)
        before = [parameter.detach().clone() for parameter in tuning.parameters[3:]]
        tuning.run(problem.loss, problem.held_out)
        assert set(summed) == {6}
        assert all(map(torch.equal, tuning.parameters[3:], before))

    def test_a_large_gradient_is_clipped(self) -> None:
        problem = Problem(replace(OPTIONS, checks=1))
        norms: list[float] = []

        def loss(batch: list[int]) -> Any:
            return problem.loss(batch) * (1e4 if len(problem.seen) == 5 else 1)

        def look() -> None:
            gradients = torch.cat([parameter.grad.flatten() for parameter in problem.tuning.parameters])
            norms.append(float(gradients.norm()))

        problem.tuning.run(loss, problem.held_out, look)
        # It counts for a tenth of the running mean, which it may exceed threefold.
        assert norms[4] < 0.5 * 1e4 * norms[3]
        usual = sum(norms[:4]) / 4
        assert max(norms[:4]) < 3 * min(norms[:4])
        assert norms[4] == pytest.approx(3 * 0.1 * 1e4 * usual, rel=0.5)


class TestHeads:
    @pytest.fixture(params=[1 << 24, 40, 100, 1])
    def heads(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any, Any]:
        """Heads of 32 tokens, with logits of as many tokens at once, and what is in them."""
        monkeypatch.setattr(objective, "_LOGITS", request.param)
        generator = torch.Generator().manual_seed(6)
        full, tuned = (torch.randn(32, 8, generator=generator) for _ in range(2))
        return objective.Heads(full, tuned), full, tuned

    @pytest.fixture
    def hidden(self) -> tuple[Any, Any]:
        generator = torch.Generator().manual_seed(7)
        full = torch.randn(13, 8, generator=generator)
        return full, full + 0.3 * torch.randn(13, 8, generator=generator)

    def check(self, value: Callable[[Any], Any], plain: Callable[[Any], Any], at: Any) -> None:
        ours, expected = (at.clone().requires_grad_() for _ in range(2))
        (2 * value(ours)).backward()
        (2 * plain(expected)).backward()
        torch.testing.assert_close(value(ours), plain(expected))
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-5)

    def test_divergence(self, heads: tuple[Any, Any, Any], hidden: tuple[Any, Any]) -> None:
        both, head_full, head_tuned = heads
        full, tuned = hidden

        def plain(x: Any) -> Any:
            log_p = torch.log_softmax(full @ head_full.T, -1)
            log_q = torch.log_softmax(x @ head_tuned.T, -1)
            return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum")

        self.check(lambda x: both.kl(full, x), plain, tuned)

    def test_likelihood(self, heads: tuple[Any, Any, Any], hidden: tuple[Any, Any]) -> None:
        both, _, head_tuned = heads
        tokens = torch.arange(13) * 2

        def plain(x: Any) -> Any:
            return torch.nn.functional.cross_entropy(x @ head_tuned.T, tokens, reduction="sum")

        self.check(lambda x: both.nll(x, tokens), plain, hidden[1])

    def test_a_model_does_not_diverge_from_itself(self, hidden: tuple[Any, Any]) -> None:
        head = torch.randn(32, 8)
        same = hidden[0].clone().requires_grad_()
        loss = objective.Heads(head, head).kl(hidden[0], same)
        loss.backward()
        assert loss.item() == 0
        assert not same.grad.any()

    def test_comparison(self, heads: tuple[Any, Any, Any], hidden: tuple[Any, Any]) -> None:
        both, head_full, head_tuned = heads
        full, tuned = hidden
        ids = torch.arange(13) % 5
        found = both.compare(full, tuned, ids)
        log_p = torch.log_softmax(full @ head_full.T, -1)[:-1]
        log_q = torch.log_softmax(tuned @ head_tuned.T, -1)[:-1]
        rows = torch.arange(12)
        assert found.tokens == 12
        assert found.full == pytest.approx(-float(log_p[rows, ids[1:]].sum()), rel=1e-5)
        assert found.quantized == pytest.approx(-float(log_q[rows, ids[1:]].sum()), rel=1e-5)
        assert found.kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum()), rel=1e-5)
        mean = objective.mean(objective.add(found, found), World("cpu"))
        assert mean.full == pytest.approx(found.full / 12)
        assert mean.tokens == 24


class TestOptions:
    def test_what_an_effort_means(self) -> None:
        assert choose(None, None, None) is None
        assert choose("fast", None, None) is None
        assert choose("balanced", None, None) == FinetuneOptions()
        best = choose("best", None, None)
        assert best is not None
        assert best.samples > FinetuneOptions().samples
        assert best.e2e.latent_rate > 0

    def test_what_is_said_besides_wins(self) -> None:
        assert choose(None, ["e2e"], 64) == FinetuneOptions(stages=("e2e",), samples=64)
        best = choose("best", ["block"], 8)
        assert best is not None
        assert (best.stages, best.samples) == (("block",), 8)
        own = FinetuneOptions(stages=("block",), samples=32)
        assert choose(None, own, None) == own
        assert choose("best", own, 16) == replace(own, samples=16)

    @pytest.mark.parametrize("stages", [[], [""], ["blocks"], ["e2e", "block"], ["block", "block"], "block"])
    def test_stages_that_there_are_not(self, stages: Any) -> None:
        with pytest.raises(InvalidArgumentError, match="block, e2e, in this order"):
            choose(None, stages, None)

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: choose("great", None, None), "effort"),
            (lambda: choose("great", FinetuneOptions(), None), "effort"),
            (lambda: choose(None, None, 8), "no effect"),
            (lambda: choose("fast", None, 8), "no effect"),
            (lambda: choose(None, ["block"], 3), "at least 4"),
            (lambda: choose(None, FinetuneOptions(), 0), "at least 4"),
            (lambda: FinetuneOptions(samples=15, block=TuneOptions(epochs=1, batch=16)), "at least 16"),
            (lambda: FinetuneOptions(objective="mse"), "objective"),
            (lambda: TuneOptions(epochs=-1), "epochs"),
            (lambda: TuneOptions(epochs=1, batch=0), "batches"),
            (lambda: TuneOptions(epochs=1, checks=0), "checks"),
        ],
    )
    def test_nonsense_is_refused(self, call: Callable[[], Any], message: str) -> None:
        with pytest.raises(InvalidArgumentError, match=message):
            call()

    def test_the_record_has_what_the_result_depends_on(self) -> None:
        own = FinetuneOptions(stages=("e2e",))
        assert "block" not in own.record
        assert own.record == replace(own, save_seconds=1).record == replace(own, block=OPTIONS).record
        assert own.record != replace(own, e2e=OPTIONS).record
