"""Pictures told apart by tensors alone, against plain loops over the tokens of a row."""

import random

import pytest
import torch

from grip_hf.families.tiles import joined_runs, newline_coordinates


def loop_over_runs(visual, before):
    """Which picture each token belongs to: a run one token behind the last goes on with it if that token is usual."""
    picture, number, usual, last, pictures = [], -1, None, None, []
    for column, seen in enumerate(visual):
        if not seen:
            picture.append(None)
            continue
        if last is not None and column == last + 2 and usual in (None, before[column]):
            usual = before[column]
        elif last is None or column != last + 1:
            number, usual = number + 1, None
        picture.append(number)
        pictures.append(number)
        last = column
    return picture


def loop_over_rows(kinds, base):
    """Per row of a batch: its pictures, each (tokens of the base, width, rows); gives tokens, image and positions."""
    tokens, image, place = [], [], []
    side = int(base**0.5)
    for number, (gap, width, rows) in enumerate(kinds):
        tokens += [0] * gap + [1] * base
        image += [None] * gap + [number] * base
        place += [None] * gap + [((i // side + 0.5) / side, (i % side + 0.5) / side) for i in range(base)]
        for row in range(rows):
            tokens += [1] * (width - 1) + [2]
            image += [number] * width
            grid = width > 1
            place += [((row + 0.5) / rows, (i + 0.5) / width) if grid else (0.5, 0.5) for i in range(width)]
    return tokens, image, place


@pytest.mark.parametrize("seed", range(60))
def test_joined_runs(seed):
    rng = random.Random(seed)
    rows, length = rng.randint(1, 3), rng.randint(1, 40)
    visual, ids = torch.zeros(rows, length, dtype=torch.bool), torch.zeros(rows, length, dtype=torch.long)
    for row in range(rows):
        column = rng.randint(0, 2)
        while column < length and rng.random() < 0.97:
            run = rng.randint(1, 4)
            visual[row, column : column + run] = True
            column += run
            gap = rng.choice([1, 1, 1, 1, 2, 3])
            ids[row, column : column + gap] = rng.choice([1, 1, 2])
            column += gap
    before = torch.nn.functional.pad(ids, (1, -1), value=-1)
    found = joined_runs(visual, before)
    for row in range(rows):
        expected = loop_over_runs(visual[row].tolist(), before[row].tolist())
        assert [
            one if seen else None for one, seen in zip(found[row].tolist(), visual[row].tolist(), strict=True)
        ] == (expected)


@pytest.mark.parametrize("seed", range(60))
def test_newline_coordinates(seed):
    rng = random.Random(seed)
    base, rows = rng.choice([4, 9]), []
    for _ in range(rng.randint(1, 3)):
        kinds = []
        for _ in range(rng.randint(0, 3)):
            width = rng.randint(2, 4) if rng.random() < 0.8 else 1  # narrower than a base picture and a row
            kinds.append((rng.randint(1, 3), width, rng.randint(1, 4) if width > 1 else 1))
        rows.append(loop_over_rows(kinds, base))
    length = max(1, *(len(tokens) for tokens, _, _ in rows))
    grid = torch.tensor([tokens + [0] * (length - len(tokens)) for tokens, _, _ in rows])
    image, positions = newline_coordinates(grid > 0, grid == 2, base)
    for row, (tokens, expected, places) in enumerate(rows):
        for column, token in enumerate(tokens):
            if token:
                assert image[row, column] == expected[column]
                assert positions[row, column].tolist() == pytest.approx(places[column])
