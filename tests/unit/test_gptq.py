"""The calibrated solver: against exhaustive search, the textbook update, and hostile statistics."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from elutq import hlq
from elutq.errors import SingularHessianError, TensorShapeError, TensorValueError
from elutq.packing import unpack_codes
from elutq.scheme import QuantScheme

torch = pytest.importorskip("torch", reason="needs pip install '.[quantize]'")
gptq = pytest.importorskip("elutq.gptq")
group_problem = pytest.importorskip("elutq.group_problem")
GroupProblem, solve_group = group_problem.GroupProblem, group_problem.solve_group

OPTIONS = gptq.SolverOptions()


def inputs(tokens: int, columns: int, seed: int = 0) -> "torch.Tensor":
    """Correlated inputs with channels of different size, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    size = torch.exp(torch.randn(columns, generator=generator))
    return torch.randn(tokens, columns, generator=generator) @ mixing * size


def weights(rows: int, columns: int, seed: int = 1) -> "torch.Tensor":
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def hessian_of(x: "torch.Tensor") -> "torch.Tensor":
    return x.T @ x / len(x)


def loss(weight: "torch.Tensor", matrix: "hlq.HlqMatrix", hessian: "torch.Tensor") -> "torch.Tensor":
    """Of each row."""
    error = (weight - torch.from_numpy(hlq.dequantize(matrix))).double()
    return ((error @ hessian.double()) * error).sum(1)


def solve(weight, hessian, bits, group_size=-1, options=OPTIONS, cross=None):
    return gptq.solve(weight, gptq.Metric(hessian, cross, options), QuantScheme(bits, group_size)).matrix


@pytest.mark.parametrize("bits", [1, 2])
def test_small_groups_come_near_exhaustive_search(bits: int) -> None:
    # 8 rows of 8 weights: every pattern of codes, each with its own least-squares parameters.
    hessian, weight = hessian_of(inputs(64, 8)), weights(8, 8)
    damped = hessian + OPTIONS.damp * hessian.diagonal().mean() * torch.eye(8)
    codes = torch.tensor(list(itertools.product(range(2**bits), repeat=8)))
    # Swapping or flipping planes gives the same levels: the first column's code may be fixed to 0.
    codes = codes[codes[:, 0] == 0]
    design = torch.cat([codes[..., None] >> torch.arange(bits) & 1, torch.ones(*codes.shape, 1)], 2).double()
    root = torch.linalg.cholesky(damped.double()).T
    basis, _ = torch.linalg.qr(root @ design)
    target = root @ weight.double().T  # [8, rows]
    rank = torch.linalg.matrix_rank(root @ design)
    full = rank == bits + 1
    kept = (basis[full].transpose(1, 2) @ target).square().sum(1)
    best = target.square().sum(0) - kept.max(0).values
    found = loss(weight, solve(weight, hessian, bits), damped)
    assert (found >= best - 1e-6).all()
    # It is a local search: half of the rows end at the global minimum of all 2^(8 bits) patterns.
    assert (found <= 1.001 * best).sum() >= 4
    assert found.sum() <= 1.5 * best.sum()


def test_plain_gptq_is_the_textbook_update() -> None:
    # 16 x 128 in groups of 32: columns one by one, the inverse Hessian updated after each.
    bits, group = 3, 32
    hessian, weight = hessian_of(inputs(512, 128)), weights(16, 128)
    matrix = solve(weight, hessian, bits, group, gptq.GPTQ)
    codes = unpack_codes(matrix.planes, 128)

    work = weight.double().clone()
    damp = gptq.GPTQ.damp * hessian.double().diagonal().mean()
    inverse = torch.linalg.inv(hessian.double() + damp * torch.eye(128))
    for column in range(128):
        index = column // group
        scales = torch.from_numpy(matrix.scales[:, index].astype(np.float64))
        zeros = torch.from_numpy(matrix.zeros[:, index].astype(np.float64))
        patterns = (torch.arange(2**bits)[:, None] >> torch.arange(bits) & 1).double()
        levels = scales @ patterns.T + zeros[:, None]
        distance = (work[:, column, None] - levels).abs()
        chosen = torch.from_numpy(codes[:, column].astype(np.int64))[:, None]
        # float32 may round a tie the other way.
        assert (distance.gather(1, chosen)[:, 0] <= distance.min(1).values + 1e-4).all()
        error = (work[:, column] - levels.gather(1, chosen)[:, 0]) / inverse[column, column]
        work -= error[:, None] * inverse[column]
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_each_refinement_pays(bits: int) -> None:
    hessian, weight = hessian_of(inputs(2048, 256)), weights(64, 256)
    ladder = {
        "data-free": hlq.fit(weight.numpy(), bits, 64),
        "gptq": solve(weight, hessian, bits, 64, gptq.GPTQ),
        "published": solve(weight, hessian, bits, 64, gptq.PUBLISHED),
        "rounds": solve(weight, hessian, bits, 64, replace(OPTIONS, sweeps=0)),
        "sweeps": solve(weight, hessian, bits, 64, replace(OPTIONS, sweeps=2)),
    }
    losses = {name: float(loss(weight, matrix, hessian).sum()) for name, matrix in ladder.items()}
    assert losses["sweeps"] < losses["rounds"] < min(losses["gptq"], losses["published"])
    assert max(losses["gptq"], losses["published"]) < losses["data-free"]


