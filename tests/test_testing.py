"""The error rule must pass what it should, and fail what it should."""

from __future__ import annotations

import math

import pytest
import torch

from dalle_kernels.testing import (
    assert_accurate,
    measure_errors,
    poisoned_allocations,
    sample_shapes,
    strided_views,
)


def _exact(size: int = 1000) -> torch.Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_correctly_rounded_result_passes_even_beside_a_perfect_plain_one(dtype):
    exact = _exact()
    assert_accurate(exact.to(dtype), exact, exact)


def test_the_limit_is_twice_the_plain_error():
    exact = _exact()
    noise = 1e-3 * torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert_accurate((exact + 1.9 * noise).float(), exact + noise, exact)
    with pytest.raises(AssertionError, match="gradient: largest error"):
        assert_accurate((exact + 2.1 * noise).float(), exact + noise, exact, "gradient")


def test_many_small_errors_fail_by_their_root_mean_square_alone():
    exact = _exact()
    plain = exact.clone()
    plain[0] += 1e-2
    report = measure_errors((exact + 5e-3).float(), plain, exact)
    assert report.errors[0] <= report.limits[0]
    assert report.errors[1] > report.limits[1]
    assert not report.passed


def test_several_draws_are_measured_together():
    exact = [torch.tensor(1.0, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)]
    plain = [exact[0], exact[1] + 1e-3]
    actual = [(exact[0] + 1e-3).float(), exact[1].float()]
    assert_accurate(actual, plain, exact)
    with pytest.raises(AssertionError):
        assert_accurate(actual[0], plain[0], exact[0])


@pytest.mark.parametrize(
    ("actual", "expected"),
    [(math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (math.inf, -math.inf), (1.0, math.inf), (math.nan, math.inf)],
)
def test_what_is_not_finite_must_agree(actual, expected):
    exact = torch.tensor([0.5, expected], dtype=torch.float64)
    with pytest.raises(AssertionError, match="element 1"):
        assert_accurate(torch.tensor([0.5, actual]), exact, exact)
    assert_accurate(exact.float(), exact, exact)


def test_overflow_of_a_narrow_dtype_is_expected():
    exact = torch.tensor([1e6, 1.0], dtype=torch.float64)
    assert_accurate(exact.half(), exact.half(), exact)


def test_shapes_must_agree():
    with pytest.raises(AssertionError, match="one shape"):
        assert_accurate(torch.zeros(3), torch.zeros(3), torch.zeros(3, 1, dtype=torch.float64))


def test_empty_results_pass():
    assert_accurate(torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.float64))


def test_poisoned_allocations_are_poisoned_and_the_mode_is_restored():
    before = torch.get_deterministic_debug_mode()
    with poisoned_allocations():
        for fresh in (
            torch.empty(100),
            torch.empty_like(torch.ones(7, dtype=torch.bfloat16)),
            torch.ones(3).new_empty(5),
        ):
            assert fresh.isnan().all()
        assert (torch.empty(9, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
    assert torch.get_deterministic_debug_mode() == before


def test_sampled_shapes_repeat_with_their_seed_and_stay_in_bounds():
    shapes = sample_shapes(rank=3, count=50, seed=4, largest=17)
    assert shapes == sample_shapes(rank=3, count=50, seed=4, largest=17)
    assert shapes != sample_shapes(rank=3, count=50, seed=5, largest=17)
    assert all(len(shape) == 3 and min(shape) >= 1 and max(shape) <= 17 for shape in shapes)
    assert len(set(shapes)) > 20


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_strided_views_hold_the_same_values_in_other_layouts(shape, dtype):
    tensor = torch.arange(math.prod(shape)).view(shape).to(dtype)
    views = dict(strided_views(tensor))
    assert list(views) == ["pitched", "stepped", "shifted", "transposed"][: 4 if len(shape) > 1 else 3]
    for view in views.values():
        assert view.shape == tensor.shape and torch.equal(view, tensor)
    assert views["shifted"].storage_offset() == 1
    if len(shape) > 1:
        assert views["pitched"].stride(-2) == shape[-1] + 3 and views["pitched"].stride(-1) == 1
        assert views["stepped"].stride(-1) == 2
        assert views["transposed"].stride(0) == 1 and views["transposed"].stride(-1) > 1
    gaps = views["stepped"].untyped_storage()
    assert gaps.nbytes() > tensor.numel() * tensor.element_size()
