"""Batches of random visual tokens for tests of selectors."""

import math

import torch

from grip_hf.engine.keepsets import VisualBatch

WIDTH = 12
MIDDLE = f"vision.attention.{8 / 24}"
TAPS = ("vision.salience", "vision.joint_salience.-1", "vision.attention", MIDDLE)


def square(side):
    """Centres of a side x side grid, in raster order."""
    lines = (torch.arange(side) + 0.5) / side
    return torch.stack(torch.meshgrid(lines, lines, indexing="ij"), -1).reshape(-1, 2)


def one_group(images=(16,), words=3, budget=5, seed=0):
    """A batch of one group whose images are square grids of the given numbers of tokens."""
    rng = torch.Generator().manual_seed(seed)
    total = sum(images)
    return VisualBatch(
        tokens=torch.randn(1, total, WIDTH, generator=rng),
        mask=torch.ones(1, total, dtype=torch.bool),
        text=torch.randn(1, words, WIDTH, generator=rng),
        text_mask=torch.ones(1, words, dtype=torch.bool),
        budgets=torch.tensor([budget]),
        positions=torch.cat([square(math.isqrt(n)) for n in images])[None],
        image_index=torch.cat([torch.full((n,), i) for i, n in enumerate(images)])[None],
        taps={
            **{name: torch.rand(1, total, generator=rng) for name in TAPS},
            "vision.mean_keys": torch.randn(1, total, 6, generator=rng),
            "vision.keys.-1": torch.randn(1, total, 18, generator=rng),
            "vision.features": torch.randn(1, total, 8, generator=rng),
        },
    )


def join(batches):
    """Pad groups to one batch."""

    def stack(rows):
        rows = [row[0] for row in rows]
        longest = max(len(row) for row in rows)
        return torch.stack([torch.cat([row, row.new_zeros(longest - len(row), *row.shape[1:])]) for row in rows])

    fields = ("tokens", "mask", "text", "text_mask", "positions", "image_index")
    parts = {name: stack([getattr(b, name) for b in batches]) for name in fields}
    taps = {name: stack([b.taps[name] for b in batches]) for name in batches[0].taps}
    return VisualBatch(budgets=torch.cat([b.budgets for b in batches]), taps=taps, **parts)
