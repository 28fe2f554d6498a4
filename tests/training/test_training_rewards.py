import math

import pytest

from grip_hf.training.rewards import KL_LIMIT, RewardError, checked, closeness, correctness, ladder, likelihood


def test_rewards():
    logged = {}
    right = correctness([True, False, True], [0.03, 0.05, 0.6], log_metric=logged.__setitem__, answer=["a"] * 3)
    assert right == [1.0, 0.0, 1.0]
    assert logged == {"agreement/keep_0.05": 0.5, "agreement/keep_1": 1.0}
    assert closeness([0.0, 2.0, 99.0], budget=[1, 1, 1]) == [0.0, -2.0, -KL_LIMIT]
    logs = [math.log(one) for one in (0.95, 0.95, 0.85, 0.85)]
    assert ladder([True, False, True, False], logs, budget=[1] * 4) == [1.0, -5.0, 0.0, 0.0]
    assert likelihood([0.0, math.log(0.25)]) == pytest.approx([1.0, 0.25])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "must return a list of 2 numbers, got 1 values"),
        (3.0, "got float"),
        ([1.0, math.nan], "'mine' returned nan for completion 1"),
        ([None, 1.0], "returned None for completion 0"),
        ([math.inf, 1.0], "returned inf"),
        (["1", 1.0], "returned '1'"),
    ],
)
def test_a_broken_reward_is_named(values, message):
    def mine(completion_ids, **columns):
        return values

    with pytest.raises(RewardError, match=message):
        checked(mine)(completion_ids=[[1], [2]], budget=[1, 1])


def test_checked_rewards_keep_their_name_and_values():
    wrapped = checked(likelihood)
    assert wrapped.__name__ == "likelihood"
    assert wrapped(completion_ids=[[1]], log_prob=[0.0]) == [1.0]
