"""Quantized linears: what their weights are, and the gradients for what those are made of."""

from typing import Any

import numpy as np
import pytest

from elutq import hlq
from elutq.packing import HlqMatrix, unpack_codes

torch = pytest.importorskip("torch", reason="needs pip install '.[quantize]'")
soft_weights = pytest.importorskip("elutq.finetune.soft_weights")
QuantizedLinear = pytest.importorskip("elutq.finetune.quantized_linear").QuantizedLinear

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


def test_codes_are_read_from_planes() -> None:
    matrix = random_matrix(3, 32, columns=70)
    module = linear(matrix, train_codes=False)
    assert (module.codes.flatten(1)[:, :70].numpy() == unpack_codes(matrix.planes, 70)).all()
