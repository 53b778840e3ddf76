"""The Triton kernels against torch: on a GPU if there is one, else in Triton's interpreter."""

import os
from collections.abc import Callable

import pytest

pytest.importorskip("torch", reason="needs pip install '.[quantize]'")

import torch

pytest.importorskip("triton", reason="needs pip install '.[dev]'")

from elutq import triton_kernels
from elutq.finetune import soft_weights
from elutq.group_problem import GroupProblem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
compiled_or_interpreted = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="runs in a process of its own"
)
# Where the sigmoid is 0, its exponential may be infinite.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="these tests run as they are")
def test_tritons_interpreter_agrees(passed_in_interpreter: Callable[[str], int]) -> None:
    assert passed_in_interpreter(__file__) == 8


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(0)


@compiled_or_interpreted
@pytest.mark.parametrize(("bits", "columns"), [(1, 9), (2, 100), (3, 33), (4, 128)])
def test_columns_are_chosen_as_in_torch(bits: int, columns: int, random: torch.Generator) -> None:
    def whole(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=random, device=DEVICE).float()

    # Sums of these are exact in any order, so both must give the same bits.
    target, matrix = whole(-32, 33, columns, 13) / 8, whole(-1, 2, columns, columns)
    matrix.diagonal().fill_(4)
    scales = whole(1, 9, bits, 13).cumsum(0) / 4
    found = []
    for way in ("torch", "triton"):
        problem = GroupProblem(target, matrix, bits)
        problem._set_parameters(torch.cat([scales, -scales.sum(0, keepdim=True) / 2]))
        problem.codes, problem.values = torch.zeros_like(target, dtype=torch.uint8), torch.zeros_like(target)
        choose = problem._choose if way == "torch" else problem._choose_on_gpu
        pull = target.flip(0)
        errors = choose(slice(0, columns), target, pull, matrix)
        found.append((problem.codes, problem.values, pull, errors))
    for expected, value in zip(*found, strict=True):
        assert torch.equal(expected, value)
    assert len(found[0][0].unique()) == 2**bits


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.gpu
def test_a_group_of_many_columns_is_visited_in_blocks(random: torch.Generator) -> None:
    target = torch.randn((300, 37), generator=random, device="cuda")
    inputs = torch.randn((512, 300), generator=random, device="cuda")
    metric = inputs.T @ inputs / 512 + torch.eye(300, device="cuda")
    losses = []
    for way in ("torch", "triton"):
        problem = GroupProblem(target, metric, 2)
        if way == "torch":
            problem._choose_on_gpu = problem._choose
        problem.start(torch.tensor([[0.7], [1.5], [-1.1]], device="cuda").expand(3, 37), None)
        problem.improve(2, 2)
        losses.append(problem.best_loss.sum())
    assert float(losses[1]) == pytest.approx(float(losses[0]), rel=0.01)


@compiled_or_interpreted
@pytest.mark.parametrize(("bits", "columns"), [(1, 20), (2, 128), (3, 1100), (4, 64)])
def test_soft_weights_are_those_of_torch(bits: int, columns: int, random: torch.Generator) -> None:
    latent, gradient = torch.randn((2, 3, 2, columns), generator=random, device=DEVICE)
    levels = torch.randn((3, 2, 2**bits), generator=random, device=DEVICE).sort(-1).values
    levels[0, 0] = levels[0, 0, 0]  # all are one
    values, expected = torch.empty_like(latent), torch.empty_like(latent)
    triton_kernels.soft_values(latent, levels, 0.1, values)
    soft_weights._values(latent, levels, 0.1, expected)
    torch.testing.assert_close(values, expected)

    found, wanted = ((torch.full_like(latent, 9), torch.full_like(levels, 9)) for _ in range(2))
    triton_kernels.soft_gradients(latent, levels, 0.1, gradient, *found)
    soft_weights._gradients(latent, levels, 0.1, gradient, *wanted)
    for value, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)

    moved, expected = latent.clone(), latent.clone()
    triton_kernels.settle(moved, levels, 0.07)
    soft_weights._settle(expected, levels, 0.07)
    torch.testing.assert_close(moved, expected)
    assert not torch.equal(moved, latent)
