"""What the plug-in must know about each family's class in vLLM: architecture -> `Served`. A table of data.

Layouts, tiles and the names of placeholder tokens are those of `grip_hf.families.table`, by `model_type`.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Served:
    """One architecture.

    Attributes:
        model_type: the family in `grip_hf.families.table.FAMILIES`.
        module: vLLM's module, within `vllm.model_executor.models`; the class in it is named as the architecture.
        markers: True if vLLM's replacement of a placeholder holds other tokens beside the visual ones.
        rows: the argument of `embed_multimodal` that tells how many rows of flat arguments belong to each picture.
    """

    model_type: str
    module: str
    markers: bool = False
    rows: str | None = None


SERVED: dict[str, Served] = {
    "LlavaForConditionalGeneration": Served("llava", "llava"),
}
