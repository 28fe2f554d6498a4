import pytest
import torch
from classroom import HIDDEN, TOKENS, build_vlm, make_store, picture, rows
from transformers import PreTrainedTokenizerFast
from versions import TRAINING

from grip_hf.frozen.data import DatasetError, DatasetExamples, Example
from grip_hf.frozen.samples import answer_ids, stack_visual
from grip_hf.frozen.store import SampleStore, compare
from grip_hf.frozen.vlm import FrozenVLM
from grip_hf.patch import apply_grip

pytestmark = TRAINING


@pytest.fixture
def store():
    return make_store()


def asked_plainly(model, processor, row, keep=None):
    """Log-probs at the answer of one row by the unpatched model, dropped tokens masked."""
    inputs = processor(
        images=row["image"], text="<image>" + row["prompt"] + " " + row["answer"] + " </s>", return_tensors="pt"
    )
    visual = inputs["input_ids"][0] == model.config.image_token_id
    if keep is not None:
        inputs["attention_mask"][0, visual] = keep.long()
    with torch.no_grad():
        logs = model(**inputs).logits[0].log_softmax(-1)
    count = len(row["answer"].split()) + 1
    return logs[-count - 1 : -1]


def test_full_and_pruned_answers_equal_the_plain_model(store):
    samples = store.samples(range(6))
    torch.manual_seed(1)
    keep = [torch.rand(TOKENS).argsort() < count for count in (1, 3, 5, 8, 12, 16)]
    full = store.vlm.full_log_probs(samples)
    with torch.no_grad():
        pruned = store.vlm.run(samples, keep).logits.log_softmax(-1)
    model, processor = build_vlm()
    for i, row in enumerate(rows(6)):
        count = len(row["answer"].split()) + 1
        torch.testing.assert_close(full[i, -count:], asked_plainly(model, processor, row), atol=1e-4, rtol=0)
        torch.testing.assert_close(
            pruned[i, -count:], asked_plainly(model, processor, row, keep[i]), atol=1e-4, rtol=0
        )
    assert (full[:, -1] - pruned[:, -1]).abs().max() > 0.1, (
        "the model does not look at the picture: nothing was tested"
    )


def test_visual_batch_is_what_the_patch_gives_selectors(store):
    model, processor = build_vlm()
    seen = []

    def watch(batch):
        seen.append(batch)
        return batch.mask.float()

    apply_grip(model, num_tokens=4, selector=watch)
    texts = ["<image>" + row["prompt"] for row in rows(3)]
    with torch.no_grad():
        model(**processor(images=[row["image"] for row in rows(3)], text=texts, padding=True, return_tensors="pt"))
    mine = store.visual([0, 1, 2], torch.tensor([4, 4, 4]))
    for name in ("tokens", "mask", "text_mask", "positions", "image_index", "budgets"):
        torch.testing.assert_close(getattr(mine, name), getattr(seen[0], name), atol=1e-5, rtol=0)
    # The chat template writes the same words.
    torch.testing.assert_close(mine.text, seen[0].text, atol=1e-6, rtol=0)
    assert mine.tokens.shape == (3, TOKENS, HIDDEN)


def test_pictures_are_encoded_once_and_shared(store):
    calls = []
    store.vlm.parts.base.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    samples = store.samples([0, 1, 0, 2])
    assert len(calls) == 2  # rows 0 and 1 show the same picture
    assert samples[0] is samples[2]
    assert samples[0].visual.tokens.data_ptr() == samples[1].visual.tokens.data_ptr()
    store.samples([3, 1])
    assert len(calls) == 2


def test_without_an_answer_the_model_is_asked():
    model, processor = build_vlm(seed=3)
    plain, _ = build_vlm(seed=3)
    row = {name: value for name, value in rows(1)[0].items() if name != "answer"}
    sample = FrozenVLM(model, processor, max_answer_tokens=5).prepare([DatasetExamples([row])[0]])[0]
    inputs = processor(images=row["image"], text="<image>" + row["prompt"], return_tensors="pt")
    wanted = plain.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert torch.equal(sample.answer, wanted)


def test_an_answer_never_holds_a_picture():
    model, processor = build_vlm()
    image = model.config.image_token_id
    # A model that would say nothing else: every other word has the opposite logit.
    with torch.no_grad():
        model.lm_head.weight[:] = -model.lm_head.weight[image]
        model.lm_head.weight[image] *= -1
    row = {name: value for name, value in rows(1)[0].items() if name != "answer"}
    inputs = processor(images=row["image"], text="<image>" + row["prompt"], return_tensors="pt")
    with torch.no_grad():
        sign = 1 if model(**inputs).logits[0, -1].argmax() == image else -1
        model.lm_head.weight *= sign
    assert model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1] == image
    vlm = FrozenVLM(model, processor)
    messages = DatasetExamples([row])[0].messages
    assert image not in vlm.prepare([Example(messages)])[0].answer
    with pytest.raises(DatasetError, match="placeholder of a picture"):
        vlm.prepare([Example(messages, "a <image>")])


