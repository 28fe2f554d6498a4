"""What a frozen vision-language model knows about an example, and what it answers with some of its visual tokens.

Everything goes through the patch that users apply: its hooks hand over the `VisualBatch` of each prompt, and drop the
tokens that are not kept. Pictures are encoded once and cached by content.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from cachetools import LRUCache
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..config import GripConfig
from ..engine.keepsets import VisualBatch
from ..engine.taps import attach_taps, attached_taps, encoding
from ..engine.upstream import ENCODED, check_takes_encoded
from ..errors import DatasetError
from ..families.table import find_parts
from ..patch import apply_grip, remove_grip
from .data import Example
from .samples import Encoded, Sample, one_row, share_tokens
from .shared import SharedPictures, fingerprint


class FrozenVLM:
    """A vision-language model that is asked, never trained.

    Args:
        model: The model; it is patched (see `close`) and its weights stop requiring gradients.
        processor: Its processor, with a chat template.
        max_answer_tokens: Longest answer that is made up for examples without one.
        cache_bytes: How much memory encoded pictures may take.
        tap: Called with the model: registers hooks that publish extra rows per visual token, and returns them.
        share: A folder in which processes share encoded pictures, and in which they outlive them; None shares none.

    Raises:
        UnsupportedModelError: The family is unknown, or cannot take pictures that were encoded before: none can in
            transformers before 5.18.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        max_answer_tokens: int = 16,
        cache_bytes: int = 1 << 30,
        tap: Callable[[Any], Iterable[Any]] | None = None,
        share: Path | None = None,
    ) -> None:
        self.parts = find_parts(model)
        check_takes_encoded(self.parts.base)
        if getattr(processor, "chat_template", None) is None:
            raise DatasetError(f"the processor {type(processor).__name__} has no chat template to write prompts with")
        self.model, self.processor = model.eval().requires_grad_(False), processor
        self.max_answer_tokens = max_answer_tokens
        self._cache: LRUCache[str, Encoded] = LRUCache(cache_bytes, getsizeof=lambda one: one.nbytes)
        self._seen: VisualBatch | None = None
        self._keep: Sequence[Tensor] | None = None
        self._taps: list[Any] = []
        self.attach()
        self._taps = list(tap(model)) if tap is not None else []
        self._see_taps()
        self._shared = None if share is None else SharedPictures(share, fingerprint(self.parts))

    def attach(self) -> None:
        """Put the patch on the model again, after another one stood there."""
        apply_grip(self.model, GripConfig(num_tokens=1), selector=self._select)
        self._see_taps()

    def _see_taps(self) -> None:
        self.model.grip._boundary.tapped = bool(self._taps)

    def close(self) -> None:
        """Remove the patch from the model."""
        for hook in self._taps:
            hook.remove()
        remove_grip(self.model)

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.model.get_input_embeddings().weight.device

    @property
    def hidden_size(self) -> int:
        """Width of visual tokens and word embeddings."""
        return self.model.config.get_text_config().hidden_size

    @property
    def vocabulary(self) -> int:
        """Number of tokens that answers are made of."""
        return self.model.config.get_text_config().vocab_size

    def _select(self, batch: VisualBatch) -> Tensor:
        """The patch's selector: remember what there is to choose from, or choose what was asked for."""
        if self._keep is None:
            self._seen = batch
            return batch.mask.float()
        scores = torch.zeros_like(batch.mask, dtype=torch.float32)
        for row, keep in enumerate(self._keep):
            scores[row, : len(keep)] = keep.to(scores)
        return scores

    @torch.no_grad()
    def prepare(self, examples: Sequence[Example]) -> list[Sample]:
        """Encode the pictures, tokenize, and find what a selector sees; without an answer the model is asked for one.

        Raises:
            DatasetError: An example cannot be processed, or holds no visual token.
        """
        inputs = [self.process(example) for example in examples]
        encoded = [self._encode(one) for one in inputs]
        self._seen = None
        with self.model.grip.budget(num_tokens=1):  # choosing comes before the language model: let that run on little
            self.parts.base(**self.collate(inputs), **pictures(encoded), use_cache=False)
        seen = self._seen
        if seen is None or len(seen.mask) != len(inputs):
            raise DatasetError("an example has no visual token, or only one: there is nothing to choose")
        samples = []
        for row, example in enumerate(examples):
            answer = (
                self._say(inputs[row], encoded[row]) if example.answer is None else self.answer_tokens(example.answer)
            )
            visual = share_tokens(own := one_row(seen, row), encoded[row].features)
            size = own.text.nbytes + own.tokens.nbytes * (visual is own) + 4 * len(answer) * self.vocabulary
            size += sum(tap.nbytes for tap in own.taps.values())
            samples.append(Sample(inputs[row], encoded[row], visual, answer, size, example))
        return samples

    def process(self, example: Example) -> dict[str, Tensor]:
        """The processor's output for one example, a batch of one with pixels.

        Raises:
            DatasetError: The processor cannot take it.
        """
        try:
            batch = self.processor.apply_chat_template(
                [example.messages], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        except Exception as error:
            raise DatasetError(f"the processor cannot take an example: {type(error).__name__}: {error}") from error
        return {name: value.to(self.device) for name, value in batch.items()}

    def _encode(self, inputs: dict[str, Tensor]) -> Encoded:
        """Encode the pictures of one example, or find them in the cache; takes the pixels out of `inputs`."""
        encoder = self.parts.base.get_image_features
        wanted = {name: inputs[name] for name in inspect.signature(encoder).parameters if name in inputs}  # type: ignore[arg-type]
        if not any(name.startswith("pixel_values") for name in wanted):
            raise DatasetError("an example has no picture that the model can see")
        key = hashlib.sha1(b"".join(_bytes(inputs[name]) for name in sorted(wanted))).hexdigest()
        for name in [name for name in inputs if name.startswith("pixel_values")]:
            pixels = inputs.pop(name)
            if name in wanted and pixels.is_floating_point():
                wanted[name] = pixels.to(self.model.dtype)
        known = self._cache.get(key)
        if known is not None:
            return known

        def encode() -> Encoded:
            with encoding() as taps:
                output = encoder(**wanted, return_dict=True)  # type: ignore[operator]
            return Encoded(output.pooler_output, {**attached_taps(output), **taps.joined()})

        encoded = encode() if self._shared is None else self._shared.get(key, encode, self.device)
        if encoded.nbytes <= self._cache.maxsize:
            self._cache[key] = encoded
        return encoded

    def pixels(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """The pixels of samples' pictures: arguments of the model that encodes them anew, beside `collate`'s."""
        given = [self.process(sample.example) for sample in samples]
        names = [name for name in given[0] if name.startswith("pixel_values")]
        return {name: _stacked([one[name] for one in given]).to(self.model.dtype) for name in names}

    def answer_tokens(self, answer: str) -> Tensor:
        """[A] long, the tokens of an answer, with the one that ends it; raises `DatasetError` for a picture's."""
        tokenizer = self.processor.tokenizer
        ids = tokenizer(answer, add_special_tokens=False).input_ids
        if set(ids) & set(self.parts.token_ids):
            raise DatasetError(f"an answer must not hold a placeholder of a picture, got {answer!r}")
        return torch.tensor([*ids, tokenizer.eos_token_id], device=self.device)

    def _say(self, inputs: dict[str, Tensor], encoded: Encoded) -> Tensor:
        """What the unpruned model answers, greedily."""
        with self.model.grip.disabled():
            ids = self.model.generate(
                **inputs,
                **pictures([encoded]),
                max_new_tokens=self.max_answer_tokens,
                do_sample=False,
                suppress_tokens=list(self.parts.token_ids),  # an answer holds no pictures
            )
        return ids[0, inputs["input_ids"].shape[1] :]

    def collate(self, inputs: Sequence[dict[str, Tensor]], tails: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
        """One batch of prompts, each followed by the tokens of its tail, padded on the left."""
        shape = inputs[0]["input_ids"].shape
        tails = [inputs[0]["input_ids"].new_zeros(0)] * len(inputs) if tails is None else tails
        width = max(one["input_ids"].shape[1] + len(tail) for one, tail in zip(inputs, tails, strict=True))
        fill = {"input_ids": self.processor.tokenizer.pad_token_id or 0}
        batch = {}
        for name, first in inputs[0].items():
            if first.shape[:2] != shape:  # not one entry per token
                batch[name] = torch.cat([one[name] for one in inputs])
                continue
            batch[name] = first.new_full((len(inputs), width), fill.get(name, 0))
            for row, one, tail in zip(batch[name], inputs, tails, strict=True):
                end = width - len(tail)
                row[end - one[name].shape[1] : end] = one[name][0]
                if name in ("input_ids", "attention_mask"):
                    row[end:] = tail if name == "input_ids" else 1
        return batch

    def visual_mask(self, input_ids: Tensor) -> Tensor:
        """[B, L] bool: which tokens stand for pictures."""
        return torch.isin(input_ids, torch.tensor(self.parts.token_ids, device=input_ids.device))

    def run(self, samples: Sequence[Sample], keep: Sequence[Tensor] | None = None, **kwargs: Any) -> Any:
        """Run prompts with their answers, padded on the left.

        Args:
            samples: What to ask; the same one may come several times.
            keep: Per sample [N] bool, the visual tokens that stay, at least one; None keeps all.
            **kwargs: Further arguments of the model; a callable `attention_mask` gets the batch and returns its mask.

        Returns:
            The model's output; its logits [B, Amax, V] are those that predict the answers, aligned on the right.
        """
        batch = self.collate([sample.inputs for sample in samples], [sample.answer for sample in samples])
        if callable(make_mask := kwargs.pop("attention_mask", None)):
            batch["attention_mask"] = make_mask(batch)
        longest = max(len(sample.answer) for sample in samples)
        handle = self.model.grip
        budget = handle.disabled() if keep is None else handle.budget(num_tokens=[int(kept.sum()) for kept in keep])
        self._keep = keep
        try:
            with budget, handle.prompt(torch.ones_like(batch["input_ids"])):  # nothing of the text chooses here
                seen = pictures([sample.encoded for sample in samples])
                output = self.model(**batch, **seen, **kwargs, use_cache=False, logits_to_keep=longest + 1)
        finally:
            self._keep = None
        output.logits = output.logits[:, :-1]
        return output

    @torch.no_grad()
    def full_log_probs(self, samples: Sequence[Sample]) -> Tensor:
        """[B, Amax, V] float32: what the unpruned model predicts, aligned on the right; remembered per sample."""
        missing = list({id(sample): sample for sample in samples if sample.log_probs is None}.values())
        if missing:
            logs = self.run(missing).logits.float().log_softmax(-1)
            for sample, row in zip(missing, logs, strict=True):
                sample.log_probs = row[len(row) - len(sample.answer) :].clone()
        rows = [sample.log_probs for sample in samples if sample.log_probs is not None]
        result = rows[0].new_zeros(len(rows), max(map(len, rows)), rows[0].shape[1])
        for i, row in enumerate(rows):
            result[i, result.shape[1] - len(row) :] = row
        return result


def pictures(encoded: Sequence[Encoded]) -> dict[str, Any]:
    """Encoded pictures of several examples, and their taps, as an argument of the model."""
    parts = [one.features for one in encoded]
    joined: Any = torch.cat(parts) if isinstance(parts[0], Tensor) else [one for part in parts for one in part]
    carrier: Any = BaseModelOutputWithPooling(pooler_output=joined)
    if encoded[0].taps:
        attach_taps(carrier, {name: torch.cat([one.taps[name] for one in encoded]) for name in encoded[0].taps})
    return {ENCODED: {"image": carrier}}


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Pixels of several examples, padded to the most tiles and the largest picture, as processors pad those of one."""
    most = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    gaps = [[most[i] - part.shape[1 + i] for i in range(len(most))] for part in parts]
    padding = [[side for gap in reversed(each) for side in (0, gap)] for each in gaps]
    return torch.cat([torch.nn.functional.pad(part, one) for part, one in zip(parts, padding, strict=True)])


def _bytes(value: Tensor) -> bytes:
    value = value.detach().cpu()
    return str(tuple(value.shape)).encode() + value.contiguous().view(torch.uint8).numpy().tobytes()
