"""The glossary of metrics."""

import pytest

from burnish.core.errors import BurnishError
from burnish.core.metrics import METRICS, emit


def test_known_names_pass_through_in_order() -> None:
    row = emit(step=1, kind="train", loss=None, lr=0.1)
    assert list(row.items()) == [("step", 1), ("kind", "train"), ("loss", None), ("lr", 0.1)]


def test_a_name_outside_the_glossary_is_our_bug_and_names_the_nearest() -> None:
    with pytest.raises(BurnishError, match=r"'grad_nrm' is not in the glossary.*'grad_norm'") as caught:
        emit(grad_nrm=1.0)
    assert caught.value.exit_code == 1


def test_every_metric_has_a_unit_and_a_meaning() -> None:
    assert all(metric.unit and metric.meaning for metric in METRICS.values())
