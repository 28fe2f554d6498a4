"""The names of a saved CLIP tower's weights, as every reader knows them.

vLLM looks for `vision_tower.vision_model.encoder...`, as the checkpoints of the Hub have it. transformers 5.19 to
5.24 read that level and keep it, but leave it out (`vision_tower.encoder...`) of a model that was built in code.
"""

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

TOWER = "vision_tower."
LEVEL = "vision_model."


def name_for_all_readers(path: Path) -> int:
    """Put the level `vision_model.` back into the names of a tower's weights in a safetensors file, in place.

    Args:
        path: The file; its tensors keep their bytes and types.

    Returns:
        The number of weights renamed; 0 if the file has the level already.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    weights = load_file(path)
    short = [name for name in weights if name.startswith(TOWER) and not name.startswith(TOWER + LEVEL)]
    for name in short:
        weights[TOWER + LEVEL + name.removeprefix(TOWER)] = weights.pop(name)
    if short:
        save_file(weights, path, metadata)
    return len(short)
