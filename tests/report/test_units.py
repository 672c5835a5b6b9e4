"""Numbers as people read them."""

import pytest

from burnish.report import units


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (units.percent(0.452), "45.2 %"), (units.percent(0), "0.0 %"), (units.percent(1), "100.0 %"),
        (units.points(0.421), "+42.1"), (units.points(-0.0123), "−1.2"), (units.points(-0.0001), "0.0"), (units.points(0.0), "0.0"),
        (units.points_interval([-0.01, 0.018]), "−1.0 to +1.8"), (units.interval((0.42, 0.4816)), "42.0 to 48.2 %"),
        (units.probability(0.00311), "p = 0.003"), (units.probability(0.00031), "p = 0.0003"), (units.probability(0.0), "p < 0.0001"),
        (units.probability(0.424), "p = 0.42"), (units.probability(1.0), "p = 1.00"),
        (units.count(0), "0"), (units.count(9999), "9,999"), (units.count(10_000), "10 k"), (units.count(1_312_345), "1.3 M"),
        (units.count(28.43), "28.4"), (units.count(1.234), "1.2"), (units.tokens(1), "1 token"), (units.tokens(1_312_345), "1.3 M tokens"),
        (units.flops(4.13e12), "4.1 TFLOP"), (units.flops(9.996e11), "1.0 TFLOP"), (units.flops(6.1e7), "61 MFLOP"), (units.flops(0), "0 FLOP"),
        (units.duration(200), "3 min 20 s"), (units.duration(60), "1 min"), (units.duration(0.417), "0.42 s"), (units.duration(0), "0 s"),
        (units.duration(44.6), "45 s"), (units.duration(59.7), "1 min"), (units.duration(3599.8), "1 h 00 min"), (units.duration(7500), "2 h 05 min"),
        (units.size(612_000_000), "612 MB"), (units.size(999), "999 B"), (units.size(8_200_000_000), "8.20 GB"),
        (units.plain(0.278123), "0.278"), (units.plain(1e-5), "1e−5"), (units.plain(-2.5), "−2.50"),
        (units.many(1, "row"), "1 row"), (units.many(1200, "row"), "1,200 rows"),
    ],
)  # fmt: skip
def test_a_number_is_said_for_people(said: str, expected: str) -> None:
    assert said == expected


@pytest.mark.parametrize(
    "say", [units.percent, units.points, units.points_interval, units.interval, units.probability, units.count, units.whole, units.tokens,
            units.flops, units.duration, units.size, units.plain],
)  # fmt: skip
def test_what_is_absent_is_not_measured_and_never_zero(say) -> None:
    assert say(None) == "not measured"
