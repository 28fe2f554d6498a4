"""The learned scorer: one score per visual token, from the tokens, the question and the budget.

It needs no attention maps, so the model it prunes may use any attention kernel, and it costs less than a hundredth of
one forward pass. It is a `PreTrainedModel` of its own: what it saves holds none of the weights, and none of the module
paths, of the vision-language model that it serves.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import ScorerError
from .hints import (
    NUM_POSITION_FEATURES,
    NUM_QUERY_HINTS,
    NUM_VISUAL_HINTS,
    budget_features,
    hints,
    lengths,
    position_features,
    sinusoid,
    unit_rms,
)
from .layers import Mlp, TextBlock, VisualBlock
from .memory import Memory, Rated
from .start import draw_weights, start_as_a_matcher

BUDGET_WIDTH = 64
_LOADING_FAULTS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
_CONFIG_KWARGS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder", "proxies")


def check_loading(info: Mapping[str, Any], path: str) -> None:
    """Raise `ScorerError` if transformers' loading info says that weights were missing, unknown or of another shape.

    What is missing would hold whatever was in memory: `GripScorer._init_weights` fills nothing.
    """
    wrong = {name: sorted(map(str, info[name])) for name in _LOADING_FAULTS if info.get(name)}
    if wrong:
        raise ScorerError(f"the weights at {path!r} do not fit this scorer: {wrong}")


class GripScorerConfig(PreTrainedConfig):
    """Sizes of a `GripScorer`.

    Args:
        hidden_size: Width of the projected visual tokens and text embeddings of the vision-language model.
        width: Width that the scorer works in.
        attention_width: Total width of the heads of its attentions.
        num_layers: Blocks in which visual tokens attend to the question and to each other.
        num_heads: Heads per attention; must divide `attention_width`.
        query_aware: Whether the question is read; without it the scorer needs no text.
        memory_width: Numbers by which what is kept already changes the scores of the rest (see `memory.py`); 0 for
            scores that stay.
        base_model: The model that it is made for, `{"id", "model_type", "text_model_type"}`, or None if not known.

    Raises:
        ScorerError: A size is not a positive integer (`memory_width` may be 0), or `num_heads` does not divide
            `attention_width`.
    """

    model_type = "grip_scorer"

    hidden_size: int = 4096
    width: int = 256
    attention_width: int = 128
    num_layers: int = 2
    num_heads: int = 4
    query_aware: bool = True
    memory_width: int = 0
    base_model: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("hidden_size", "width", "attention_width", "num_layers", "num_heads"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ScorerError(f"{name} must be an integer >= 1, got {value!r}")
        if isinstance(self.memory_width, bool) or not isinstance(self.memory_width, int) or self.memory_width < 0:
            raise ScorerError(f"memory_width must be an integer >= 0, got {self.memory_width!r}")
        if not isinstance(self.query_aware, bool):
            raise ScorerError(f"query_aware must be True or False, got {self.query_aware!r}")
        if self.attention_width % self.num_heads:
            raise ScorerError(f"num_heads must divide attention_width {self.attention_width}, got {self.num_heads}")
        super().__post_init__(**kwargs)


class GripScorer(PreTrainedModel):
    """Scores visual tokens for a question and a budget: higher means keep.

    A group is a sample or an image (see `VisualBatch`). Its scores do not depend on padding or on other groups; they
    are float32, computed in the dtype of the scorer's own parameters.
    """

    config_class = GripScorerConfig
    config: GripScorerConfig
    base_model_prefix = "scorer"
    main_input_name = "tokens"
    _supports_sdpa = True

    def __init__(self, config: GripScorerConfig) -> None:
        super().__init__(config)
        width, sizes = config.width, (config.width, config.attention_width, config.num_heads)
        num_hints = NUM_VISUAL_HINTS + (NUM_QUERY_HINTS if config.query_aware else 0)
        self.visual = nn.Linear(config.hidden_size, width, bias=False)
        self.side = nn.Linear(num_hints + NUM_POSITION_FEATURES, width)
        self.budget = Mlp(2, BUDGET_WIDTH, 2 * width * (config.num_layers + 1))
        if config.query_aware:
            self.words = nn.Linear(config.hidden_size, width, bias=False)
            self.text_block, self.text_norm = TextBlock(*sizes), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(VisualBlock(*sizes, config.query_aware) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(width)
        self.head = Mlp(width, width // 2 or 1, 1)
        self.memory = Memory(width, config.memory_width) if config.memory_width else None
        draw_weights(self)
        if self.memory is not None:
            self.memory.start_empty()
        if config.query_aware:
            start_as_a_matcher(self.visual, self.words, [block.to_text for block in self.blocks])
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: `__init__` has drawn the weights, and loading must leave the loaded ones alone."""

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor,
        text: Tensor | None,
        text_mask: Tensor | None,
        keep_ratio: Tensor,
        positions: Tensor,
    ) -> Tensor:
        """Score the visual tokens of each group, before any is picked.

        Args:
            tokens: [G, N, D] projected visual tokens, any float dtype.
            mask: [G, N] bool, True at real tokens.
            text: [G, T, D] embeddings of the prompt's words; not read (may be None) if not `query_aware`. T may be 0.
            text_mask: [G, T] bool, True at real words.
            keep_ratio: [G] share of the tokens that will be kept, in (0, 1].
            positions: [G, N, 2] (row, column) of each token within its image, in [0, 1].

        Returns:
            [G, N] float32 scores, 0 at padding.

        Raises:
            ScorerError: `tokens` has another width than the scorer was made for, or the question is missing.
        """
        return self.rate(tokens, mask, text, text_mask, keep_ratio, positions).scores

    def rate(
        self,
        tokens: Tensor,
        mask: Tensor,
        text: Tensor | None,
        text_mask: Tensor | None,
        keep_ratio: Tensor,
        positions: Tensor,
    ) -> Rated:
        """What `forward` says, from the same arguments, with what a scorer with memory needs while it picks."""
        if tokens.shape[-1] != self.config.hidden_size:
            raise ScorerError(
                f"this scorer is made for tokens of hidden_size {self.config.hidden_size}, got {tokens.shape[-1]}"
            )
        if not self.config.query_aware:
            text = text_mask = None
        elif text is None or text_mask is None:
            raise ScorerError("this scorer is query_aware and needs text and text_mask, got None")
        dtype = self.visual.weight.dtype
        tokens = tokens.to(dtype)
        text = None if text is None else text.to(dtype)
        norms = lengths(tokens)
        side = torch.cat([hints(tokens, norms, mask, text, text_mask), position_features(positions.float())], -1)
        x = self.visual(tokens) * (math.sqrt(tokens.shape[-1]) / norms).to(dtype) + self.side(side.to(dtype))
        if text is not None and text_mask is not None:
            text = self._read(text, text_mask)
        budget = self.budget(budget_features(keep_ratio).to(dtype))[:, None]
        *films, last = budget.chunk(self.config.num_layers + 1, -1)
        for block, film in zip(self.blocks, films, strict=True):
            x = block(x, mask, text, text_mask, film)
        scale, shift = last.chunk(2, -1)
        x = self.norm(x) * (1 + scale) + shift
        scores = self.head(x).squeeze(-1).float().masked_fill(~mask, 0)
        return Rated(scores) if self.memory is None else Rated(scores, *self.memory(x))

    @classmethod
    def from_pretrained(  # the name of the first argument is upstream's
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *model_args: Any, **kwargs: Any
    ) -> GripScorer:
        """Load a scorer from a folder or Hub repository that holds `config.json` and `model.safetensors`.

        Args:
            pretrained_model_name_or_path: The folder, or the repository id.
            *model_args: Passed on to `PreTrainedModel.from_pretrained`, as are the keyword arguments.
            **kwargs: `revision`, `token`, `dtype`, `local_files_only`, ...

        Raises:
            ScorerError: A file is missing or damaged, belongs to another kind of model, lacks or adds weights, or
                holds NaN.
        """
        refused = {name: kwargs[name] for name in ("trust_remote_code", "ignore_mismatched_sizes") if kwargs.get(name)}
        if refused or not kwargs.pop("use_safetensors", True):
            raise ScorerError(f"scorers are loaded from safetensors only, strictly and without code; got {refused}")
        path = os.fspath(pretrained_model_name_or_path or "")
        if not path or (path.startswith((".", "~", os.sep)) and not os.path.isdir(path)):
            raise ScorerError(f"no folder {path!r} to load a grip scorer from")
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("dtype", torch.float32)  # scores of neighbours differ by little, however they are stored
        try:
            if kwargs.get("config") is None:
                shared = {k: kwargs[k] for k in _CONFIG_KWARGS if k in kwargs}
                found, _ = PreTrainedConfig.get_config_dict(path, **shared)
                if not found:
                    raise ScorerError(f"{path!r} has no config.json")
                if found.get("model_type") != GripScorerConfig.model_type:
                    raise ScorerError(f"{path!r} holds a model of type {found.get('model_type')!r}, not a grip scorer")
            loaded: Any = super().from_pretrained(
                path, *model_args, use_safetensors=True, output_loading_info=True, **kwargs
            )
        except ScorerError:
            raise
        except Exception as error:
            raise ScorerError(f"cannot load a grip scorer from {path!r}: {error}") from error
        scorer, info = loaded
        check_loading(info, path)
        broken = [name for name, weight in scorer.named_parameters() if not torch.isfinite(weight).all()]
        if broken:
            raise ScorerError(f"the weights at {path!r} are damaged: NaN or infinity in {broken}")
        return loaded if wants_info else scorer

    def _read(self, text: Tensor, mask: Tensor) -> Tensor:
        """Words with their order and neighbours: [G, T, D] -> [G, T, W]."""
        words = self.words(text) * unit_rms(text) + sinusoid(mask.cumsum(1), self.config.width).to(text.dtype)
        return self.text_norm(self.text_block(words, mask))
