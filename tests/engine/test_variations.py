"""Situations that differ a little from those of other tests, each beside the masked reference."""

import copy
import inspect
import pickle
import threading

import pytest
import torch
import torch.distributed as dist
from reference import assert_close, held_positions, reference_generate, reference_logits
from tiny import IMAGE, IMAGE_ID, build, make_inputs, select_by_content
from torch.nn.parallel import DistributedDataParallel
from transformers import LlavaForConditionalGeneration
from versions import CACHE

from grip_hf import GripConfig, apply_grip, remove_grip

RAGGED = [[3, IMAGE, 4], [2, IMAGE, 2, IMAGE, 3], [1, IMAGE, 9]]
MIXED = [[3, IMAGE, 4], [40], [2, IMAGE, 2]]  # the row in the middle is text alone
STEPS = 4


def words_alone(inputs, row):
    """A row of text as a batch of its own."""
    real = inputs["attention_mask"][row].bool()
    return {name: inputs[name][row : row + 1, real] for name in ("input_ids", "attention_mask")}


def told(model, inputs, **call):
    """Logits of a call, and which positions it held."""
    out = model(**inputs, **call)
    return out.logits, held_positions(inputs, model.grip.last.kept)


def check(model, inputs, family="llava"):
    """A patched model against the unpatched, masked one; gives what was kept."""
    with torch.no_grad():
        logits, held = told(model, inputs)
        kept = [one.tolist() for one in model.grip.last.kept]
        expected = reference_logits(remove_grip(copy.deepcopy(model)), inputs, held)
    assert_close(family, logits[held], expected[held])
    return kept


class TestBatches:
    @pytest.mark.parametrize("family", ["llava", "qwen2_vl", "idefics3", "gemma3"])
    def test_rows_of_text_alone_among_pictures(self, family, no_grad):
        model, inputs = build(family), make_inputs(family, MIXED)
        apply_grip(model, num_tokens=3, selector=select_by_content)
        logits, held = told(model, inputs)
        said = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)[:, -STEPS:]
        assert [len(one) for one in model.grip.last.kept] == [3, 0, 3]
        remove_grip(model)
        assert_close(family, logits[held], reference_logits(model, inputs, held)[held])
        assert torch.equal(said, reference_generate(model, inputs, held, STEPS)[0])

    def test_a_batch_without_rows(self, no_grad):
        """Fails as it does without the patch, and nothing is left of it."""
        model, inputs = build("llava"), make_inputs("llava", [[3, IMAGE, 4]])
        empty = {"input_ids": inputs["input_ids"][:0], "attention_mask": inputs["attention_mask"][:0]}
        for _ in range(2):
            with pytest.raises(RuntimeError, match="0 elements"):
                model(**empty)
            apply_grip(model, num_tokens=3, selector=select_by_content)
        assert len(check(model, inputs)[0]) == 3

    @pytest.mark.parametrize("padding", [0, 5])
    def test_a_mask_of_bools_or_floats(self, padding, no_grad):
        model, inputs = build("llava"), make_inputs("llava", RAGGED)
        inputs = {**inputs, "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (padding, 0))}
        inputs["input_ids"] = torch.nn.functional.pad(inputs["input_ids"], (padding, 0))
        apply_grip(model, num_tokens=3, selector=select_by_content)
        expected, held = told(model, inputs)
        for kind in (torch.bool, torch.float32, torch.int32):
            logits = model(**{**inputs, "attention_mask": inputs["attention_mask"].to(kind)}).logits
            torch.testing.assert_close(logits[held], expected[held], atol=1e-5, rtol=1e-4)


class TestCalls:
    @pytest.mark.parametrize("rows", [1, 3, torch.tensor([2, 5, -1])], ids=["one", "three", "places"])
    def test_logits_of_some_places(self, rows, no_grad):
        """As an int and as places of a row, by name and in a `generate` with the logits of every step."""
        model, inputs = build("llava"), make_inputs("llava", RAGGED)
        apply_grip(model, num_tokens=3, selector=select_by_content)
        whole = model(**inputs).logits
        wanted = whole[:, -rows:] if isinstance(rows, int) else whole[:, rows]
        torch.testing.assert_close(model(**inputs, logits_to_keep=rows).logits, wanted)

    @pytest.mark.parametrize("family", ["llava", "idefics3"])
    def test_beams_from_merged_embeddings(self, family, no_grad):
        model, inputs = build(family), make_inputs(family, [[3, IMAGE, 4], [2, IMAGE, 9]])
        apply_grip(model, num_tokens=4, selector=select_by_content)
        call = {"num_beams": 3, "max_new_tokens": STEPS, "do_sample": False}
        right = model.generate(**inputs, **call)[:, -STEPS:]
        embeds, seen = {}, []
        hook = model.get_decoder().register_forward_pre_hook(lambda m, a, k: embeds.update(k), with_kwargs=True)
        with model.grip.disabled():
            model(**inputs)
        hook.remove()
        model.get_decoder().layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2]))
        merged = {"inputs_embeds": embeds["inputs_embeds"], "attention_mask": inputs["attention_mask"]}
        found = model.generate(input_ids=inputs["input_ids"], **merged, **call)
        assert torch.equal(found[:, -STEPS:], right)
        assert seen[0][1] < inputs["input_ids"].shape[1]

    @pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl"])
    def test_an_output_without_a_dict(self, family, no_grad):
        model, inputs = build(family), make_inputs(family, RAGGED)
        apply_grip(model, num_tokens=3, selector=select_by_content)
        expected = model(**inputs, output_hidden_states=True)
        found = model(**inputs, return_dict=False, output_hidden_states=True)
        assert isinstance(found, tuple) and torch.equal(found[0], expected.logits)
        assert any(isinstance(one, tuple) and len(one) == len(expected.hidden_states) for one in found)


