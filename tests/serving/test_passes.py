"""Pictures are encoded so many at a time, each with what is its own."""

import torch

from grip_hf.serving.vllm.passes import passes, pick_items


def test_a_pass_holds_as_many_tokens_as_allowed_or_one_picture():
    totals = [4, 4, 9, 1, 3, 4]
    assert list(passes([0, 1, 2, 3, 4, 5], totals, 8)) == [[0, 1], [2], [3, 4, 5]]
    assert list(passes([1, 3, 5], totals, 8)) == [[1, 3], [5]]
    assert list(passes([], totals, 8)) == []


def test_pictures_take_their_own_rows_along():
    """Batched arguments have one entry per picture, flat ones as many rows as the grid says, shared ones none."""
    grids = torch.tensor([[1, 1, 2], [1, 2, 2], [1, 1, 1]])
    kwargs = {
        "pixel_values": torch.arange(7)[:, None],
        "image_grid_thw": grids,
        "names": ["a", "b", "c"],
        "shared": torch.tensor(5),
        "other": None,
    }
    part = pick_items(kwargs, [0, 2], 3, "image_grid_thw")
    assert part["pixel_values"].flatten().tolist() == [0, 1, 6] and torch.equal(part["image_grid_thw"], grids[[0, 2]])
    assert part["names"] == ["a", "c"] and part["shared"] == 5 and part["other"] is None
    part = pick_items(kwargs, [1], 3, "image_grid_thw")
    assert part["pixel_values"].flatten().tolist() == [2, 3, 4, 5] and part["names"] == ["b"]


def test_all_pictures_take_everything_as_it_is():
    kwargs = {"pixel_values": torch.zeros(2, 3)}
    assert pick_items(kwargs, [0, 1], 2, None)["pixel_values"] is kwargs["pixel_values"]
    assert len(pick_items(kwargs, [1], 2, None)["pixel_values"]) == 1
