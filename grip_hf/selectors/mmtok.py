"""MMTok: tokens that cover the words of the question and the picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.keepsets import VisualBatch
from ..errors import ConfigError
from . import register
from .base import Selector
from .coverage import greedy_coverage
from .taps import FEATURES, tap_features
from .words import words_behind

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel


@register("mmtok")
class MMTokSelector(Selector):
    """MMTok (Dong et al., 2025, arXiv 2508.18264): greedy maximum coverage of words and visual tokens.

    A word is covered by a token as far as its softmax over the projected tokens goes there; a visual token likewise,
    through the tower's features (projected tokens where one is made of several patches). Both are averaged over
    their rows and added, the second with a factor. The words are those behind the picture, or all where there are
    none. The official code leaves out words such as "the" and "is" by a list, which a selector cannot: it sees
    embeddings.

    Args:
        alpha: Factor of covering the picture, >= 0.
        word_temperature: Of the softmax of words, > 0; the official 0.02 for LLaVA (0.01 for Qwen2.5-VL).
        token_temperature: Of the softmax of visual tokens, > 0.
    """

    needs: tuple[str, ...] = (FEATURES,)

    def __init__(self, alpha: float = 0.5, word_temperature: float = 0.02, token_temperature: float = 0.2) -> None:
        if isinstance(alpha, bool) or not alpha >= 0:
            raise ConfigError(f"alpha must be a number >= 0, got {alpha!r}")
        for name, value in (("word_temperature", word_temperature), ("token_temperature", token_temperature)):
            if isinstance(value, bool) or not value > 0:
                raise ConfigError(f"{name} must be a number > 0, got {value!r}")
        self.alpha, self.word_temperature, self.token_temperature = alpha, word_temperature, token_temperature

    def prepare(self, model: PreTrainedModel) -> list[RemovableHandle]:
        """Tap the tower's features, where there is one visual token of each patch."""
        features = tap_features(model)
        self.needs = (FEATURES,) if features else ()
        return features

    def __call__(self, batch: VisualBatch) -> Tensor:
        """Return scores [G, N]: kept tokens in the order of their picks, above the others."""
        tokens, words = (F.normalize(values.float(), dim=-1) for values in (batch.tokens, batch.text))
        unit = F.normalize(batch.taps.get(FEATURES, batch.tokens).float(), dim=-1)
        asking = words_behind(batch)
        asking = torch.where(asking.any(1, keepdim=True), asking, batch.text_mask)
        by_words = self._spread(words @ tokens.transpose(1, 2), batch.mask, asking, self.word_temperature)
        by_tokens = self._spread(unit @ unit.transpose(1, 2), batch.mask, batch.mask, self.token_temperature)
        return greedy_coverage(torch.cat([by_words, self.alpha * by_tokens], 1), batch.mask, batch.budgets)

    @staticmethod
    def _spread(similar: Tensor, mask: Tensor, rows: Tensor, temperature: float) -> Tensor:
        """[G, R, N]: softmax of each row of `similar` over real tokens, divided by the number of real rows."""
        floor = torch.finfo(similar.dtype).min
        shares = (similar / temperature).masked_fill(~mask[:, None], floor).softmax(-1)
        return shares * rows[..., None] / rows.sum(1).clamp(min=1)[:, None, None]
