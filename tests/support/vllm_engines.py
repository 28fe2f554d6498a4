"""A vLLM engine in this process, and the same questions put to the patched transformers model.

with engine(folder, grip={"keep_ratio": 0.3}) as llm:
    answers = ask(llm, [Ask(picture, "<image>w1 w2")])
"""

import contextlib
import dataclasses
import gc
from typing import Any

import numpy as np
import torch
from PIL import Image

from grip_hf import GripScorer, apply_grip, remove_grip
from grip_hf.scorer import GripScorerConfig


@dataclasses.dataclass(frozen=True)
class Ask:
    """Pictures, a prompt with a placeholder for each, and the budget of this request, if it has one of its own."""

    pictures: Any
    prompt: str
    budget: dict | None = None

    def request(self):
        pictures = self.pictures if isinstance(self.pictures, list) else [self.pictures]
        extra = {} if self.budget is None else {"mm_processor_kwargs": {"grip": self.budget}}
        return {"prompt": self.prompt, "multi_modal_data": {"image": pictures}, **extra}


def picture(seed, size=(64, 64)):
    """Blocks of random colours."""
    colours = np.random.default_rng(seed).integers(0, 255, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.NEAREST)


def write_scorer(folder, hidden, seed=0, **sizes):
    """An untrained scorer whose scores differ widely from token to token and from question to question."""
    torch.manual_seed(seed)
    scorer = GripScorer(GripScorerConfig(hidden_size=hidden, width=32, attention_width=32, num_heads=2, **sizes))
    with torch.no_grad():
        for weight in scorer.parameters():
            if weight.ndim > 1:
                weight.normal_(std=1.5 * weight.shape[-1] ** -0.5)
    scorer.save_pretrained(folder)
    return str(folder)


@contextlib.contextmanager
def engine(folder, grip=None, **options):
    """An engine; `grip` are its settings."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    overrides = {} if grip is None else {"hf_overrides": {"grip": grip}}
    usual = {"dtype": "float32", "enforce_eager": True, "max_model_len": 768, "max_num_batched_tokens": 768}
    usual |= {"limit_mm_per_prompt": {"image": 3}, "distributed_executor_backend": "uni", "max_num_seqs": 16}
    llm = LLM(str(folder), **{**usual, **overrides, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def ask(llm, asks, tokens=8, **sampling):
    """The token ids of greedy answers."""
    return [list(one.outputs[0].token_ids) for one in outputs(llm, asks, tokens, **sampling)]


def outputs(llm, asks, tokens=8, **sampling):
    from vllm import SamplingParams

    settings = SamplingParams(**{"temperature": 0, "max_tokens": tokens, "ignore_eos": True, **sampling})
    return llm.generate([one.request() for one in asks], settings, use_tqdm=False)


def reference(model, processor, asks, tokens=8, **settings):
    """Answers of the patched transformers model, one request at a time; a request's budget replaces the model's."""
    answers = []
    for one in asks:
        own = {name: value for name, value in settings.items() if not one.budget or name not in BUDGETS}
        apply_grip(model, **own, **(one.budget or {}))
        pictures = one.pictures if isinstance(one.pictures, list) else [one.pictures]
        inputs = processor(text=[one.prompt], images=[pictures], return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=None)
        answers.append(out[0, inputs["input_ids"].shape[1] :].tolist())
    remove_grip(model)
    return answers


BUDGETS = ("keep_ratio", "num_tokens")
