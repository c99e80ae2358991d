import pytest

from hpo.errors import UsageError
from hpo.limits import Limits
from trainer.footprint import Footprint

MODEL = Footprint(num_params=1_000_000, megabytes=4.0, latency_ms=8.0)


def test_a_broken_limit_is_said_with_what_was_measured() -> None:
    limits = Limits(max_params=500_000, max_megabytes=5)
    assert limits.complaint(MODEL) == "1,000,000 parameters, above --max-params 500,000"
    assert limits.excess(MODEL) == pytest.approx({"max_params": 1.0, "max_megabytes": -0.2})


def test_several_broken_limits_are_all_said() -> None:
    complaint = Limits(max_megabytes=2, max_latency_ms=4).complaint(MODEL)
    assert complaint == "4 MB, above --max-megabytes 2; 8 ms, above --max-latency-ms 4"


def test_limits_that_are_kept_are_no_complaint() -> None:
    assert Limits().complaint(MODEL) is None
    assert Limits(max_params=1_000_000, max_megabytes=4, max_latency_ms=8).complaint(MODEL) is None


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_limit_must_be_above_nothing(value: float) -> None:
    with pytest.raises(UsageError, match="--max-latency-ms must be above 0"):
        Limits(max_latency_ms=value)