def test_steps_never_lose_what_was_reached() -> None:
    hessian = hessian_of(inputs(512, 64)) + 0.1 * torch.eye(64)
    problem = GroupProblem(weights(32, 64).T.contiguous(), hessian, 2)
    problem.start(torch.tensor([[0.7], [1.5], [-1.1]]).expand(3, 32), None)
    last = problem.best_loss
    for _ in range(6):
        problem.improve(1, 1)
        assert (problem.best_loss <= last).all()
        last = problem.best_loss
    again = GroupProblem(problem.target, hessian, 2)
    again.resume(problem.best_codes, problem.best_parameters)
    torch.testing.assert_close(again.best_loss, last, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(again.values, problem.best_values)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("narrow", [False, True])
def test_the_core_solves_groups_as_torch_does(bits: int, narrow: bool) -> None:
    # 80 columns are three blocks; 37 rows do not fill their vectors.
    hessian, target = hessian_of(inputs(512, 80)), weights(37, 80).T.contiguous()
    hessian += 0.03 * hessian.diagonal().mean() * torch.eye(80)
    factor = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)
    scales = torch.tensor([0.3, 0.5, 1.1, 1.9])[-bits:, None].expand(bits, 37)
    parameters = torch.cat([scales, -scales.sum(0, keepdim=True) / 2])
    units = torch.full((37,), 1 / 32) if narrow else None

    def step(parameters, codes, rounds, own_factor):
        """Losses of both ways, and the core's solution."""
        found = solve_group(
            target,
            hessian,
            parameters,
            rounds=rounds,
            descents=1,
            factor=own_factor,
            codes=codes,
            row_scales=units,
        )
        problem = GroupProblem(target, hessian, bits, units)
        if codes is None:
            problem.start(parameters, own_factor)
        else:
            problem.resume(codes, parameters)
        problem.improve(rounds, 1)
        errors = target - found.values
        return (errors * (hessian @ errors)).sum(0), problem, found

    for own_factor in (None, factor):
        reached, problem, found = step(parameters, None, 0, own_factor)
        # Sums come in another order: now and then a weight half way between two levels takes the other.
        assert (found.codes == problem.best_codes).float().mean() > 0.99
        torch.testing.assert_close(reached.sum(), problem.best_loss.sum(), rtol=0.01, atol=0)
        same = found.codes == problem.best_codes
        torch.testing.assert_close(found.values[same], problem.best_values[same])
    for rounds in (1, 4):
        reached, problem, _ = step(found.parameters, found.codes, rounds, None)
        torch.testing.assert_close(reached.sum(), problem.best_loss.sum(), rtol=0.01, atol=0)
    reached, problem, found = step(parameters, 2**bits - 1 - found.codes, 2, None)  # planes inverted
    torch.testing.assert_close(reached.sum(), problem.best_loss.sum(), rtol=0.02, atol=0)
    assert (found.parameters[:-1].diff(dim=0) >= 0).all()


@pytest.mark.parametrize("sweeps", [0, 2])
def test_stored_form_is_canonical_and_what_was_optimized(sweeps: int) -> None:
    hessian, weight = hessian_of(inputs(512, 128)), weights(32, 128)
    metric = gptq.Metric(hessian, None, replace(OPTIONS, sweeps=sweeps))
    solution = gptq.solve(weight, metric, QuantScheme(3, 32))
    scales = solution.matrix.scales.astype(np.float32)
    assert (scales >= 0).all()
    assert (np.diff(scales, axis=2) >= 0).all()
    norm = ((weight @ hessian) * weight).sum()
    assert float(loss(weight, solution.matrix, hessian).sum() / norm) == pytest.approx(
        solution.output_error, rel=1e-3
    )


def test_squares_are_those_of_the_whole_hessian() -> None:
    hessian, x = hessian_of(inputs(2048, 1100)), weights(7, 1100)
    expected = loss(x, hlq.fit(np.zeros((7, 1100), np.float32), 1, -1), hessian).sum()
    assert gptq.Metric(hessian, None, OPTIONS).square(x.T) == pytest.approx(float(expected), rel=1e-4)


