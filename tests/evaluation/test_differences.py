"""Paired differences against scipy's paired t interval."""

import pytest
import torch
from scipy.stats import ttest_rel

from grip_hf.errors import ConfigError
from grip_hf.evaluation.differences import differences


def test_they_are_those_of_a_paired_t_test():
    generator = torch.Generator().manual_seed(0)
    scores = {
        name: torch.randint(0, 2, (50,), generator=generator).double().tolist() for name in ("unpruned", "a", "b")
    }
    samples = [
        {"selector": name, "budget": 1.0 if name == "unpruned" else 0.5, "row": row, "score": score}
        for name, several in scores.items()
        for row, score in enumerate(several)
        if (name, row) != ("b", 49)  # a question that only one was asked
    ]
    for first in ("a", "unpruned"):
        (one,) = differences(samples, first, "b")
        interval = ttest_rel(scores["b"][:49], scores[first][:49]).confidence_interval(0.95)
        assert (one.budget, one.questions) == (0.5, 49)
        assert (one.low, one.high) == pytest.approx((interval.low, interval.high))
        assert one.mean == pytest.approx((one.low + one.high) / 2)
    with pytest.raises(ConfigError, match="share no questions; there are"):
        differences(samples, "a", "c")