class TestOneProcess:
    def test_several_models_at_once_and_each_by_its_own_patch(self, no_grad):
        """Called in turns, nested in each other's selectors, and in threads."""
        one, two = build("llava"), build("qwen2_vl", seed=1)
        inputs = {"llava": make_inputs("llava", RAGGED), "qwen2_vl": make_inputs("qwen2_vl", RAGGED)}
        apply_grip(two, num_tokens=2, selector=select_by_content)
        alone = check(two, inputs["qwen2_vl"], "qwen2_vl")

        def asks_the_other(batch):
            two(**inputs["qwen2_vl"])  # in the middle of the first one's call
            return select_by_content(batch)

        apply_grip(one, num_tokens=3, selector=select_by_content)
        expected = check(one, inputs["llava"])
        apply_grip(one, num_tokens=3, selector=asks_the_other)
        assert check(one, inputs["llava"]) == expected
        assert [k.tolist() for k in two.grip.last.kept] == alone
        found = {}

        def run(name, model, tokens):
            with torch.no_grad(), model.grip.budget(num_tokens=tokens):
                for _ in range(3):
                    model(**inputs[name])
            found[name, tokens] = [len(k) for k in model.grip.last.kept]

        jobs = [("llava", one, 1), ("qwen2_vl", two, 3), ("qwen2_vl", two, 1)]
        threads = [threading.Thread(target=run, args=job) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {("llava", 1): [1] * 3, ("qwen2_vl", 3): [3] * 3, ("qwen2_vl", 1): [1] * 3}

    def test_budgets_within_budgets_and_another_patch_within_them(self, no_grad):
        model, inputs = build("llava"), make_inputs("llava", RAGGED)
        apply_grip(model, num_tokens=3, selector=select_by_content)

        def counts():
            model(**inputs)
            return [len(one) for one in model.grip.last.kept]

        with model.grip.budget(num_tokens=2):
            with model.grip.budget(keep_ratio=0.5):
                assert counts() == [8, 16, 8]
                with model.grip.disabled():
                    assert counts() == [16, 32, 16]
                assert counts() == [8, 16, 8]
            assert counts() == [2] * 3
            apply_grip(model, GripConfig(num_tokens=5), selector="grid")  # a new patch, whose budgets none has changed
            assert counts() == [5] * 3
        assert counts() == [5] * 3
        check(model, inputs)


class TestCopies:
    @pytest.mark.parametrize("way", ["deepcopy", "pickle", "save and load", "half and back", "to and back"])
    def test_a_patched_model_stays_what_it_is(self, way, tmp_path, no_grad):
        model, inputs = build("llava"), make_inputs("llava", RAGGED)
        apply_grip(model, num_tokens=3, selector="diversity")
        kept = check(model, inputs)
        if way == "deepcopy":
            other = copy.deepcopy(model)
        elif way == "pickle":
            other = pickle.loads(pickle.dumps(apply_grip(build("llava"), num_tokens=3, selector="diversity")))
        elif way == "save and load":
            model.save_pretrained(tmp_path)
            other = LlavaForConditionalGeneration.from_pretrained(tmp_path)
            assert "grip" not in vars(other) and len(apply_grip(other).grip.config.selector) > 0
        elif way == "half and back":
            other = model.half().float()
        else:
            other = model.to("meta").to_empty(device="cpu")
            other.load_state_dict(build("llava").state_dict())
        if way == "half and back":
            found = check(other, inputs)
            assert [len(one) for one in found] == [3] * 3
        elif way == "to and back":  # its tables of positions are no weights, and were emptied too
            assert other.grip is model.grip
        else:
            assert check(other, inputs) == kept

    def test_more_words_than_before(self, no_grad):
        """The embeddings are resized: placeholders keep their ids, and new words can be asked with."""
        model, inputs = build("llava"), make_inputs("llava", RAGGED)
        apply_grip(model, num_tokens=3, selector=select_by_content)
        kept = check(model, inputs)
        size = model.get_input_embeddings().weight.shape[0]
        model.resize_token_embeddings(size + 7)
        assert check(model, inputs) == kept
        asked = inputs["input_ids"].clone()
        asked[:, -1] = size + 3
        check(model, {**inputs, "input_ids": asked})
        assert int((asked == IMAGE_ID).sum()) == 64

    @pytest.mark.parametrize(("dtype", "close"), [(torch.float16, 0.02), (torch.bfloat16, 0.2)])
    def test_half_precision(self, dtype, close, no_grad):
        """What is kept is what the same weights keep in that precision alone, row by row."""
        model, inputs = build("llava").to(dtype), make_inputs("llava", RAGGED)
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        apply_grip(model, num_tokens=3, selector="similarity")
        logits, held = told(model, inputs)
        expected = reference_logits(remove_grip(model), inputs, held)
        torch.testing.assert_close(logits[held], expected[held], atol=close, rtol=0.05)


class TestWrappers:
    """Around the model in training; the answer must not choose."""

    def trained(self, wrap, positional):
        model, inputs = build("llava"), make_inputs("llava", [[3, IMAGE, 4, 5], [2, IMAGE, 9, 1]])
        apply_grip(model, num_tokens=3, selector=self.by_words)
        model(**{name: value[:, :-2] if value.ndim == 2 else value for name, value in inputs.items()})
        alone = [one.tolist() for one in model.grip.last.kept]
        labels = inputs["input_ids"].clone()
        labels[:, :-2] = -100
        call = {**inputs, "labels": labels}
        names = list(inspect.signature(model.forward).parameters)
        args = [call.get(name) for name in names[: names.index("labels") + 1]]
        wrapped = wrap(model.train())
        loss = wrapped(*args).loss if positional else wrapped(**call).loss
        loss.backward()
        assert [one.tolist() for one in model.grip.last.kept] == alone
        held = held_positions(inputs, model.grip.last.kept)
        with torch.no_grad():
            logits = reference_logits(remove_grip(model.eval()), inputs, held)
        expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        torch.testing.assert_close(loss.detach(), expected, atol=1e-4, rtol=1e-4)

    @staticmethod
    def by_words(batch):
        words = (batch.text * batch.text_mask[..., None]).sum((1, 2))
        return torch.cos(torch.arange(batch.mask.shape[1]) * 1.7 + words[:, None])

    @pytest.mark.parametrize("positional", [False, True])
    def test_data_parallel(self, positional, tmp_path):
        dist.init_process_group("gloo", f"file://{tmp_path}/meet", world_size=1, rank=0)
        try:
            self.trained(lambda model: DistributedDataParallel(model, find_unused_parameters=True), positional)
        finally:
            dist.destroy_process_group()

    @pytest.mark.slow
    @pytest.mark.parametrize("positional", [False, True])
    def test_compiled(self, positional):
        torch._dynamo.reset()
        self.trained(lambda model: torch.compile(model, backend="eager"), positional)

    def test_a_module_of_ones_own(self):
        class Own(torch.nn.Module):
            def __init__(self, model):
                super().__init__()
                self.inner = model

            def forward(self, *args, **kwargs):
                return self.inner(*args, **kwargs)

        self.trained(Own, True)


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_a_cache_that_is_copied_goes_on_by_itself(family, no_grad):
    """As whoever caches a prompt does it: two questions about one prefill."""
    model, inputs = build(family), make_inputs(family, [[3, IMAGE, 4]])
    apply_grip(model, num_tokens=3, selector=select_by_content)
    length = inputs["input_ids"].shape[1]
    cache = model(**inputs, use_cache=True)[CACHE]
    found = {}
    for word in (11, 12):
        ids = torch.cat([inputs["input_ids"], torch.tensor([[word, word + 1]])], 1)
        call = {"input_ids": ids[:, length:], "attention_mask": torch.ones_like(ids), CACHE: copy.deepcopy(cache)}
        found[word] = model(**call).logits[:, -1], ids
    assert cache.get_seq_length() == length
    held = held_positions(inputs, model.grip.kept_tokens(cache))
    remove_grip(model)
    for logits, ids in found.values():
        whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "token_type_ids" in inputs:
            whole["token_type_ids"] = torch.nn.functional.pad(inputs["token_type_ids"], (0, 2))
        expected = reference_logits(model, whole, torch.nn.functional.pad(held, (0, 2), value=True))[:, -1]
        assert_close(family, logits, expected)
