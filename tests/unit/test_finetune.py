"""Finetuning: quantized linears and their gradients, the loop around them, losses, and options."""

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
from elutq.packing import HlqMatrix, unpack_codes
from elutq.world import World

torch = pytest.importorskip("torch", reason="needs pip install '.[quantize]'")
own_windows = pytest.importorskip("elutq.finetune.task").own_windows
objective = pytest.importorskip("elutq.finetune.objective")
soft_weights = pytest.importorskip("elutq.finetune.soft_weights")
QuantizedLinear = pytest.importorskip("elutq.finetune.quantized_linear").QuantizedLinear
tuning = pytest.importorskip("elutq.finetune.tuning")
Tuning = tuning.Tuning

CPU = torch.device("cpu")


def random_matrix(
    bits: int, group_size: int, *, rows: int = 6, columns: int = 96, param_bits: int = 16, seed: int = 0
) -> HlqMatrix:
    weight = np.random.default_rng(seed).normal(0, 0.1, (rows, columns)).astype(np.float32)
    weight[1] = 0  # a row without a scale
    matrix = hlq.fit(weight, bits, group_size)
    return hlq.to_8bit(weight, matrix) if param_bits == 8 else matrix


def linear(matrix: HlqMatrix, *, train_codes: bool = True) -> Any:
    return QuantizedLinear(matrix, None, CPU, train_codes=train_codes)


def pattern(bits: int) -> "torch.Tensor":
    """[2**bits, bits]."""
    return (torch.arange(2**bits)[:, None] >> torch.arange(bits) & 1).float()


def compare_gradients(module: Any, plain: Any, scales: Any, zeros: Any) -> None:
    """Of a loss of `module.weight()`, with those of the same weight made by torch's own operations."""
    x = torch.randn(5, 70, generator=torch.Generator().manual_seed(2))
    target = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))
    weight = module.weight()
    torch.testing.assert_close(weight, plain)
    for value in (weight, plain):
        value.retain_grad()
        (torch.nn.functional.linear(x, value) - target).square().sum().backward()
    torch.testing.assert_close(weight.grad, plain.grad)
    torch.testing.assert_close(module.scales.grad, scales.grad)
    torch.testing.assert_close(module.zeros.grad, zeros.grad)


SHAPES = [(32, 96), (64, 96), (128, 96), (-1, 96), (32, 70), (-1, 70), (64, 7)]


