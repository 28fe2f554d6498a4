"""torch.compile of whole `generate` calls and of prefills, counted beside the unpatched model."""

import pytest
import torch
from tiny import IMAGE, build, make_inputs, select_by_content
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache
from versions import CACHE

from grip_hf import apply_grip, remove_grip

pytestmark = pytest.mark.slow

PROMPTS = [[3, IMAGE, 4]]
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
LOOSE = {"gemma4": {"atol": 5e-4, "rtol": 1e-3}}


class Counter:
    """A back end that runs graphs as they are, and counts them."""

    def __init__(self):
        torch._dynamo.reset()
        counters.clear()
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph

    def __deepcopy__(self, memo):  # `generate` copies its settings
        return self

    @property
    def breaks(self):
        return sum(counters["graph_break"].values())


def upstream_counts_windows(model):
    return "sliding_attention" in (getattr(model.config.get_text_config(), "layer_types", None) or ())


def generate(model, inputs, **kwargs):
    settings = {"do_sample": False, "max_new_tokens": 6, "cache_implementation": "static"}
    with torch.no_grad():
        return model.generate(**inputs, **settings, return_dict_in_generate=True, output_logits=True, **kwargs)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "gemma3n", "gemma4", "cohere2_vision"])
def test_generate_at_a_fixed_budget(family):
    """`generate` compiles its decoding as one graph, like that of the unpatched model, for all prompts of a length."""
    model, inputs = build(family), make_inputs(family, PROMPTS)
    others = make_inputs(family, PROMPTS, seed=5)
    graphs = {}
    for name in ("unpatched", "patched"):
        if name == "patched":
            apply_grip(model, num_tokens=3, selector=select_by_content)
        expected = [generate(model, one, disable_compile=True) for one in (inputs, others)]
        counter = Counter()
        config = CompileConfig(fullgraph=True, backend=counter, mode=None, dynamic=False)
        config._compile_all_devices = True  # transformers compiles on GPUs only, unless told so
        for one, plain in zip((inputs, others), expected, strict=True):
            # Nothing is compiled twice, the hooks either.
            with torch._dynamo.config.patch(error_on_recompile=not upstream_counts_windows(model)):
                out = generate(model, one, compile_config=config)
            assert torch.equal(out.sequences, plain.sequences)
            torch.testing.assert_close(torch.stack(out.logits), torch.stack(plain.logits), **LOOSE.get(family, CLOSE))
        assert counter.breaks == 0
        graphs[name] = counter.graphs
        torch._dynamo.reset()
    assert [len(one) for one in model.grip.kept_tokens(out)] == [3]
    # A sliding window is counted by a Python integer, upstream and here, so there is a graph per step.
    assert graphs["patched"] == graphs["unpatched"]
    assert graphs["patched"] == 1 or upstream_counts_windows(model)


def prefill(model, inputs, compiled):
    cache = StaticCache(config=model.config, max_cache_len=inputs["input_ids"].shape[1] + 8)
    with torch.no_grad():
        return compiled(**inputs, **{CACHE: cache}).logits


def test_a_prefill_at_a_fixed_budget():
    """The choice itself runs as it stands: one graph more than without the patch, and none for other pictures."""
    model = build("llava")
    inputs, others = (make_inputs("llava", PROMPTS, seed=seed) for seed in (0, 5))
    seen = {}
    for name in ("unpatched", "patched"):
        if name == "patched":
            apply_grip(model, num_tokens=6, selector=select_by_content)
        expected = [prefill(model, one, model) for one in (inputs, others)]
        counter = Counter()
        compiled = torch.compile(lambda **call: model(**call), backend=counter)
        torch.testing.assert_close(prefill(model, inputs, compiled), expected[0], **CLOSE)
        seen[name] = counter.graphs
        torch.testing.assert_close(prefill(model, others, compiled), expected[1], **CLOSE)
        assert counter.graphs == seen[name]
        assert counter.breaks > 0  # upstream's own check of the number of visual tokens, on CPU
    remove_grip(model)
    torch._dynamo.reset()
    assert seen["patched"] <= seen["unpatched"] + 1
