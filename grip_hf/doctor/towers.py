"""A vision tower for families whose own ones come from timm: square patches, one convolution."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.gemma3n.configuration_gemma3n import Gemma3nVisionConfig


class PatchTowerConfig(Gemma3nVisionConfig):
    """`flat` towers give [pictures, tokens, width] with a [CLS], the others [pictures, width, rows, columns]."""

    model_type = "tiny_patch_tower"
    flat: bool = False


class PatchTower(PreTrainedModel):
    """The tower; takes what the families pass to a timm one."""

    config_class = PatchTowerConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.patches = nn.Conv2d(3, config.hidden_size, 4, 4)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.3)
            assert module.bias is not None
            nn.init.zeros_(module.bias)

    def forward(
        self, pixel_values: Tensor, return_dict: bool = True, do_pooling: bool = False, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Features of pictures [N, 3, rows, columns]."""
        states = self.patches(pixel_values)
        if self.config.flat:
            states = nn.functional.pad(states.flatten(2).transpose(1, 2), (0, 0, 1, 0))
        return BaseModelOutputWithPooling(last_hidden_state=states)


# Under a name of its own, so that no other model is affected.
AutoConfig.register(PatchTowerConfig.model_type, PatchTowerConfig)
AutoModel.register(PatchTowerConfig, PatchTower)
