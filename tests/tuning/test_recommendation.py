"""From measurements to a recommendation: cases whose answer is known."""

from collections.abc import Sequence
from dataclasses import replace

from pytbptt.truncation import Interval, TruncationBias
from pytbptt.tuning.context import ContextPoint
from pytbptt.tuning.cost import MemoryModel, MemoryPoint, MemoryResult, SpeedPoint, knee
from pytbptt.tuning.gradient import StabilityPoint
from pytbptt.tuning.recommendation import Recommendation, recommend

BPTTS = (8, 16, 32, 64, 128)


def bias_of(*values: float) -> TruncationBias:
    intervals = tuple(Interval(value, 0.9 * value, 1.1 * value) for value in values)
    return TruncationBias(BPTTS, intervals, Interval(0.9, 0.8, 0.95), BPTTS, intervals)


def stability_of(
    not_finite: Sequence[int] = (0, 0, 0, 0, 0), largest: Sequence[float] = (2, 2, 2, 2, 2)
) -> list[StabilityPoint]:
    return [StabilityPoint(b, 20, bad, 1.0, 0.3, top) for b, bad, top in zip(BPTTS, not_finite, largest, strict=True)]


def memory_of(limit: float) -> MemoryResult:
    """1000 bytes for each token, and nothing besides."""
    point = MemoryPoint(8, 4, 32_000)
    return MemoryResult(limit, MemoryModel(0.0, 0.0, 1000.0, 0.0), (point,), point, 0.0)


def speed_of(limit: float = float("inf")) -> list[SpeedPoint]:
    """All shapes that fit; 64 streams train as fast as any number does, 32 almost."""
    share = {4: 0.2, 16: 0.6, 32: 0.95, 64: 1.0, 128: 1.0}
    return [SpeedPoint(b, s, 1000 * share[s]) for s in share for b in BPTTS if 1000 * b * s <= limit]


def choose(
    bias: TruncationBias,
    stability: Sequence[StabilityPoint] | None = None,
    limit: float = 1e12,
    context: Sequence[ContextPoint] = (),
) -> Recommendation:
    return recommend(0.5, bias, stability or stability_of(), speed_of(limit), memory_of(limit), context)


def test_the_shortest_bptt_under_the_tolerance_with_the_fewest_streams_at_full_speed() -> None:
    found = choose(bias_of(0.9, 0.6, 0.3, 0.1, 0.0))
    assert (found.tokens_per_sample, found.batch_size, found.mem_len) == (32, 32, None)
    assert found.batch_size == knee([point for point in speed_of() if point.bptt == 32]).batch_size
    assert "the shortest whose gradient is biased by less than 50%" in found.reasons[0]


def test_the_intervals_upper_end_counts() -> None:
    assert choose(bias_of(0.9, 0.48, 0.3, 0.1, 0.0)).tokens_per_sample == 32


def test_no_bias_at_all_means_the_shortest() -> None:
    assert choose(bias_of(0.0, 0.0, 0.0, 0.0, 0.0)).tokens_per_sample == 8


def test_where_none_is_under_the_tolerance_the_longest_is_taken_and_said_to_be() -> None:
    found = choose(bias_of(9.0, 8.0, 4.0, 2.0, 1.0))
    assert found.tokens_per_sample == 128
    assert "no bptt up to 128 has a bias under 50% (it is 100% there)" in found.reasons[0]


def test_gradients_that_explode_set_a_limit() -> None:
    bias = bias_of(9.0, 8.0, 4.0, 2.0, 0.1)
    assert choose(bias, stability_of(not_finite=(0, 0, 0, 1, 5))).tokens_per_sample == 32
    found = choose(bias, stability_of(largest=(2, 2, 40, 50, 60)))
    assert found.tokens_per_sample == 16
    assert "with longer bptts, so it is limited to 16" in found.reasons[1]
    hopeless = choose(bias, stability_of(not_finite=(1, 1, 1, 1, 1)))
    assert "lower --lr or --clip-norm first" in hopeless.reasons[1]


def test_an_explosion_beyond_the_bptt_that_is_needed_is_none_of_its_business() -> None:
    found = choose(bias_of(0.9, 0.6, 0.3, 0.1, 0.0), stability_of(not_finite=(0, 0, 0, 0, 7)))
    assert found.tokens_per_sample == 32
    assert "stable up to bptt 64" in found.reasons[1]


def test_memory_sets_a_limit_to_streams_and_then_to_bptt() -> None:
    bias = bias_of(9.0, 8.0, 4.0, 2.0, 0.1)
    assert choose(bias, limit=128_000 * 16).batch_size == 16  # slower, but no more of them fit
    found = choose(bias, limit=64_000 * 4)
    assert (found.tokens_per_sample, found.batch_size) == (64, 4)
    assert any("do not fit" in reason for reason in found.reasons)


def test_a_fit_in_which_tokens_take_nothing_does_not_say_what_would_fit() -> None:
    memory = replace(memory_of(1e12), model=MemoryModel(1e9, 0.0, 0.0, 0.0))
    found = recommend(0.5, bias_of(0.9, 0.6, 0.3, 0.1, 0.0), stability_of(), speed_of(), memory, ())
    assert any(reason.endswith("a token takes too little to be measured") for reason in found.reasons)


def test_the_memory_length_is_the_effective_context() -> None:
    context = [ContextPoint(8, 2.0, 6.0), ContextPoint(16, 1.8, 5.0), ContextPoint(32, 1.79, 4.99)]
    assert choose(bias_of(0.9, 0.6, 0.3, 0.1, 0.0), context=context).mem_len == 16
