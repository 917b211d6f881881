"""Numbers as the report writes them."""

from layerboost.reporting.text import interval, number, with_error
from layerboost.schemas.sensitivity import Score


def test_numbers_are_written_to_their_error() -> None:
    assert with_error(Score(mean=0.012341, standard_error=0.00041)) == "0.01234 ± 0.00041"
    assert with_error(Score(mean=-3.14159, standard_error=0.2), signed=True) == "−3.14 ± 0.20"
    assert with_error(Score(mean=2.5, standard_error=0.0)) == "2.50 (no standard error)"
    assert [number(value) for value in (0, 0.01234, 12.34, 1234.5, 3e-7)] == [
        "0",
        "0.0123",
        "12.3",
        "1,234",
        "3.00e-07",
    ]
    assert interval(-0.62, -2.07, 0.83, signed=True) == "−0.6 (−2.1 to +0.8)"
    assert interval(0.0, 0.0, 0.0) == "0.0000 (0.0000 to 0.0000)"
