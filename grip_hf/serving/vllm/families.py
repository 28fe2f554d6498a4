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
        module: vLLM's module, within `vllm.model_executor.models`.
        name: its class there; None if it is named as the architecture.
        markers: True if vLLM's replacement of a placeholder holds other tokens beside the visual ones.
        rows: the argument of `embed_multimodal` that tells how many rows of flat arguments belong to each picture.
    """

    model_type: str
    module: str
    name: str | None = None
    markers: bool = False
    rows: str | None = None


SERVED: dict[str, Served] = {
    "Idefics3ForConditionalGeneration": Served("idefics3", "idefics3", markers=True, rows="num_patches"),
    "InternVLForConditionalGeneration": Served(
        "internvl", "interns1", "InternS1ForConditionalGeneration", markers=True, rows="image_num_patches"
    ),
    "LlavaForConditionalGeneration": Served("llava", "llava"),
    "LlavaNextForConditionalGeneration": Served("llava_next", "llava_next"),
    "LlavaOnevisionForConditionalGeneration": Served("llava_onevision", "llava_onevision"),
    "Qwen2VLForConditionalGeneration": Served("qwen2_vl", "qwen2_vl", rows="image_grid_thw"),
    "Qwen2_5_VLForConditionalGeneration": Served("qwen2_5_vl", "qwen2_5_vl", rows="image_grid_thw"),
    "Qwen3VLForConditionalGeneration": Served("qwen3_vl", "qwen3_vl", rows="image_grid_thw"),
    "SmolVLMForConditionalGeneration": Served("smolvlm", "smolvlm", markers=True, rows="num_patches"),
}
