"""How positions travel with embeddings, and what a prompt was before it was pruned."""

from types import SimpleNamespace

import pytest
import torch

from grip_hf.serving.vllm.positions import embedded_range, embedded_span, grow, read_offsets, write_offsets


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("axes", [1, 3])
def test_offsets_survive_every_dtype(dtype, axes):
    offsets = torch.tensor([0, 1, 255, 256, 257, 575, 2879, 65535]).repeat(axes, 1).T * torch.tensor([1, 0, 1])[:axes]
    rows = torch.randn(8, 5).to(dtype)
    written = write_offsets(rows, offsets)
    assert written.shape == (8, 5 + 2 * axes) and written.dtype == dtype
    back, found = read_offsets(written, axes)
    assert torch.equal(back, rows) and torch.equal(found, offsets)
    _, part = read_offsets(written[3:6], axes)  # a chunk of a prefill
    assert torch.equal(part, offsets[3:6])


def test_a_pruned_prompt_grows_back_and_each_token_knows_where_it_was():
    """Two pictures, of 2 and 1 kept tokens (7), were 5 and 3 tokens with one marker (8) inside."""
    tokens = [1, 7, 7, 2, 3, 7, 4]
    full, index = grow(tokens, [(1, 3), (5, 6)], [[7, 7, 8, 7, 7], [7, 7, 7]])
    assert full == [1, 7, 7, 8, 7, 7, 2, 3, 7, 7, 7, 4]
    assert index == [0, 1, 1, 6, 7, 8, 11]
    assert grow([1, 2], [], []) == ([1, 2], [0, 1])


def test_the_embedded_span_is_from_the_first_to_the_last_visual_token():
    content = torch.tensor([5, 7, 7, 6, 7, 5])
    assert embedded_span(content, content == 7) == (1, 5)


def test_the_embedded_range_leaves_out_what_stands_around_the_picture():
    mask = torch.tensor([False, True, True, False])
    assert embedded_range(SimpleNamespace(offset=10, length=4, is_embed=mask)) == (11, 13)
    assert embedded_range(SimpleNamespace(offset=10, length=4, is_embed=None)) == (10, 14)
