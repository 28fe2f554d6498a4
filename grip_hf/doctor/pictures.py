"""Pictures for the tiny models: the arguments that a processor would give, and the ids of their placeholder tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PAD, IMAGE_ID, VIDEO_ID, START_ID, END_ID = 0, 90, 91, 92, 93
Arguments = dict[str, Tensor]
Given = tuple[Arguments, list[list[int]]]
# (number of pictures, seed) -> (the picture arguments of a call, the ids of each picture's tokens and marks)
Pictures = Callable[[int, int], Given]


def random(*shape: int, seed: int) -> Tensor:
    """Normal numbers that depend on the seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(count: int) -> list[int]:
    """`count` placeholder tokens."""
    return [IMAGE_ID] * count


def square_pictures(tokens: int) -> Pictures:
    """Pictures of one size, of `tokens` tokens each."""

    def pictures(count: int, seed: int) -> Given:
        return {"pixel_values": random(count, 3, 16, 16, seed=seed)}, [run(tokens)] * count

    return pictures


def anyres_pictures(count: int, seed: int) -> Given:
    """Pictures of two shapes, alternating: a whole view, and a grid of patches with newlines (LLaVA-NeXT)."""
    sizes = [(16, 32) if i % 2 == 0 else (32, 16) for i in range(count)]
    tokens = [16 + (h // 4) * (w // 4 + 1) for h, w in sizes]
    pixels = random(count, 3, 3, 16, 16, seed=seed)  # the whole picture and its two patches
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}, [run(n) for n in tokens]


def qwen_pictures(count: int, seed: int) -> Given:
    """Pictures of two shapes, alternating, as rows of patches."""
    grids = [(1, 4, 6) if i % 2 == 0 else (1, 6, 4) for i in range(count)]  # patches; 2 x 2 are merged
    patches = sum(t * h * w for t, h, w in grids)
    pixels = random(patches, 3 * 2 * 4 * 4, seed=seed)
    ids = [[START_ID, *run(t * h * w // 4), END_ID] for t, h, w in grids]
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor(grids)}, ids


def tiled_pictures(count: int, seed: int) -> Given:
    """Every second picture is cut into two tiles; all tiles of a picture make one run."""
    tiles = [2 if i % 2 else 1 for i in range(count)]
    pixels = random(sum(tiles), 3, 16, 16, seed=seed)
    return {"pixel_values": pixels}, [[START_ID, *run(4 * n), END_ID] for n in tiles]


def marked_pictures(count: int, seed: int) -> Given:
    """Each picture is one tile row of two and a whole view, each after a marker token of its own."""
    markers = (94, 95, 96)
    pixels = random(1, 3 * count, 3, 16, 16, seed=seed)
    ids = [token for marker in markers for token in (START_ID, marker, *run(4))] + [START_ID]
    return {"pixel_values": pixels}, [ids] * count


def wrapped(tokens: int, stacked: bool = False, name: str = "pixel_values") -> Pictures:
    """Pictures of `tokens` tokens each, between a start and an end token."""

    def pictures(count: int, seed: int) -> Given:
        pixels = random(count, 3, 16, 16, seed=seed)
        return {name: pixels[None] if stacked else pixels}, [[START_ID, *run(tokens), END_ID]] * count

    return pictures


def video_llava_pictures(count: int, seed: int) -> Given:
    """`square_pictures` under the name that Video-LLaVA gives them."""
    arguments, ids = square_pictures(16)(count, seed)
    return {"pixel_values_images": arguments["pixel_values"]}, ids


def tiles(write: Callable[[int], list[int]]) -> Pictures:
    """Every second picture is cut into two tiles and a whole view; `write(n)` gives the ids of n tiles."""

    def pictures(count: int, seed: int) -> Given:
        numbers = [3 if i % 2 else 1 for i in range(count)]
        return {"pixel_values": random(sum(numbers), 3, 16, 16, seed=seed)}, [write(n) for n in numbers]

    return pictures


def perception_pictures(count: int, seed: int) -> Given:
    """Every second picture is cut into two tiles; they are stacked as [pictures and tiles, 1, ...]."""
    numbers = [2 if i % 2 else 1 for i in range(count)]
    pixels = random(sum(numbers), 1, 3, 16, 16, seed=seed)
    return {"pixel_values": pixels}, [[START_ID, *run(4 * n), END_ID] for n in numbers]


def aya_ids(number: int) -> list[int]:
    """Tiles after a marker each: <TILE_1> ... <TILE_GLOBAL>."""
    markers = [*range(94, 94 + number - 1), 97]  # <TILE_1> ... <TILE_GLOBAL>
    return [START_ID, *(token for marker in markers for token in (marker, *run(4))), END_ID]


def cohere_ids(number: int) -> list[int]:
    """Tiles with one and the same mark behind each."""
    return [START_ID, *[*run(4), 94] * number, END_ID]


def ovis_ids(number: int) -> list[int]:
    """The whole view and the mark of its grid, then tiles with a mark each."""
    tokens = [START_ID, *run(4), 93]  # the whole view and the mark of its grid, then tiles with a mark each
    return [*tokens, *[*run(4), 94] * (number - 1), 96]


def mistral_pictures(count: int, seed: int) -> Given:
    """Pictures of two shapes, alternating; a mark ends each row, another one the picture."""
    sizes = [(16, 24) if i % 2 == 0 else (24, 16) for i in range(count)]
    pixels = torch.zeros(count, 3, 24, 24)
    ids = []
    for number, (height, width) in enumerate(sizes):
        pixels[number, :, :height, :width] = random(3, height, width, seed=seed + number)
        rows = [[*run(width // 8), 94] for _ in range(height // 8)]  # a mark ends each row, another one the picture
        ids.append([*[token for row in rows for token in row][:-1], END_ID])
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}, ids


def gemma4_pictures(count: int, seed: int) -> Given:
    """Pictures as patches with their places."""
    places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1).reshape(16, 2)
    pixels = random(count, 16, 3 * 4 * 4, seed=seed)
    ids = [[START_ID, *run(4), END_ID]] * count
    return {"pixel_values": pixels, "image_position_ids": places.expand(count, -1, -1)}, ids


def grids(count: int) -> Tensor:
    """[N, 2] patches of pictures of two alternating shapes, 2 x 2 of which make a token."""
    return torch.tensor([(4, 6) if i % 2 == 0 else (6, 4) for i in range(count)])


def lfm_pictures(count: int, seed: int) -> Given:
    """Pictures of two shapes, padded patches."""
    arguments = {
        "pixel_values": random(count, 24, 3 * 4 * 4, seed=seed),
        "spatial_shapes": grids(count),
        "pixel_attention_mask": torch.ones(count, 24, dtype=torch.long),
    }
    return arguments, [[START_ID, *run(6), END_ID]] * count


def video_llama_pictures(count: int, seed: int) -> Given:
    """Pictures of two shapes whose patches the arguments say how to merge."""
    arguments = {
        "pixel_values": random(24 * count, 3 * 4 * 4, seed=seed),
        "image_grid_thw": torch.nn.functional.pad(grids(count), (1, 0), value=1),
        "image_merge_sizes": torch.full((count,), 2),
    }
    return arguments, [[*run(6)]] * count


def ocr_pictures(count: int, seed: int) -> Given:
    """Every second picture is cut into two larger tiles; all tiles of a picture make one run."""
    tiles = [2 if i % 2 else 1 for i in range(count)]
    return {"pixel_values": random(sum(tiles), 3, 32, 32, seed=seed)}, [[START_ID, *run(4 * n), END_ID] for n in tiles]


def unmarked_pictures(count: int, seed: int) -> Given:
    """`mistral_pictures` without marks."""
    arguments, ids = mistral_pictures(count, seed)
    return arguments, [run(row.count(IMAGE_ID)) for row in ids]


def molmo_pictures(count: int, seed: int) -> Given:
    """A whole view of 2 x 2 tokens and one crop of 1 x 2; each token pools four patches of them all."""
    low, high = [*run(2), 94] * 2, [*run(2), 94]
    patches = torch.arange(24).reshape(6, 4)
    arguments = {
        "pixel_values": random(2 * count, 16, 3 * 4 * 4, seed=seed),
        "image_token_pooling": torch.cat([patches + 32 * number for number in range(count)]),
        "image_grids": torch.tensor([[2, 2, 1, 2]] * count),
    }
    return arguments, [[START_ID, *low, END_ID, 95, *high, END_ID]] * count


def ernie_pictures(count: int, seed: int) -> Given:
    """`qwen_pictures` with patches of one frame."""
    arguments, ids = qwen_pictures(count, seed)
    return {**arguments, "pixel_values": random(24 * count, 3 * 4 * 4, seed=seed)}, ids
