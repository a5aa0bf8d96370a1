"""Where names find room beside curves."""

from __future__ import annotations

import itertools
import math

import pytest

from bncli.report.compare.labels import _clearance, _clearest, dense

RISING = dense([(0.0, 0.1), (0.5, 0.9)])


def test_a_dense_path_has_no_gap_wider_than_a_letter():
    assert max(math.dist(*pair) for pair in itertools.pairwise(RISING)) <= 0.02 + 1e-12
    assert RISING[0] == (0.0, 0.1)
    assert RISING[-1] == pytest.approx((0.5, 0.9))


@pytest.mark.parametrize(
    ("box", "clearance"),
    [
        ((0.4, 0.4, 0.6, 0.5), 0.3),
        ((0.4, 0.75, 0.6, 0.85), -0.0),
        ((0.9, 0.4, 1.1, 0.5), -1.0),
        ((0.1, 0.1, 0.2, 0.2), -1.0),
    ],
)
def test_clearance_is_the_distance_to_the_nearest_point_and_negative_where_a_box_may_not_be(box, clearance):
    assert _clearance(box, [(0.5, 0.8)], [(0.15, 0.15, 0.3, 0.3)]) == pytest.approx(clearance)


def test_a_name_stands_beside_its_curve_and_clear_of_the_others():
    other = dense([(0.3, 0.1), (0.9, 0.9)])
    box = _clearest(RISING, (0.2, 0.06), other, [])
    assert box is not None
    assert _clearance(box, RISING) > 0.015
    assert _clearance(box, other) > 0.015


def test_a_name_without_room_gets_none():
    crowd = [(x / 50, y / 50) for x in range(51) for y in range(51)]
    assert _clearest(RISING, (0.2, 0.06), crowd, []) is None
