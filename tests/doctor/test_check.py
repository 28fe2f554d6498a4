"""The self-check passes where pruning works, and finds each kind of fault that was planted."""

import pytest
import torch
from matrix import KINDS, UPSTREAM, every_family
from transformers import LlamaModel
from transformers.cache_utils import DynamicLayer

from grip_hf import GripConfig, apply_grip
from grip_hf.doctor import check
from grip_hf.doctor.check import examine
from grip_hf.doctor.findings import CHECKS
from grip_hf.families.table import find_parts
from grip_hf.patch import prune


def failed(report):
    return {one.check: one.message for one in report.failures}


@every_family(KINDS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_family_passes(family, attention):
    report = examine(family, prune, attention=attention)
    assert report.passed, report.failures
    assert [one.check for one in report.findings] == list(CHECKS)
    absent = [one.check for one in report.findings if one.status == "absent"]
    assert absent == (["static cache"] if absent or family in UPSTREAM["static cache"] else [])
    assert not absent or family not in ("llava", "qwen2_vl")
    assert all(one.error <= one.allowed for one in report.findings if one.error is not None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_family(("llava", "qwen2_vl"))
def test_half_precision_passes(family, dtype):
    assert examine(family, prune, dtype=dtype).passed


def compacted(model, selector, ratio):
    """Positions are re-numbered, as if there had been no dropped tokens."""
    return apply_grip(model, GripConfig(keep_ratio=ratio, position_ids="compact"), selector=selector).grip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compacted_positions_are_found(dtype):
    found = failed(examine("llava", compacted, dtype=dtype))
    assert {"prefill", "no cache", "dynamic cache", "static cache"} == set(found)
    assert "differ" in found["prefill"]


def planted(fault):
    """A patch with a hook behind it that changes the arguments of the language model."""

    def patch(model, selector, ratio):
        handle = prune(model, selector, ratio)

        def change(module, args, kwargs):
            return args, {**kwargs, **fault(kwargs)}

        hook = find_parts(model).language_model.register_forward_pre_hook(change, with_kwargs=True)
        remove = handle.remove
        handle.remove = lambda: (hook.remove(), remove())
        return handle

    return patch


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3"])
def test_a_mask_that_lets_dropped_tokens_in_is_found(family):
    found = failed(examine(family, planted(lambda kwargs: {"attention_mask": None})))
    assert "prefill" in found and all("unequal rows" in message for message in found.values())


def test_tokens_that_move_by_one_are_found():
    found = failed(examine("qwen2_vl", planted(lambda kwargs: {"position_ids": kwargs["position_ids"] * 2})))
    assert {"prefill", "no cache", "dynamic cache", "static cache"} == set(found)


def test_a_changed_get_mask_sizes_is_found(monkeypatch):
    real = DynamicLayer.get_mask_sizes

    def changed(self, *args, **kwargs):
        length, offset = real(self, *args, **kwargs)
        return length + 1, offset

    monkeypatch.setattr(DynamicLayer, "get_mask_sizes", changed)
    assert "prefill" in failed(examine("llava", prune))


def test_a_renamed_cache_is_found(monkeypatch):
    """The language model is called with its KV cache under a name that nobody knows."""
    forward, name = LlamaModel.forward, ("cache", "past_key_values")

    def call(self, *args, **kwargs):
        return torch.nn.Module.__call__(
            self, *args, **{"store" if key in name else key: kwargs[key] for key in kwargs}
        )

    def renamed(self, *args, store=None, **kwargs):
        return forward(self, *args, past_key_values=store, **kwargs)

    monkeypatch.setattr(LlamaModel, "__call__", call)
    monkeypatch.setattr(LlamaModel, "forward", renamed)
    found = failed(examine("llava", prune))
    assert {"dynamic cache", "static cache"} <= set(found) and "'store'" in found["dynamic cache"]


def test_another_budget_is_found():
    found = failed(examine("llava", lambda model, selector, ratio: prune(model, selector, 0.75)))
    assert "[12] of [16] visual tokens were kept, the budget says [8]" in found["prefill"]


def test_a_patch_that_does_nothing_is_found():
    def nothing(model, selector, ratio):
        return prune(model, selector, 1.0)

    assert "prefill" in failed(examine("llava", nothing))


def test_a_patch_that_stays_is_found():
    def stays(model, selector, ratio):
        handle = prune(model, selector, ratio)
        handle.remove = lambda: None
        return handle

    assert "removal" in failed(examine("llava", stays))


def test_a_patch_that_raises_is_found():
    def raises(model, selector, ratio):
        raise RuntimeError("on purpose")

    report = examine("llava", raises)
    assert not report.passed and "RuntimeError: on purpose" in failed(report)["prefill"]


def test_a_model_that_cannot_be_built_is_told(monkeypatch):
    def build(*args):
        raise ImportError("no such thing")

    monkeypatch.setattr(check, "make", build)
    assert failed(examine("llava", prune)) == {"build": "ImportError: no such thing"}


def test_a_fault_of_a_static_cache_is_not_laid_to_transformers():
    """Only where the unpatched model fails too is a check absent."""

    def patch(model, selector, ratio):
        handle = prune(model, selector, ratio)
        generate, remove = model.generate, handle.remove

        def call(**kwargs):
            if kwargs.get("cache_implementation") == "static":
                raise RuntimeError("on purpose")
            return generate(**kwargs)

        def restore():
            del model.generate
            remove()

        model.generate, handle.remove = call, restore
        return handle

    assert failed(examine("llava", patch)) == {"static cache": "one row: RuntimeError: on purpose"}
