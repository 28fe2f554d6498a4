"""What chooses each picture: the words of its turn, told from the answers by hand here."""

import pytest
import torch
from tiny import IMAGE, IMAGE_ID, build, make_inputs
from torch import nn

from grip_hf import apply_grip
from grip_hf.engine.callers import answer_of_callers

pytestmark = pytest.mark.usefixtures("no_grad")


class Recorder:
    """A selector that remembers the words that it was given, as embeddings, group by group."""

    def __init__(self):
        self.words = []

    def __call__(self, batch):
        self.words = [text[mask] for text, mask in zip(batch.text, batch.text_mask, strict=True)]
        return batch.tokens.norm(dim=-1)


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def model(recorder):
    return apply_grip(build("llava"), num_tokens=5, selector=recorder)


def turns():
    """Two turns of a picture, words and an answer: ids, and the answers [1, L] bool."""
    inputs = make_inputs("llava", [[3, IMAGE, 8, IMAGE, 6]])
    columns = (inputs["input_ids"][0] == IMAGE_ID).nonzero().flatten().tolist()
    half = columns[len(columns) // 2 - 1]
    answers = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    answers[:, half + 3 : half + 6] = answers[:, -2:] = True  # of 8 words between: 2 asked, 3 answered, 3 asked
    return inputs, answers, half


def spoken(model, inputs, places):
    """Embeddings of the words at some places."""
    ids = inputs["input_ids"][0]
    return model.get_input_embeddings()(ids[[place for place in places if ids[place] != IMAGE_ID]])


def test_each_turn_is_asked_by_its_own_words(model, recorder):
    inputs, answers, half = turns()
    model(**inputs, labels=inputs["input_ids"].masked_fill(~answers, -100))
    length = inputs["input_ids"].shape[1]
    first, second = range(half + 3), range(half + 6, length - 2)
    assert len(recorder.words) == 2
    for words, places in zip(recorder.words, (first, second), strict=True):
        torch.testing.assert_close(words, spoken(model, inputs, places))


def test_a_turn_without_words_is_asked_by_all_there_is(model, recorder):
    """The second answer begins right behind its picture, and the first one ends right before it."""
    inputs, answers, half = turns()
    ids = inputs["input_ids"][0]
    answers[:, half + 3 :] = ids[half + 3 :] != IMAGE_ID
    model(**inputs, labels=inputs["input_ids"].masked_fill(~answers, -100))
    torch.testing.assert_close(recorder.words[0], spoken(model, inputs, range(half + 3)))
    end = int((ids == IMAGE_ID).nonzero()[-1]) + 1
    torch.testing.assert_close(recorder.words[1], spoken(model, inputs, range(end, len(ids))))


def test_what_the_user_says_goes_before_labels(model, recorder):
    inputs, answers, _ = turns()
    prompt = torch.ones_like(answers)
    prompt[:, -4:] = False
    with model.grip.prompt(prompt):
        model(**inputs, labels=inputs["input_ids"].masked_fill(~answers, -100))
    assert len(recorder.words) == 1
    torch.testing.assert_close(recorder.words[0], spoken(model, inputs, range(prompt.shape[1] - 4)))


class Caller(nn.Module):
    """An owner whose method holds what it knows, with so many frames between it and the question."""

    def hold(self, frames, shape, labels=None, completion_mask=None, prompt_ids=None, completion_ids=None):
        return ask(self, shape, frames)


def ask(owner, shape, frames):
    return ask(owner, shape, frames - 1) if frames else answer_of_callers(owner, torch.Size(shape))


@pytest.mark.parametrize("frames", [0, 40])  # a trainer's loss stands up to 40 frames above the language model
def test_callers_tell_the_answer(frames):
    caller, wanted = Caller(), torch.tensor([[False, False, True, True, True]] * 2)
    ids = torch.arange(10).reshape(2, 5)
    for known in (
        {"labels": ids.masked_fill(~wanted, -100)},
        {"completion_mask": wanted.long()},
        {"prompt_ids": ids[:, :2], "completion_ids": ids[:, 2:]},
    ):
        assert torch.equal(caller.hold(frames, (2, 5), **known), wanted), known
    assert caller.hold(frames, (2, 5), labels=ids[:, :4]) is None
    assert caller.hold(frames, (2, 5), completion_mask=wanted.float()) is None
    assert caller.hold(frames, (2, 5), prompt_ids=ids[:, :2], completion_ids=ids[:, 1:]) is None
