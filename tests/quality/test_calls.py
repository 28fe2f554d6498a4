"""What a call of `generate` with a quality is, what it gives back, and what is refused."""

import copy
import inspect
import threading

import pytest
import torch
from asking import ONE, generate
from promised import at, calibration, promise, promised
from tiny import IMAGE, build, make_inputs, select_by_content
from transformers import GenerationConfig, LogitsProcessor, TextIteratorStreamer
from versions import CACHE

from grip_hf import GripConfig, apply_grip, remove_grip
from grip_hf.engine.methods import Encode
from grip_hf.errors import ConfigError, GripError, UnsupportedModelError
from grip_hf.quality.promise import Calibration

pytestmark = pytest.mark.usefixtures("no_grad")
PROMPTS = [[3, IMAGE, 4], [2, IMAGE, 6], [4, IMAGE, 1], [5]]


@pytest.fixture
def model():
    return build("llava")


@pytest.fixture
def inputs():
    return make_inputs("llava", PROMPTS)


class Inside:
    inside = True

    def __call__(self, batch):
        return None


def between(model, inputs, **kwargs):
    """A threshold that doubts some rows."""
    promised(model, promise((0.25, 1.0), (0.0,)))
    generate(model, inputs, **kwargs)
    found = sorted(model.grip.last.confidence[:3])
    return (found[0] + found[1]) / 2


def with_ends(model, inputs, ends=8):
    """Let answers end at several lengths: at tokens that the model writes."""
    at_all = at(apply_grip(model, keep_ratio=0.5, selector=select_by_content), inputs, 1)
    written = at_all.sequences[:, inputs["input_ids"].shape[1] :]
    model.generation_config.eos_token_id = sorted({int(written[0, 2]), int(written[1, 4])})
    return model


def test_answers_that_end_are_padded_and_everything_else_is_as_the_rungs_give_it(model, inputs):
    model = with_ends(model, inputs)
    threshold = between(model, inputs)
    promised(model, promise((0.25, 1.0), (threshold,)))
    out = generate(model, inputs, output_scores=True)
    last = model.grip.last
    assert set(last.looks) == {1, 2}
    rungs = {1: at(model, inputs, 0.25, output_scores=True), 2: at(model, inputs, 1, output_scores=True)}
    prompt = inputs["input_ids"].shape[1]
    ends, own = model.generation_config.eos_token_id, []
    for row, looks in enumerate(last.looks):
        want = rungs[looks].sequences[row].tolist()
        length = next((n + 1 for n, token in enumerate(want[prompt:]) if token in ends), len(want) - prompt)
        own.append(length)
        found = out.sequences[row].tolist()
        assert found[: prompt + length] == want[: prompt + length] and set(found[prompt + length :]) <= {0}
        for name in ("scores", "logits"):
            for step, values in enumerate(out[name]):
                expected = rungs[looks][name][step][row] if step < length else torch.zeros_like(values[row])
                torch.testing.assert_close(values[row], expected, rtol=1e-4, atol=1e-4)
    assert out.sequences.shape[1] == prompt + max(own) and len(set(own)) > 1
    assert out[CACHE] is None
    assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=6), out.sequences)
    assert last.held.shape == inputs["input_ids"].shape and last.total == [16, 16, 16, 0]
    assert last.scores.shape == (4, 16) and not last.scores[[n == 2 for n in last.looks]].any()


def test_confidence_is_the_product_of_the_greedy_probabilities(model, inputs):
    model = with_ends(model, inputs)
    for rule in ("answer", "first"):
        promised(model, promise((0.25, 1.0), (0.0,), rule))
        with model.grip.budget(quality=0.9, rule=rule):
            out = generate(model, inputs)
        probabilities = torch.stack(out.logits, 1).softmax(-1)
        written = out.sequences[:, inputs["input_ids"].shape[1] :]
        ends = model.generation_config.eos_token_id
        for row, sure in enumerate(model.grip.last.confidence):
            product = 1.0
            for step, token in enumerate(written[row].tolist()):
                product *= float(probabilities[row, step, token])
                if token in ends or rule == "first":
                    break
            assert sure == pytest.approx(product, rel=1e-4)


def test_a_single_row_keeps_its_cache_and_goes_on(model):
    inputs = make_inputs("llava", ONE)
    promised(model, promise((0.25, 1.0), (1.0,)))
    out = generate(model, inputs)
    assert model.grip.last.looks == [2] and out[CACHE].get_seq_length() == out.sequences.shape[1] - 1
    plain = at(model, inputs, 1)
    assert torch.equal(out.sequences, plain.sequences)


