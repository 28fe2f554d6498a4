"""The tower scorer: one score per group of rows, from their hidden states, the question and the budget.

It stands between two layers of the vision tower, so it must cost next to nothing: one block of a few dozen channels. A
`PreTrainedModel` of its own, it lies in the folder `tower` within that of a scorer.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..engine.keepsets import VisualBatch
from ..errors import ScorerError
from ..scorer.hints import (
    NUM_POSITION_FEATURES,
    NUM_VISUAL_HINTS,
    budget_features,
    hints,
    lengths,
    position_features,
    sinusoid,
    unit_rms,
)
from ..scorer.layers import Mlp, VisualBlock
from ..scorer.model import check_loading
from ..scorer.start import draw_weights

BUDGET_WIDTH = 16
# Untrained it is the best method without training, the distance from the picture's mean row: the weight of that hint,
# and where it is among the hints.
START, CENTRE = 3.0, 1


class TowerScorerConfig(PreTrainedConfig):
    """Sizes of a `TowerScorer`, and what it was made for.

    Args:
        hidden_size: Width of the tower's rows.
        text_size: Width of the word embeddings.
        width: Width that the scorer works in.
        num_heads: Heads per attention; must divide `width`.
        query_aware: Whether the question is read.
        depth: After how many layers of the tower it chooses.
        base_model: The model that it is made for, `{"id", "model_type", "text_model_type"}`, or None if not known.

    Raises:
        ScorerError: A size is not a positive integer, or `num_heads` does not divide `width`.
    """

    model_type = "grip_tower_scorer"

    hidden_size: int = 1024
    text_size: int = 4096
    width: int = 32
    num_heads: int = 2
    query_aware: bool = True
    depth: int = 8
    base_model: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("hidden_size", "text_size", "width", "num_heads", "depth"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ScorerError(f"{name} must be an integer >= 1, got {value!r}")
        if self.width % self.num_heads:
            raise ScorerError(f"num_heads must divide width {self.width}, got {self.num_heads}")
        super().__post_init__(**kwargs)


class TowerScorer(PreTrainedModel):
    """Scores groups of rows of a vision tower: higher means keep. One scorer serves all ratios."""

    config_class = TowerScorerConfig
    config: TowerScorerConfig
    base_model_prefix = "tower_scorer"
    main_input_name = "tokens"
    _supports_sdpa = True

    def __init__(self, config: TowerScorerConfig) -> None:
        super().__init__(config)
        width = config.width
        self.visual = nn.Linear(config.hidden_size, width, bias=False)
        self.side = nn.Linear(NUM_VISUAL_HINTS + NUM_POSITION_FEATURES, width)
        if config.query_aware:
            self.words, self.text_norm = nn.Linear(config.text_size, width, bias=False), nn.LayerNorm(width)
        self.budget = Mlp(2, BUDGET_WIDTH, 2 * width)
        self.block = VisualBlock(width, width, config.num_heads, config.query_aware)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1)
        self.distance = nn.Parameter(torch.tensor(START))
        draw_weights(self)
        with torch.no_grad():
            self.head.weight.zero_()
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
        """Score the groups of each picture.

        Args:
            tokens: [P, G, C] rows of the tower, any float dtype.
            mask: [P, G] bool, True at real groups.
            text: [P, T, D] embeddings of the prompt's words; T may be 0. Not read if not `query_aware`.
            text_mask: [P, T] bool, True at real words.
            keep_ratio: [P] share of the groups that will stay, in (0, 1].
            positions: [P, G, 2] (row, column) of each group within its picture, in [0, 1].

        Returns:
            [P, G] float32 scores, 0 at padding.
        """
        dtype = self.visual.weight.dtype
        tokens, norms = tokens.to(dtype), lengths(tokens)
        known = hints(tokens, norms, mask, None, None)
        side = torch.cat([known, position_features(positions.float())], -1)
        x = self.visual(tokens) * (math.sqrt(tokens.shape[-1]) / norms).to(dtype) + self.side(side.to(dtype))
        words = None
        if self.config.query_aware:
            if text is None or text_mask is None:
                raise ScorerError("this tower scorer is query_aware and needs text and text_mask, got None")
            text = text.to(dtype)
            order = sinusoid(text_mask.cumsum(1), self.config.width).to(dtype)
            words = self.text_norm(self.words(text) * unit_rms(text) + order)
        film = self.budget(budget_features(keep_ratio).to(dtype))[:, None]
        x = self.block(x, mask, words, text_mask, film)
        found = self.head(self.norm(x)).squeeze(-1).float() - self.distance.float() * known[..., CENTRE]
        return found.masked_fill(~mask, 0)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> TowerScorer:
        """Load what `save_pretrained` wrote.

        Raises:
            ScorerError: A file is missing or damaged, or belongs to another kind of model.
        """
        path = os.fspath(folder)
        try:
            kind = PreTrainedConfig.get_config_dict(path)[0].get("model_type")
            if kind != TowerScorerConfig.model_type:
                raise ScorerError(f"{path!r} holds a model of type {kind!r}, not a tower scorer")
            loaded: Any = cls.from_pretrained(
                path, use_safetensors=True, output_loading_info=True, dtype=torch.float32, local_files_only=True
            )
        except ScorerError:
            raise
        except Exception as error:
            raise ScorerError(f"cannot load a tower scorer from {path!r}: {error}") from error
        scorer, info = loaded
        check_loading(info, path)
        broken = [name for name, weight in scorer.named_parameters() if not torch.isfinite(weight).all()]
        if broken:
            raise ScorerError(f"the weights at {path!r} are damaged: NaN or infinity in {broken}")
        return scorer.eval()


class TowerGripSelector:
    """The tower scorer as what chooses the rows.

    Args:
        scorer: It.
    """

    name = "grip"

    def __init__(self, scorer: TowerScorer) -> None:
        self.scorer = scorer
        self.reads_question = scorer.config.query_aware

    @torch.no_grad()
    def __call__(self, batch: VisualBatch) -> Tensor:
        """Return the scorer's scores [P, G]."""
        if self.scorer.device != batch.tokens.device:
            nn.Module.to(self.scorer, batch.tokens.device)
        return self.scorer(batch.tokens, batch.mask, batch.text, batch.text_mask, batch.keep_ratio, batch.positions)
