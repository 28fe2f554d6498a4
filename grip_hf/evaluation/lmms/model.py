"""Any supported vision-language model, pruned, behind lmms-eval's model interface."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval import utils
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models import get_model
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from loguru import logger
from tqdm import tqdm

from ...errors import ConfigError, DatasetError, SourceError, UnsupportedModelError
from .settings import generation_arguments, split_arguments


class GripModel(lmms):
    """Answers tasks of the kind `generate_until`, in batches, with the prompts of the model's own chat template.

    Args:
        pretrained: Id on the Hub, or a folder.
        batch_size: Samples at once, >= 1.
        device: Such as "cuda:0" or "cpu"; None takes the one that accelerate gives this process.
        device_map: As transformers takes it, to spread one model over several devices.
        dtype: Floating-point type of the weights; "auto" takes the checkpoint's.
        revision: Branch, tag or commit on the Hub.
        attn_implementation: Such as "sdpa" or "flash_attention_2".
        quantize: "4bit" or "8bit" loads the model with bitsandbytes.
        max_batch_size: Not used; lmms-eval passes it on.
        **pruning: See `Pruning`.

    Raises:
        ConfigError: A setting is unknown or not allowed.
        SourceError: The model cannot be loaded.
        UnsupportedModelError: Its family is not supported, or it has no chat template.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "llava-hf/llava-1.5-7b-hf",
        batch_size: int | str = 1,
        device: str | None = None,
        device_map: str | None = None,
        dtype: str = "auto",
        revision: str = "main",
        attn_implementation: str | None = None,
        quantize: str | None = None,
        max_batch_size: int | None = None,
        **pruning: Any,
    ) -> None:
        super().__init__()
        settings, unknown = split_arguments(pruning)
        if unknown:
            raise ConfigError(f"unknown model_args {sorted(unknown)} of the model 'grip'")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ConfigError(f"batch_size must be an integer >= 1, got {batch_size!r}")
        if quantize not in (None, "4bit", "8bit"):
            raise ConfigError(f"quantize must be 4bit or 8bit, got {quantize!r}")
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        own = device if device is not None and self._world_size == 1 else self.accelerator.device
        self.device = torch.device(own)
        loading = {"dtype": dtype, "revision": revision, "attn_implementation": attn_implementation}
        self.model, self.processor = _load(pretrained, quantize, device_map or {"": self.device}, loading)
        if getattr(self.processor, "chat_template", None) is None:
            raise UnsupportedModelError(f"the processor of {pretrained!r} has no chat template to write prompts with")
        self.processor.tokenizer.padding_side = "left"  # generation goes on at the end of each row
        settings.apply(self.model)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> lmms:
        """Build the model from `--model_args`.

        `backend=NAME` builds lmms-eval's own model NAME instead, with its own prompts and arguments, and prunes the
        transformers model in it.

        Raises:
            ConfigError: A setting is not allowed.
            UnsupportedModelError: The backend holds no model that can be pruned.
        """
        arguments = utils.simple_parse_args_string(arg_string)
        arguments |= {name: value for name, value in (additional_config or {}).items() if value is not None}
        backend = arguments.pop("backend", None)
        if backend is None:
            return cls(**arguments)
        settings, rest = split_arguments(arguments)
        other = get_model(backend)(**rest)
        if not isinstance(getattr(other, "model", None), torch.nn.Module):
            raise UnsupportedModelError(f"backend={backend!r} of lmms-eval holds no transformers model in `model`")
        settings.apply(other.model)
        return other

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer requests, in their order; an error in any of them is raised, never turned into an empty answer.

        Raises:
            DatasetError: The processor cannot take what a task asks.
        """
        order = utils.Collator(
            [request.args for request in requests],
            sort_fn=lambda request: (-len(request[0]), request[0]),  # similar lengths together, longest first
            group_fn=lambda request: request[2],  # one way of generating per batch
            grouping=True,
        )
        results: list[GenerationResult] = []
        seconds, kept, asked = 0.0, 0, 0
        progress = tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding")
        for chunk in order.get_batched(n=self.batch_size):
            _, to_messages, wanted, ids, tasks, splits = zip(*chunk, strict=True)
            places = zip(to_messages, ids, tasks, splits, strict=True)
            messages = [make(self.task_dict[task][split][row]) for make, row, task, split in places]
            inputs = self._inputs([ChatMessages(messages=one).to_hf_messages() for one in messages], tasks)
            arguments, unknown = generation_arguments(wanted[0])
            if unknown:
                logger.warning(f"generation_kwargs {unknown} of {tasks[0]} are not known to generate: left out")
            begin = time.perf_counter()
            out = self.model.generate(
                **inputs, **arguments, pad_token_id=self._pad(), return_dict_in_generate=True, use_cache=True
            )
            seconds += time.perf_counter() - begin
            if any(name.startswith("pixel_values") for name in inputs):
                rows = [len(row) for row in self.model.grip.kept_tokens(out) if len(row)]
                kept, asked = kept + sum(rows), asked + len(rows)
            results += self._results(out.sequences[:, inputs["input_ids"].shape[1] :])
            progress.update(len(chunk))
        progress.close()
        tokens = sum(result.token_counts.output_tokens for result in results)
        log_metrics(
            total_gen_tokens=tokens,
            total_elapsed_time=seconds,
            avg_speed=tokens / seconds if seconds else 0,
            additional_metrics={"rank": self.rank, "visual_tokens_kept": kept / asked if asked else 0},
        )
        return order.get_original(results)

    def _inputs(self, conversations: list[list[dict[str, Any]]], tasks: Sequence[str]) -> dict[str, Any]:
        try:
            batch = self.processor.apply_chat_template(
                conversations,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )
        except Exception as error:
            names = ", ".join(sorted(set(tasks)))
            raise DatasetError(f"the processor cannot take what {names} asks: {error}") from error
        return dict(batch.to(self.model.device, self.model.dtype))

    def _results(self, rows: torch.Tensor) -> list[GenerationResult]:
        """Decode answers; what was padded after the end is not counted."""
        texts = self.processor.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        counts = (rows != self._pad()).sum(1).tolist()
        return [
            GenerationResult(text=text, token_counts=TokenCounts(output_tokens=count))
            for text, count in zip(texts, counts, strict=True)
        ]

    def _pad(self) -> int:
        tokenizer = self.processor.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not done: lmms-eval gives models with chat templates no such requests."""
        raise UnsupportedModelError("the model 'grip' takes tasks of output_type generate_until, not loglikelihood")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not done: what is dropped in one round could not be asked about in the next."""
        raise UnsupportedModelError(
            "the model 'grip' takes tasks of output_type generate_until, not of several rounds"
        )


def _load(name: str, quantize: str | None, device_map: Any, loading: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

    if quantize is not None:
        loading["quantization_config"] = BitsAndBytesConfig(**{f"load_in_{quantize}": True})
    try:
        model = AutoModelForImageTextToText.from_pretrained(name, device_map=device_map, **loading)
        return model.eval(), AutoProcessor.from_pretrained(name, revision=loading["revision"])
    except Exception as error:
        raise SourceError(f"cannot load pretrained={name!r}: {error}") from error
