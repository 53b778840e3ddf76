"""Moments of a module's inputs: what they are, and that it does not matter who counted which windows."""

from itertools import permutations

import pytest

from elutq.world import World

torch = pytest.importorskip("torch", reason="needs pip install '.[quantize]'")
Moments = pytest.importorskip("elutq.moments").Moments

CPU = torch.device("cpu")


@pytest.fixture
def windows() -> tuple["torch.Tensor", "torch.Tensor"]:
    """Inputs of the full model and of the quantized one, [windows, length, size], of very unequal sizes."""
    generator = torch.Generator().manual_seed(0)
    size = torch.exp(2 * torch.randn(4, 1, 24, generator=generator))
    full = torch.randn(4, 50, 24, generator=generator) * size
    return full, full + 0.1 * torch.randn(full.shape, generator=generator)


def count(*pairs: tuple["torch.Tensor", "torch.Tensor"], cross: bool = True) -> "Moments":
    moments = Moments(24, cross, CPU)
    for full, quantized in pairs:
        moments.add(full, quantized)
    return moments


def test_moments_are_those_of_all_tokens(windows: tuple["torch.Tensor", "torch.Tensor"]) -> None:
    moments = count(windows)
    moments.sum_over(World())
    full, quantized = (stream.reshape(-1, 24).double() for stream in windows)
    assert moments.tokens == 200
    assert moments.hessian.dtype == moments.cross.dtype == torch.float32
    torch.testing.assert_close(moments.hessian.double(), quantized.T @ quantized, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(moments.cross.double(), full.T @ quantized, rtol=1e-5, atol=1e-3)


def test_moments_are_the_same_bits_however_windows_are_dealt_out(
    windows: tuple["torch.Tensor", "torch.Tensor"],
) -> None:
    expected = count(windows)
    expected.sum_over(World())
    for order in permutations(range(4)):
        first, second = (
            count(tuple(stream[list(some)] for stream in windows)) for some in (order[:1], order[1:])
        )
        first.hessian += second.hessian  # as `sum_over` does for two processes
        first.cross += second.cross
        first.sum_over(World())
        assert torch.equal(first.hessian, expected.hessian)
        assert torch.equal(first.cross, expected.cross)


def test_many_columns_are_counted_in_blocks() -> None:
    x = torch.randn(1, 30, 600, generator=torch.Generator().manual_seed(0))
    moments = Moments(600, False, CPU)
    moments.add(x, x)
    moments.sum_over(World())
    assert torch.equal(moments.hessian, moments.hessian.T)
    torch.testing.assert_close(moments.hessian, x[0].T @ x[0], rtol=1e-4, atol=1e-4)


def test_weighted_tokens_count_as_often(windows: tuple["torch.Tensor", "torch.Tensor"]) -> None:
    full, quantized = (stream[0] for stream in windows)
    weighted, repeated = Moments(24, True, CPU), count(*3 * [(full[None], quantized[None])])
    weighted.add_weighted(full, quantized, torch.full((50,), 3.0))
    torch.testing.assert_close(weighted.hessian, repeated.hessian, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(weighted.cross, repeated.cross, rtol=1e-5, atol=1e-3)
    assert (weighted.tokens, repeated.tokens) == (50, 150)


def test_without_cross_moments_only_the_hessian_is_counted(
    windows: tuple["torch.Tensor", "torch.Tensor"],
) -> None:
    moments = count(windows, cross=False)
    moments.sum_over(World())
    expected = count(windows)
    expected.sum_over(World())
    assert moments.cross is None
    assert torch.equal(moments.hessian, expected.hessian)