def test_rows_in_doubt_stop_early(model, inputs):
    calls = []
    model.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    promised(model, promise((0.25, 1.0), (1.0,)))
    generate(model, {name: value[:3] for name, value in inputs.items()})
    assert len(calls) == 1 + 6  # the first look ends after one token


def test_the_first_token_rule_streams_what_stands(model):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({f"w{i}": i for i in range(97)})))
    inputs = make_inputs("llava", ONE)
    for threshold, rung in ((0.0, 0.25), (1.0, 1)):
        promised(model, promise((0.25, 1.0), (threshold,), "first"), promise((0.25, 1.0), (threshold,)))
        want = at(model, inputs, rung).sequences
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        run = threading.Thread(
            target=model.generate, kwargs={**inputs, "streamer": streamer, "do_sample": False, "max_new_tokens": 6}
        )
        run.start()
        text = "".join(streamer)
        run.join()
        assert text.split() == [f"w{token}" for token in want[0, inputs["input_ids"].shape[1] :].tolist()]
    with (
        model.grip.budget(quality=0.9, rule="answer"),
        pytest.raises(ConfigError, match="cannot take tokens back"),
    ):
        generate(model, inputs, streamer=TextIteratorStreamer(tokenizer))


@pytest.mark.parametrize(
    "setting",
    [
        {"do_sample": True},
        {"num_beams": 2},
        {"num_return_sequences": 2, "do_sample": True},
        {"prompt_lookup_num_tokens": 2},
        {"output_hidden_states": True},
        {"prefill_chunk_size": 4},
        {"synced_gpus": True},
        {"assistant_model": "twin"},
        {"inputs_embeds": torch.zeros(1, 4, 32)},
        {CACHE: "cache"},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_other_ways_to_decode_are_refused(model, inputs, setting):
    promised(model)
    with pytest.raises(ValueError, match=f"not with .*{next(iter(setting))}") as caught:
        generate(model, inputs, **setting)
    assert isinstance(caught.value, ConfigError)
    with pytest.raises(ConfigError, match="do_sample"):
        model.generate(**inputs, max_new_tokens=6, generation_config=GenerationConfig(do_sample=True))


def test_other_settings_of_writing_are_refused(model, inputs):
    promised(model)
    for setting in ({"repetition_penalty": 1.5}, {"suppress_tokens": [5]}, {"logits_processor": [LogitsProcessor()]}):
        with pytest.raises(ConfigError, match=r"made for something else.*writing"):
            generate(model, inputs, **setting)
    generate(model, inputs, repetition_penalty=1.0)
    config = GenerationConfig(max_new_tokens=6)
    assert model.generate(**inputs, generation_config=config).shape[1] == inputs["input_ids"].shape[1] + 6
    assert config.return_dict_in_generate is not True


@pytest.mark.parametrize(
    "most, longest, cut, allowed",
    [
        (6, 6, True, True),
        (5, 6, True, False),
        (7, 6, True, False),
        (7, 4, False, True),
        (4, 4, False, True),
        (3, 4, False, False),
    ],
)
def test_the_length_of_answers(model, inputs, most, longest, cut, allowed):
    promised(model, max_new_tokens=6, longest=longest, cut=cut)
    if allowed:
        generate(model, inputs, max_new_tokens=most)
        prompt = inputs["input_ids"].shape[1]
        model.generate(**inputs, max_length=prompt + most, do_sample=False)
        return
    with pytest.raises(ConfigError, match=f"max_new_tokens={most} is not what was calibrated: 6"):
        generate(model, inputs, max_new_tokens=most)


def test_a_quality_needs_a_calibration_of_this_model_and_selector(model, inputs):
    plain = apply_grip(model, keep_ratio=0.5, selector=select_by_content).grip
    for ask in (
        lambda: apply_grip(model, GripConfig(quality=0.9), selector=select_by_content),
        lambda: model.grip.budget(quality=0.9),
    ):
        with pytest.raises(ConfigError, match=r"needs a calibration.*grip-hf calibrate"):
            ask()
        assert model.grip is plain
    found = calibration(model)
    for name, other in (("selector", "grid"), ("hidden_size", 999), ("scorer", "ab"), ("scope", "image")):
        wrong = Calibration(**{**vars(found), "made_for": {**found.made_for, name: other}})
        with pytest.raises(ConfigError, match=f"made for something else.*{name} is"):
            apply_grip(model, quality=0.9, selector=select_by_content, calibration=wrong)
    named = Calibration(**{**vars(found), "made_for": {**found.made_for, "model": "some/other"}})
    apply_grip(model, quality=0.9, selector=select_by_content, calibration=named)  # this model does not say its name
    with pytest.raises(ConfigError, match=r"quality=0.95 .* was not calibrated; calibrated are: 0.9"):
        apply_grip(model, quality=0.95, selector=select_by_content, calibration=found)
    for quality in (0, 1, 1.5, True, "much", float("nan")):
        with pytest.raises(ConfigError, match=r"quality must be a number in \(0, 1\)"):
            model.grip.budget(quality=quality)
    with pytest.raises(ConfigError, match="exactly one of"):
        model.grip.budget(quality=0.9, keep_ratio=0.5)
    with pytest.raises(ConfigError, match="goes with quality"):
        model.grip.budget(keep_ratio=0.5, rule="first")
    with pytest.raises(ConfigError, match="'first' was not calibrated; calibrated are: none"):
        model.grip.budget(quality=0.9, rule="first")


def test_a_weaker_promise_is_kept_by_a_stronger_one(model):
    found = calibration(model, promise((0.5, 1.0), quality=0.99), promise((0.25, 1.0), quality=0.95))
    apply_grip(model, quality=0.9, selector=select_by_content, calibration=found)
    assert model.grip.promise(0.9).ladder == (0.25, 1.0) and model.grip.promise(0.97).quality == 0.99


def test_selectors_inside_the_language_model_are_refused(model):
    found = calibration(model)
    inside = Inside()
    with pytest.raises(UnsupportedModelError, match="within the language model"):
        apply_grip(model, quality=0.9, selector=inside, calibration=found)


def test_a_call_of_the_model_itself_needs_a_budget(model, inputs):
    promised(model)
    with pytest.raises(ConfigError, match="promised of the answers of generate"):
        model(**inputs)
    with model.grip.budget(keep_ratio=0.25):
        assert len(model.grip.kept_tokens(model(**inputs))[0]) == 4
    text = {name: value[3:] for name, value in inputs.items() if name != "pixel_values"}
    model(**text)
    assert model.generate(**text, do_sample=False, max_new_tokens=6).shape[0] == 1


def test_nan_is_an_error_and_leaves_nothing_behind(model, inputs):
    promised(model)
    broken = model.lm_head.weight.data[7].clone()
    model.lm_head.weight.data[7] = float("nan")
    with pytest.raises(GripError, match="NaN"):
        generate(model, inputs)
    model.lm_head.weight.data[7] = broken
    assert torch.equal(generate(model, inputs).sequences, at(model, inputs, 1).sequences)


def test_without_a_calibration_nothing_is_added_and_with_one_it_comes_off_again(model, inputs):
    before = dict(vars(model)), dict(vars(model.model))
    apply_grip(model, keep_ratio=0.5, selector=select_by_content)
    assert not any(isinstance(one, Encode) for one in vars(model.model).values())
    assert type(vars(model)["generate"]).__name__ == "Generate"
    want = generate(model, inputs)
    promised(model)
    assert inspect.signature(model.generate) == inspect.signature(type(model).generate.__get__(model))
    with model.grip.budget(keep_ratio=0.5):
        assert torch.equal(generate(model, inputs).sequences, want.sequences)
    remove_grip(model)
    assert (dict(vars(model)), dict(vars(model.model))) == before


def test_copies_keep_their_own_promises(model, inputs):
    promised(model)
    twin = copy.deepcopy(model)
    remove_grip(model)
    found = generate(twin, inputs)
    assert twin.grip.last.looks == [3, 3, 3, 1] and twin.generate.handle is twin.grip
    assert torch.equal(found.sequences, at(twin, inputs, 1).sequences)


def test_threads_look_each_for_themselves(model, recwarn):
    one, two = make_inputs("llava", ONE), make_inputs("llava", [[2, IMAGE, 6]], seed=5)
    promised(model, promise((0.25, 0.5, 1.0)))
    want = [at(model, each, 1).sequences for each in (one, two)]
    found = {}

    def run(number, each):
        with torch.no_grad():
            found[number] = [generate(model, each).sequences for _ in range(3)]

    threads = [threading.Thread(target=run, args=(n, each)) for n, each in enumerate((one, two))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(sequence, want[n]) for n in (0, 1) for sequence in found[n])
    assert not recwarn.list