def test_targets_follow_the_full_models_inputs() -> None:
    x = inputs(4096, 64)
    seen = x + 0.3 * inputs(4096, 64, seed=5)  # what the quantized model gives instead of x
    weight = weights(16, 64)
    cross = x.T @ seen / len(x)

    def output_error(matrix: "hlq.HlqMatrix") -> float:
        return float((seen @ torch.from_numpy(hlq.dequantize(matrix)).T - x @ weight.T).square().mean())

    plain = solve(weight, hessian_of(seen), 3, 32)
    aware = solve(weight, hessian_of(seen), 3, 32, cross=cross)
    assert output_error(aware) < 0.8 * output_error(plain)
    # With no share of the targets the cross moments change nothing.
    unmoved = solve(weight, hessian_of(seen), 3, 32, replace(OPTIONS, target_share=0.0), cross)
    assert (unmoved.planes == plain.planes).all()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_parameters_of_8_bits_cost_next_to_nothing(bits: int) -> None:
    hessian, weight = hessian_of(inputs(2048, 256)), weights(32, 256)
    weight[3] = 0
    metric = gptq.Metric(hessian, None, OPTIONS)
    wide = gptq.solve(weight, metric, QuantScheme(bits, 64))
    narrow = gptq.solve(weight, metric, QuantScheme(bits, 64, param_bits=8))
    assert narrow.matrix.row_scales is not None
    assert (narrow.matrix.scales.dtype, narrow.matrix.zeros.dtype) == (np.uint8, np.int8)
    assert not hlq.dequantize(narrow.matrix)[3].any()
    assert narrow.output_error < (1.15 if bits == 4 else 1.05) * wide.output_error
    norm = ((weight @ hessian) * weight).sum()
    stored = float(loss(weight, narrow.matrix, hessian).sum() / norm)
    assert stored == pytest.approx(narrow.output_error, rel=1e-3)


@pytest.mark.parametrize("columns", [1, 7, 96, 200])
def test_any_width_and_a_short_last_group(columns: int) -> None:
    hessian, weight = hessian_of(inputs(300, columns)), weights(5, columns)
    matrix = solve(weight, hessian, 2, 64)
    assert matrix.scales.shape == (5, -(-columns // 64), 2)
    norm = ((weight @ hessian) * weight).sum()
    assert loss(weight, matrix, hessian).sum() < 0.2 * norm


def test_dead_constant_and_repeated_channels() -> None:
    x = inputs(256, 64)
    x[:, 3] = 0
    x[:, 10] = 2.5
    x[:, 20] = x[:, 21]
    weight = weights(8, 64)
    matrix = solve(weight, hessian_of(x), 3, 32)
    restored = torch.from_numpy(hlq.dequantize(matrix))
    assert torch.isfinite(restored).all()
    # Nothing is known of a dead channel's inputs: its weights stay near what they were.
    assert (restored[:, 3] - weight[:, 3]).abs().max() < 1.0


def test_fewer_tokens_than_columns() -> None:
    weight = weights(8, 64)
    for tokens in (1, 5):
        matrix = solve(weight, hessian_of(inputs(tokens, 64)), 2, 32)
        assert np.isfinite(hlq.dequantize(matrix)).all()


def test_damping_escalates_until_the_factorization_succeeds() -> None:
    hessian = hessian_of(inputs(64, 16))
    hessian[0, 1] = hessian[1, 0] = 1.2 * (hessian[0, 0] * hessian[1, 1]).sqrt()  # indefinite
    metric = gptq.Metric(hessian, None, replace(OPTIONS, damp=1e-4))
    assert metric.damp > 1e-4
    assert torch.isfinite(metric.factor).all()


@pytest.mark.parametrize("fault", ["zero", "nan", "infinity", "indefinite"])
def test_hopeless_hessians_are_refused(fault: str) -> None:
    hessian = hessian_of(inputs(64, 16))
    if fault == "zero":
        hessian.zero_()
    elif fault == "indefinite":
        hessian -= 100 * torch.eye(16) * hessian.diagonal().mean()
    else:
        hessian[2, 5] = float(fault[:3])
    with pytest.raises(SingularHessianError):
        gptq.Metric(hessian, None, OPTIONS)


def test_bad_shapes_and_weights_are_refused() -> None:
    hessian = hessian_of(inputs(64, 16))
    with pytest.raises(TensorShapeError, match="16"):
        gptq.Metric(hessian, torch.zeros(8, 8), OPTIONS)
    metric = gptq.Metric(hessian, None, OPTIONS)
    with pytest.raises(TensorShapeError, match="columns"):
        gptq.solve(weights(4, 12), metric, QuantScheme(2, -1))
    for value in (float("nan"), float("inf"), 1e6):
        weight = weights(4, 16)
        weight[1, 2] = value
        with pytest.raises(TensorValueError):
            gptq.solve(weight, metric, QuantScheme(2, -1))


def test_an_outlier_does_not_spoil_the_others() -> None:
    hessian, weight = hessian_of(inputs(512, 64)), weights(8, 64)
    weight[0, 0] = 1000.0
    matrix = solve(weight, hessian, 4, 64)
    restored = torch.from_numpy(hlq.dequantize(matrix))
    assert abs(float(restored[0, 0]) - 1000) < 2
    assert torch.isfinite(restored).all()


@pytest.mark.gpu
def test_a_gpu_agrees_with_the_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    hessian, weight = hessian_of(inputs(512, 128)), weights(32, 128)
    on_cpu = solve(weight, hessian, 2, 64)
    on_gpu = solve(weight.cuda(), hessian.cuda(), 2, 64)
    assert loss(weight, on_gpu, hessian).sum() == pytest.approx(
        float(loss(weight, on_cpu, hessian).sum()), rel=0.02
    )
