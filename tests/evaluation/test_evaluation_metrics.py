import pytest

from grip_hf.evaluation.metrics import average, table, wilson


def test_wilson_intervals_of_known_cases():
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(29, 29) == pytest.approx((0.8830, 1.0), abs=1e-4)


@pytest.mark.parametrize("right,n", [(-1, 5), (6, 5), (0, 0)])
def test_wilson_refuses_what_is_no_proportion(right, n):
    with pytest.raises(ValueError, match="no proportion"):
        wilson(right, n)


def test_a_table_has_tasks_and_their_mean():
    answers = {("a", 0.5): {"x": [True, False], "y": [True] * 8}, ("b", 0.1): {"y": [False] * 8, "x": [True, True]}}
    rows = table(answers, ["x", "y"])
    assert [(row["selector"], row["task"], row["n"]) for row in rows] == [
        ("a", "x", 2),
        ("a", "y", 8),
        ("a", "mean", 10),
        ("b", "x", 2),
        ("b", "y", 8),
        ("b", "mean", 10),
    ]
    assert [row["accuracy"] for row in rows] == [0.5, 1.0, 0.75, 1.0, 0.0, 0.5]
    for row in rows:
        low, high = row["ci95"]
        assert 0 <= low <= row["accuracy"] <= high <= 1 and low < high


def test_trainings_are_averaged_with_both_spreads():
    def rows(accuracy):
        row = {"selector": "a", "budget": 0.5, "task": "x", "accuracy": accuracy, "n": 100}
        return [{**row, "ci95": (accuracy - 0.03, accuracy + 0.03)}]

    assert average([rows(0.5)]) == rows(0.5)
    (row,) = average([rows(0.5), rows(0.52), rows(0.57)])
    assert row["accuracy"] == pytest.approx(0.53) and row["n"] == 100 and row["seeds"] == [0.5, 0.52, 0.57]
    # Standard deviation 0.036056 of 3 trainings; Student's t with 2 degrees of freedom, 4.3027.
    half = (0.03**2 + (4.3027 * 0.036056 / 3**0.5) ** 2) ** 0.5
    assert row["ci95"] == pytest.approx((0.53 - half, 0.53 + half), abs=1e-4)
    (wide,) = average([rows(0.1), rows(0.9)])
    assert wide["ci95"] == (0, 1)


def test_students_t_goes_on_beyond_ten_trainings():
    """40 trainings: 2.0227 standard errors, from tables with 39 degrees of freedom."""
    found = [0.5 + 0.01 * (i % 2) for i in range(40)]
    tables = [
        [{"selector": "a", "budget": 0.5, "task": "x", "accuracy": one, "n": 100, "ci95": (one, one)}] for one in found
    ]
    (row,) = average(tables)
    spread = (sum((one - 0.505) ** 2 for one in found) / 39) ** 0.5
    half = (row["ci95"][1] - row["ci95"][0]) / 2
    assert half == pytest.approx(2.0227 * spread / 40**0.5, rel=1e-4)