class TestQuantizedLinear:
    @pytest.mark.parametrize("param_bits", [16, 8])
    @pytest.mark.parametrize("bits", [1, 2, 3, 4])
    @pytest.mark.parametrize(("group_size", "columns"), SHAPES)
    def test_it_begins_as_the_matrix(self, bits: int, group_size: int, columns: int, param_bits: int) -> None:
        matrix = random_matrix(bits, group_size, columns=columns, param_bits=param_bits)
        expected = hlq.dequantize(matrix)
        for train_codes in (False, True):
            module = linear(matrix, train_codes=train_codes)
            assert (module.weight().detach().numpy() == expected).all()
            stored = module.matrix()
            assert (hlq.dequantize(stored) == expected).all()
            assert (stored.param_bits, stored.group_size) == (param_bits, group_size)
            for name, array in matrix.arrays.items():
                assert stored.arrays[name].dtype == array.dtype, name
                assert stored.arrays[name].shape == array.shape, name

    @pytest.mark.parametrize("param_bits", [16, 8])
    @pytest.mark.parametrize("bits", [1, 2, 3, 4])
    @pytest.mark.parametrize(("group_size", "columns"), SHAPES)
    def test_what_is_stored_is_what_was_trained(
        self, bits: int, group_size: int, columns: int, param_bits: int
    ) -> None:
        module = linear(random_matrix(bits, group_size, columns=columns, param_bits=param_bits))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in (module.scales, module.zeros, module.latent):
                # Large: scales change places, and some would be negative.
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        trained, stored = module.weight().detach().numpy(), module.matrix()
        assert (stored.scales >= 0).all()
        assert (np.diff(stored.scales.astype(np.float32), axis=-1) >= 0).all()
        restored = hlq.dequantize(stored)
        if param_bits == 8:  # sums of small integers, exact in any order
            assert (restored == trained).all()
        else:
            np.testing.assert_allclose(restored, trained, rtol=0, atol=2**-23 * np.abs(trained).max())
        again = linear(stored)
        assert (again.weight().detach().numpy() == restored).all()

    def test_parameters_stay_in_the_range_of_what_is_stored(self) -> None:
        for param_bits in (16, 8):
            module = linear(random_matrix(2, 32, param_bits=param_bits))
            with torch.no_grad():
                module.scales[0] = 1e6
                module.zeros[0] = -1e6
                module.scales[2] = -1e6
                module.zeros[2] = 1e6
            stored = module.matrix()
            assert np.isfinite(hlq.dequantize(stored)).all()
            assert (stored.scales[2] == 0).all()

    @pytest.mark.parametrize("train_codes", [False, True])
    @pytest.mark.parametrize("bits", [1, 3, 4])
    def test_gradients_are_those_of_plain_autograd(self, bits: int, train_codes: bool) -> None:
        module = linear(random_matrix(bits, 32, columns=70), train_codes=train_codes)
        scales, zeros = (p.detach().clone().requires_grad_() for p in (module.scales, module.zeros))
        group = torch.arange(70) // 32
        bit = module.codes.flatten(1)[:, :70, None] >> torch.arange(bits) & 1
        compare_gradients(module, zeros[:, group] + (scales[:, group] * bit).sum(-1), scales, zeros)
        assert (module.latent is not None) == train_codes
        if train_codes:  # codes are hard
            assert module.latent.grad is None

    @pytest.mark.parametrize("temperature", [1.0, 0.2, 0.01])
    @pytest.mark.parametrize("uniform", [False, True])
    @pytest.mark.parametrize("bits", [1, 2, 4])
    def test_soft_weights_and_their_gradients_are_those_of_the_formula(
        self, bits: int, uniform: bool, temperature: float
    ) -> None:
        weight = np.random.default_rng(8).normal(0, 0.1, (6, 70)).astype(np.float32)
        weight[1] = 0  # a row whose levels are one
        matrix = hlq.fit(weight, bits, 32, method="uniform" if uniform else "hlq")
        module = QuantizedLinear(matrix, None, CPU, train_codes=True, uniform=uniform)
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            module.latent += 0.05 * torch.randn(module.latent.shape, generator=generator)
        module.temperature = temperature

        scales, zeros, latent = (
            p.detach().clone().requires_grad_() for p in (module.scales, module.zeros, module.latent)
        )
        used = scales * 2.0 ** torch.arange(bits) if uniform else scales
        levels = (zeros[..., None] + used @ pattern(bits).T).sort(-1).values[:, :, None]
        fixed, z = levels.detach(), latent[..., None]
        gap = (fixed[..., -1] - fixed[..., 0]) / (2**bits - 1)
        upper = 1 + (z > fixed[..., 1:-1]).sum(-1, keepdim=True)
        two = torch.cat([upper - 1, upper], -1)
        wide = [6, 3, 32, 2**bits]
        distance = (z - fixed.expand(wide).gather(-1, two)) / gap[..., None].clamp_min(1e-9)
        shares = torch.softmax(-distance.double().square() / temperature, -1)
        plain = (shares * levels.expand(wide).gather(-1, two)).sum(-1).float()
        compare_gradients(module, plain.flatten(1)[:, :70], scales, zeros)
        real = torch.arange(6) != 1  # where levels are one, there is nothing to learn
        torch.testing.assert_close(module.latent.grad[real], latent.grad[real], rtol=1e-3, atol=1e-4)
        assert torch.isfinite(module.latent.grad).all()
        assert module.latent.grad[real].flatten(1)[:, :70].any()

    @pytest.mark.parametrize("threads", [1, 3])
    @pytest.mark.parametrize("bits", [1, 2, 3, 4])
    def test_soft_weights_by_torch_are_those_in_c(
        self, bits: int, threads: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        monkeypatch.setattr(soft_weights, "PART", 2 * 3 * 70)
        generator = torch.Generator().manual_seed(10)
        latent, gradient = (torch.randn(5, 3, 70, generator=generator) for _ in range(2))
        levels = torch.randn(5, 3, 2**bits, generator=generator).sort(-1).values
        levels[1, 1, :] = 0.5
        for temperature in (1.0, 0.1, 1e-3):
            found, expected = (torch.full((2, *latent.shape), -9.0) for _ in range(2))
            for_levels = torch.full((2, *levels.shape), -9.0)
            soft_weights._values_on_cpu(latent, levels, temperature, found[0])
            soft_weights._values(latent, levels, temperature, expected[0])
            given = latent, levels, temperature, gradient
            soft_weights._gradients_on_cpu(*given, found[1], for_levels[0])
            soft_weights._gradients(*given, expected[1], for_levels[1])
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(for_levels[0], for_levels[1], rtol=1e-4, atol=1e-4)
        for distance in (0.0, 0.1, 9.0):
            by_c, by_torch = latent.clone(), latent.clone()
            soft_weights.settle(by_c, levels, distance)
            soft_weights._settle(by_torch, levels, distance)
            assert (by_c == by_torch).all()
            assert (by_c != latent).any() == (distance > 0)

    def test_gradients_of_8_bit_parameters_pass_the_rounding(self) -> None:
        module = linear(random_matrix(2, 32, param_bits=8), train_codes=False)
        module.weight().sum().backward()
        assert (module.zeros.grad == 32).all()
        ones = torch.stack([(module.codes >> p & 1).sum(-1) for p in range(2)], -1)
        assert (module.scales.grad == ones).all()

    @pytest.mark.parametrize("bits", [1, 2, 3, 4])
    def test_codes_follow_the_nearest_level(self, bits: int) -> None:
        module = linear(random_matrix(bits, 32, columns=70))
        generator = torch.Generator().manual_seed(4)
        before = module.codes.clone()
        with torch.no_grad():
            module.latent += 0.05 * torch.randn(module.latent.shape, generator=generator)
        weight = module.weight().detach()
        levels = module.zeros.half().float()[..., None] + module.scales.half().float() @ pattern(bits).T
        distance = (module.latent[..., None] - levels[:, :, None]).abs()
        reached = (module.latent - torch.nn.functional.pad(weight, (0, 26)).view(6, 3, 32)).abs()
        own = reached.flatten(1)[:, :70]
        torch.testing.assert_close(own, distance.min(-1).values.flatten(1)[:, :70], rtol=0, atol=1e-6)
        assert (module.codes != before).float().mean() > 0.1

    def test_a_code_changes_when_its_latent_weight_crosses_the_border(self) -> None:
        module = linear(random_matrix(1, 32))
        zero, scale = module.zeros[0, 0].item(), module.scales[0, 0, 0].item()
        for latent, code in (
            (zero + 0.49 * scale, 0),
            (zero + 0.51 * scale, 1),
            (zero - 9, 0),
            (zero + 9, 1),
        ):
            with torch.no_grad():
                module.latent[0, 0, 3] = latent
            assert module.weight()[0, 3].item() == pytest.approx(zero + code * scale)
            assert module.codes[0, 0, 3] == code

    @pytest.mark.parametrize("bits", [1, 2, 3])
    def test_soft_weights_become_hard(self, bits: int) -> None:
        module = linear(random_matrix(bits, 32))
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            module.latent += 0.05 * torch.randn(module.latent.shape, generator=generator)
        hard = module.weight().detach()
        distances = []
        for module.temperature in (1.0, 0.1, 0.01, 1e-6):
            distances.append(float((module.weight().detach() - hard).abs().mean()))
        assert distances[0] > distances[1] > distances[2] > 100 * distances[3]

    @pytest.mark.parametrize("param_bits", [16, 8])
    @pytest.mark.parametrize("uniform", [False, True])
    def test_latent_weights_settle_on_the_nearest_levels(self, uniform: bool, param_bits: int) -> None:
        weight = np.random.default_rng(8).normal(0, 0.1, (6, 96)).astype(np.float32)
        matrix = hlq.fit(weight, 2, 32, method="uniform" if uniform else "hlq")
        if param_bits == 8:
            matrix = hlq.to_8bit(weight, matrix)
        module = QuantizedLinear(matrix, None, CPU, train_codes=True, uniform=uniform)
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            module.latent += 0.2 * module.unit * torch.randn(module.latent.shape, generator=generator)
        hard, before = module.weight().detach(), module.latent.detach().clone()
        module.settle(0.1)
        moved = (module.latent - before).abs()
        assert 0.05 * module.unit < moved.mean() < moved.max() < 0.1001 * module.unit
        for _ in range(20):
            module.settle(0.1)
        torch.testing.assert_close(module.weight(), hard)
        module.temperature = 0.05
        torch.testing.assert_close(module.weight(), hard, rtol=0, atol=0.01 * module.unit)

    def test_fixed_codes_have_nothing_to_settle(self) -> None:
        module = linear(random_matrix(2, 32), train_codes=False)
        before = module.weight().detach()
        module.settle(0.1)
        assert (module.weight() == before).all()

    def test_it_is_a_linear_module(self) -> None:
        matrix, bias = random_matrix(3, 32), torch.nn.Parameter(torch.arange(6.0))
        module = QuantizedLinear(matrix, bias, CPU, train_codes=False)
        x = torch.randn(2, 5, 96)
        expected = x @ torch.from_numpy(hlq.dequantize(matrix)).T + bias
        torch.testing.assert_close(module(x), expected)
        assert module(x.bfloat16().float()).shape == (2, 5, 6)
        assert set(dict(module.named_parameters())) == {"bias", "fixed_codes", "scales", "zeros"}

    def test_levels_that_coincide_are_no_trouble(self) -> None:
        module = linear(random_matrix(3, 32))
        with torch.no_grad():
            module.scales[..., 1] = module.scales[..., 0]
            module.scales[..., 2] = 0
        trained = module.weight().detach().numpy()
        np.testing.assert_allclose(hlq.dequantize(module.matrix()), trained, rtol=0, atol=1e-7)


class Problem:
    """A quantized linear to be fitted to another weight; windows are batches of inputs."""

    def __init__(
        self, options: TuneOptions, *, windows: int = 12, train_codes: bool = True, world: World | None = None
    ) -> None:
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(windows + 3, 16, 96, generator=generator)
        self.module = linear(random_matrix(2, 32), train_codes=train_codes)
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
            tuning = Tuning([linear(random_matrix(2, 32))], 12, OPTIONS, 7, world)
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
        idle = linear(random_matrix(2, 32, seed=1))
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


def test_codes_are_read_from_planes() -> None:
    matrix = random_matrix(3, 32, columns=70)
    module = linear(matrix, train_codes=False)
    assert (module.codes.flatten(1)[:, :70].numpy() == unpack_codes(matrix.planes, 70)).all()
