"""A policy whose completions are keep-sets, in the shape that TRL's trainers expect of a causal language model.

The vocabulary is the visual tokens, a completion the list of those picked, in the order of picking. The prompt is one
number: the row of the example, which the policy looks up in a `SampleStore`. The store, and with it the frozen
vision-language model, stays outside the module tree, so that checkpoints hold the scorer only.

TRL takes the logits, or (from 1.15 on) calls the backbone and multiplies what it returns with the weight of the output
embeddings. The backbone gives, for each pick, the scores of the tokens not picked yet, and the weight is the identity;
log-probs, entropies and gradients are then exactly those of the Plackett-Luce distribution over the scores, those of a
scorer with memory being what the picks before made of them.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from ..engine.keepsets import VisualBatch
from ..frozen.store import SampleStore
from ..scorer.memory import Rated, scores_before_picks
from ..scorer.model import GripScorer, GripScorerConfig, check_loading

# Not -inf: the identity head would make NaN of -inf * 0.
GONE = -1e9
# What the vocabulary holds besides the visual tokens: padding and the end of a keep-set. Neither is ever picked.
EXTRA = ("<pad>", "</s>")


def score_groups(scorer: nn.Module, batch: VisualBatch) -> Tensor:
    """[G, N] float32 scores of a batch, with gradients."""
    return scorer(*_seen(batch))


def rate_groups(scorer: GripScorer, batch: VisualBatch) -> Rated:
    """The same with what a scorer with memory needs while it picks."""
    return scorer.rate(*_seen(batch)) if scorer.config.memory_width else Rated(scorer(*_seen(batch)))


def _seen(batch: VisualBatch) -> tuple[Any, ...]:
    ratio = (batch.budgets / batch.mask.sum(1)).float().clamp(max=1)
    return batch.tokens, batch.mask, batch.text, batch.text_mask, ratio, batch.positions


class PruningPolicyConfig(PreTrainedConfig):
    """Sizes of a `PruningPolicy`: of its scorer, and the largest number of visual tokens of an example."""

    model_type = "grip_policy"
    auto_map: ClassVar[dict[str, str]] = {}  # TRL reads it when it loads a reference model

    num_actions: int = 576
    scorer: dict[str, Any] | None = None
    tie_word_embeddings: bool = False


class Backbone(nn.Module):
    """Gives TRL the scores of the tokens still to choose from, where it expects hidden states."""

    def __init__(self, config: PruningPolicyConfig, scorer: GripScorer) -> None:
        super().__init__()
        self.num_actions = config.num_actions
        self.scorer = scorer
        self.store: SampleStore | None = None

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> BaseModelOutput:
        """Scores before each pick.

        Args:
            input_ids: [B, 1 + K] long: the row of the example, then its picks.
            attention_mask: [B, 1 + K], zero after the last pick of a row.

        Returns:
            `last_hidden_state` [B, 1 + K, num_actions]: at t the scores that pick t + 1 was drawn by; tokens already
            picked, and padding, have -1e9. The last position is not used.
        """
        if self.store is None:
            raise RuntimeError("the policy has no sample store: call policy.attach(store) before training")
        picks, real = input_ids[:, 1:], attention_mask[:, 1:].bool()
        # The completions of a group share example and budget, so they share their scores.
        asked = torch.stack([input_ids[:, 0], real.sum(1)], 1)
        distinct, group = asked.unique(dim=0, return_inverse=True)
        batch = self.store.visual(distinct[:, 0].tolist(), distinct[:, 1])
        if batch.mask.shape[1] > self.num_actions:
            raise ValueError(
                f"an example has {batch.mask.shape[1]} visual tokens, the policy allows {self.num_actions}"
            )
        size = batch.mask.shape[1]
        rated = rate_groups(self.scorer, batch).rows(group)
        states = scores_before_picks(rated, picks.clamp(max=size - 1))
        states = states.masked_fill(~batch.mask[group][:, None], GONE)
        states = nn.functional.pad(states, (0, self.num_actions - size), value=GONE)
        chosen = nn.functional.one_hot(picks.clamp(max=self.num_actions - 1), self.num_actions)
        taken = (chosen.cumsum(1) - chosen).bool() & real[..., None]
        states = states.masked_fill(taken, GONE)
        return BaseModelOutput(last_hidden_state=nn.functional.pad(states, (0, 0, 0, 1)))


class IdentityHead(nn.Module):
    """Output embeddings that leave scores as they are."""

    bias = None

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("weight", torch.eye(size), persistent=False)


class PruningPolicy(PreTrainedModel):
    """The scorer as TRL sees it.

    Args:
        config: The sizes.
        scorer: The scorer to train; without one a fresh one is made from the config.
    """

    config_class = PruningPolicyConfig
    config: PruningPolicyConfig
    base_model_prefix = "backbone"

    def __init__(self, config: PruningPolicyConfig, scorer: GripScorer | None = None) -> None:
        super().__init__(config)
        self.backbone = Backbone(config, scorer or GripScorer(GripScorerConfig.from_dict(config.scorer or {})))
        self.head = IdentityHead(config.num_actions)
        self.generation_config = GenerationConfig()
        if scorer is None:
            self.post_init()

    @classmethod
    def around(cls, scorer: GripScorer, store: SampleStore, num_actions: int) -> PruningPolicy:
        """Wrap a scorer, without copying it."""
        policy = cls(PruningPolicyConfig(num_actions=num_actions, scorer=scorer.config.to_dict()), scorer)
        policy.attach(store)
        return policy

    def attach(self, store: SampleStore) -> None:
        """Say where examples are looked up."""
        self.backbone.store = store

    @property
    def scorer(self) -> GripScorer:
        """The scorer that is trained."""
        return self.backbone.scorer

    @classmethod
    def from_pretrained(  # the name of the first argument is upstream's
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *model_args: Any, **kwargs: Any
    ) -> PruningPolicy:
        """Load a policy that `save_pretrained` wrote.

        Raises:
            ScorerError: Weights are missing, unknown or of another shape.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        path = os.fspath(pretrained_model_name_or_path or "")
        loaded: Any = super().from_pretrained(path, *model_args, output_loading_info=True, **kwargs)
        policy, info = loaded
        check_loading(info, path)
        return loaded if wants_info else policy

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Of the head alone: its weight is in no checkpoint, and loading makes modules without values first.
        if isinstance(module, IdentityHead):
            weight: Any = module.weight
            module.weight = torch.eye(module.size, device=weight.device)

    def get_output_embeddings(self) -> IdentityHead:
        """The identity."""
        return self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> CausalLMOutput:
        """Logits of the next pick; from TRL 1.15 on TRL puts its own function in this place.

        Args:
            input_ids: See `Backbone.forward`, as for `attention_mask`.
            attention_mask: Likewise.
            **kwargs: What else TRL gives a language model; not used.

        Returns:
            `logits` [B, 1 + K, num_actions + 2] float32: the scores, and -1e9 for padding and the end of a keep-set.
        """
        states = self.backbone(input_ids, attention_mask, **kwargs).last_hidden_state
        return CausalLMOutput(logits=nn.functional.pad(states, (0, len(EXTRA)), value=GONE))


AutoConfig.register(PruningPolicyConfig.model_type, PruningPolicyConfig)
AutoModelForCausalLM.register(PruningPolicyConfig, PruningPolicy)


def keep_set_tokenizer(num_actions: int) -> PreTrainedTokenizerFast:
    """A tokenizer that writes a keep-set as its numbers, for TRL's log of completions."""
    vocabulary = {str(token): token for token in range(num_actions)}
    vocabulary |= {token: num_actions + i for i, token in enumerate(EXTRA)}
    pad, end = EXTRA
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=pad))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token=end)