def test_two_pictures_in_one_example():
    vlm = FrozenVLM(*build_vlm())
    two = DatasetExamples([{"images": [picture(0), picture(1)], "prompt": "is there any cat", "answer": "yes"}])
    one = DatasetExamples(rows(1))
    samples = vlm.prepare([two[0], one[0]])
    assert [sample.num_visual for sample in samples] == [2 * TOKENS, TOKENS]
    batch = stack_visual([sample.visual for sample in samples], torch.tensor([3, 3]))
    assert batch.mask.sum(1).tolist() == [2 * TOKENS, TOKENS]
    assert batch.image_index[0].tolist() == [0] * TOKENS + [1] * TOKENS
    with torch.no_grad():
        both = vlm.run(samples, [torch.ones(2 * TOKENS).bool(), torch.ones(TOKENS).bool()]).logits
        alone = vlm.run(samples[1:]).logits
    torch.testing.assert_close(both[1], alone[0], atol=1e-5, rtol=0)


def test_closing_leaves_no_patch():
    model, processor = build_vlm()
    vlm = FrozenVLM(model, processor)
    assert hasattr(model, "grip")
    vlm.close()
    assert not hasattr(model, "grip") and not any(module._forward_hooks for module in model.modules())


def test_bad_examples_and_processors():
    model, processor = build_vlm()
    with pytest.raises(DatasetError, match="no chat template"):
        FrozenVLM(model, PreTrainedTokenizerFast(tokenizer_object=processor.tokenizer._tokenizer))
    vlm = FrozenVLM(model, processor)
    with pytest.raises(DatasetError, match="no picture"):
        vlm.prepare([Example([{"role": "user", "content": [{"type": "text", "text": "is there any cat"}]}], "yes")])


def test_compare_against_loops():
    torch.manual_seed(0)
    full, pruned = torch.randn(3, 4, 7).log_softmax(-1), torch.randn(3, 4, 7).log_softmax(-1)
    ids = torch.randint(0, 7, (3, 4))
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]]).bool()
    pruned[2, 3, ids[2, 3]] = 0.5  # the last answer is right
    verdict = compare(full, pruned, ids, mask)
    for b in range(3):
        kl = told = sure = 0.0
        right = True
        for a in range(4):
            if mask[b, a]:
                kl += sum(float(full[b, a, v].exp() * (full[b, a, v] - pruned[b, a, v])) for v in range(7))
                told += float(pruned[b, a, ids[b, a]])
                sure += max(pruned[b, a].tolist())
                right &= int(pruned[b, a].argmax()) == int(ids[b, a])
        assert verdict.kl[b] == pytest.approx(max(kl, 0.0), abs=1e-5)
        assert verdict.log_prob[b] == pytest.approx(told, abs=1e-5)
        assert verdict.confidence[b] == pytest.approx(sure, abs=1e-5)
        assert verdict.correct[b].item() is right
    assert verdict.correct.tolist()[2] is True
    assert (verdict.predicted == -1).equal(~mask)


def test_judging_in_parts_equals_judging_at_once(store):
    samples = store.samples([0, 3, 4, 1])
    torch.manual_seed(0)
    keep = [torch.rand(TOKENS).argsort() < 4 for _ in samples]
    whole = store.judge(samples, keep)
    parts = SampleStore(store.vlm, store.examples, rows_at_once=1).judge(samples, keep)
    torch.testing.assert_close(whole.kl, parts.kl, atol=1e-5, rtol=1e-4)
    assert torch.equal(whole.predicted, parts.predicted)
    ids, mask = answer_ids(samples)
    assert torch.equal(ids[1, mask[1]], samples[1].answer)


def test_a_full_cache_forgets_and_looks_up_again(store):
    room = max(sample.nbytes for sample in store.samples([0, 1, 2]))  # for one of them
    small = SampleStore(store.vlm, store.examples, cache_bytes=room)
    first = small.samples([0])[0]
    again = small.samples([0, 1, 2])
    assert again[0] is first and small.samples([0])[0] is not first
    assert torch.equal(small.samples([0])[0].visual.tokens, first.visual.tokens)
    none = SampleStore(store.vlm, store.examples, cache_bytes=1)
    assert len(none.samples([0, 1])) == 2 and none.samples([0])[0] is not none.samples([0])[0]
