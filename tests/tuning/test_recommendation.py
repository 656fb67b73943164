"""The recommendation for measurements with a known best choice."""

from collections.abc import Sequence
from dataclasses import replace

from pytbptt.truncation import Interval, TruncationBias
from pytbptt.tuning.context import ContextPoint
from pytbptt.tuning.cost import MemoryModel, MemoryPoint, MemoryResult, SpeedPoint, knee
from pytbptt.tuning.gradient import StabilityPoint
from pytbptt.tuning.recommendation import Recommendation, recommend

BPTTS = (8, 16, 32, 64, 128)


def make_bias(*values: float) -> TruncationBias:
    intervals = tuple(Interval(value, 0.9 * value, 1.1 * value) for value in values)
    return TruncationBias(BPTTS, intervals, Interval(0.9, 0.8, 0.95), BPTTS, intervals)


def make_stability(
    not_finite: Sequence[int] = (0, 0, 0, 0, 0), largest: Sequence[float] = (2, 2, 2, 2, 2)
) -> list[StabilityPoint]:
    rows = zip(BPTTS, not_finite, largest, strict=True)
    return [StabilityPoint(bptt, 20, count, 1.0, 0.3, norm) for bptt, count, norm in rows]


def make_memory(limit: float) -> MemoryResult:
    """The memory model is 1000 bytes per token."""
    point = MemoryPoint(8, 4, 32_000)
    return MemoryResult(limit, MemoryModel(0.0, 0.0, 1000.0, 0.0), (point,), point, 0.0)


def make_speed(limit: float = float("inf")) -> list[SpeedPoint]:
    """All shapes that fit; 64 streams reach the full speed, 32 streams 95% of it."""
    fraction = {4: 0.2, 16: 0.6, 32: 0.95, 64: 1.0, 128: 1.0}
    return [SpeedPoint(b, s, 1000 * fraction[s]) for s in fraction for b in BPTTS if 1000 * b * s <= limit]


def choose(
    bias: TruncationBias,
    stability: Sequence[StabilityPoint] | None = None,
    limit: float = 1e12,
    context: Sequence[ContextPoint] = (),
) -> Recommendation:
    return recommend(0.5, bias, stability or make_stability(), make_speed(limit), make_memory(limit), context)


def test_shortest_bptt_within_tolerance_and_smallest_batch_near_full_speed() -> None:
    found = choose(make_bias(0.9, 0.6, 0.3, 0.1, 0.0))
    assert (found.tokens_per_sample, found.batch_size, found.mem_len) == (32, 32, None)
    assert found.batch_size == knee([point for point in make_speed() if point.bptt == 32]).batch_size
    assert "the shortest whose gradient is biased by less than 50%" in found.reasons[0]


def test_upper_confidence_bound_decides() -> None:
    assert choose(make_bias(0.9, 0.48, 0.3, 0.1, 0.0)).tokens_per_sample == 32


def test_zero_bias_selects_shortest_bptt() -> None:
    assert choose(make_bias(0.0, 0.0, 0.0, 0.0, 0.0)).tokens_per_sample == 8


def test_longest_bptt_is_used_with_reason_if_none_is_within_tolerance() -> None:
    found = choose(make_bias(9.0, 8.0, 4.0, 2.0, 1.0))
    assert found.tokens_per_sample == 128
    assert "no bptt up to 128 has a bias under 50% (it is 100% there)" in found.reasons[0]


def test_exploding_gradients_cap_bptt() -> None:
    bias = make_bias(9.0, 8.0, 4.0, 2.0, 0.1)
    assert choose(bias, make_stability(not_finite=(0, 0, 0, 1, 5))).tokens_per_sample == 32
    found = choose(bias, make_stability(largest=(2, 2, 40, 50, 60)))
    assert found.tokens_per_sample == 16
    assert "with longer bptts, so bptt is limited to 16" in found.reasons[1]
    always_unstable = choose(bias, make_stability(not_finite=(1, 1, 1, 1, 1)))
    assert "lower --lr or --clip-norm first" in always_unstable.reasons[1]


def test_explosion_beyond_chosen_bptt_is_ignored() -> None:
    found = choose(make_bias(0.9, 0.6, 0.3, 0.1, 0.0), make_stability(not_finite=(0, 0, 0, 0, 7)))
    assert found.tokens_per_sample == 32
    assert "stable up to bptt 64" in found.reasons[1]


def test_memory_limits_batch_size_first_and_then_bptt() -> None:
    bias = make_bias(9.0, 8.0, 4.0, 2.0, 0.1)
    assert choose(bias, limit=128_000 * 16).batch_size == 16  # slower, but larger ones do not fit
    found = choose(bias, limit=64_000 * 4)
    assert (found.tokens_per_sample, found.batch_size) == (64, 4)
    assert any("do not fit" in reason for reason in found.reasons)


def test_memory_fit_without_token_cost_gives_no_estimate() -> None:
    memory = replace(make_memory(1e12), model=MemoryModel(1e9, 0.0, 0.0, 0.0))
    found = recommend(0.5, make_bias(0.9, 0.6, 0.3, 0.1, 0.0), make_stability(), make_speed(), memory, ())
    assert any(reason.endswith("a token takes too little to be measured") for reason in found.reasons)


def test_mem_len_is_effective_context() -> None:
    context = [ContextPoint(8, 2.0, 6.0), ContextPoint(16, 1.8, 5.0), ContextPoint(32, 1.79, 4.99)]
    assert choose(make_bias(0.9, 0.6, 0.3, 0.1, 0.0), context=context).mem_len == 16
