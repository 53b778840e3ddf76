"""The Triton kernels against torch, step by step."""

import pytest

pytest.importorskip("torch", reason="needs pip install '.[quantize]'")

import torch

from elutq.finetune import soft_weights
from elutq.group_problem import GroupProblem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator("cuda").manual_seed(0)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_columns_are_chosen_as_in_torch(bits: int, random: torch.Generator) -> None:
    def whole(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=random, device="cuda").float()

    # Sums of these are exact in any order, so both must give the same bits. 300 columns are three blocks.
    target, matrix = whole(-32, 33, 300, 37) / 8, whole(-1, 2, 300, 300)
    matrix.diagonal().fill_(4)
    scales = whole(1, 9, bits, 37).cumsum(0) / 4
    parameters = torch.cat([scales, -scales.sum(0, keepdim=True) / 2])
    found = []
    for way in ("torch", "triton"):
        problem = GroupProblem(target, matrix, bits)
        if way == "torch":
            problem._choose_on_gpu = problem._choose
        problem.start(parameters, matrix.triu())
        problem._descend()
        found.append((problem.codes, problem.values, problem._gradient))
    for expected, value in zip(*found, strict=True):
        assert torch.equal(expected, value)
    assert len(found[0][0].unique()) == 2**bits


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("columns", [20, 128, 1500])
def test_soft_weights_are_those_of_torch(bits: int, columns: int, random: torch.Generator) -> None:
    latent, gradient = torch.randn(2, 3, 4, columns, generator=random, device="cuda")
    levels = torch.randn(3, 4, 2**bits, generator=random, device="cuda").sort(-1).values
    levels[0, 0] = levels[0, 0, 0]  # all are one
    values, expected = torch.empty_like(latent), torch.empty_like(latent)
    soft_weights._values_on_gpu(latent, levels, 0.1, values)
    soft_weights._values(latent, levels, 0.1, expected)
    torch.testing.assert_close(values, expected)

    found, wanted = ((torch.full_like(latent, 9), torch.full_like(levels, 9)) for _ in range(2))
    soft_weights._gradients_on_gpu(latent, levels, 0.1, gradient, *found)
    soft_weights._gradients(latent, levels, 0.1, gradient, *wanted)
    for value, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)

    moved, expected = latent.clone(), latent.clone()
    soft_weights.settle(moved, levels, 0.07)
    soft_weights._settle(expected, levels, 0.07)
    torch.testing.assert_close(moved, expected)
    assert not torch.equal(moved, latent)
