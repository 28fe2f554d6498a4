"""Nothing wrong, and nothing unpruned, in silence: situations of public reports, each with its right value."""

import contextvars
import copy
import inspect
import threading
import warnings

import pytest
import torch
from reference import held_positions, positions_and_next, reference_logits
from tiny import IMAGE, IMAGE_ID, TINY, build, make_inputs, select_by_content
from versions import CACHE

from grip_hf import apply_grip, remove_grip
from grip_hf.errors import ConfigError, GripError

ONE, RAGGED = [[3, IMAGE, 4]], [[3, IMAGE, 4], [2, IMAGE, 2, IMAGE, 3], [1, IMAGE, 9]]
TURNS = [[3, IMAGE, 4, 5, IMAGE, 6]]  # the 5 tokens between are the first answer and two words of the second turn


def select_by_text(batch):
    """Likes what the question's words like on average."""
    words = (batch.text * batch.text_mask[..., None]).sum(1) / batch.text_mask.sum(1, keepdim=True).clamp(min=1)
    return (batch.tokens * words[:, None]).sum(-1)


def kept(model, **call):
    model(**call)
    return [one.tolist() for one in model.grip.last.kept]


def answered(inputs, answer=((40, 41, 42),)):
    """A prompt with an answer behind it, and its labels."""
    answer = torch.tensor(answer).expand(len(inputs["input_ids"]), -1)
    ids = torch.cat([inputs["input_ids"], answer], 1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, answer.shape[1]), value=1)
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), answer], 1)
    return {**inputs, "input_ids": ids, "attention_mask": mask}, labels


@pytest.fixture
def model():
    return apply_grip(build("llava"), num_tokens=5, selector=select_by_text)


def hooks_of_ours(model):
    """Hooks on any module of a model that are not transformers' own, which record outputs."""
    hooks = [one for m in model.modules() for one in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    return [one for one in hooks if type(one).__module__.startswith("grip_hf")]


def layer_lengths(model):
    """Positions that reach the language model's first layer, call by call."""
    seen = []
    model.model.language_model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    return seen


class TestThePromptAlone:
    def test_labels_however_they_are_given(self, model):
        inputs = make_inputs("llava", ONE)
        right = kept(model, **inputs)
        full, labels = answered(inputs)
        assert kept(model, **full) != right  # where nobody tells, all of it is prompt
        assert kept(model, **full, labels=labels) == right
        names = list(inspect.signature(model.forward).parameters)
        row = {**full, "labels": labels}
        given = [row.get(name) for name in names[: names.index("labels") + 1]]
        model(*given)
        assert [one.tolist() for one in model.grip.last.kept] == right
        model.forward(**full, labels=labels)  # past the owner's hooks, as adapters call it
        assert [one.tolist() for one in model.grip.last.kept] == right

    def test_prompt_by_mask_and_by_lengths(self, model):
        inputs = make_inputs("llava", RAGGED)
        right = kept(model, **inputs)
        full, labels = answered(inputs)
        with model.grip.prompt(labels == -100):
            assert kept(model, **full) == right
        with model.grip.prompt(inputs["attention_mask"].sum(1).tolist()):
            assert kept(model, **full) == right
        with model.grip.prompt(labels == -100):  # also where the base model is called directly
            model.model(**full)
            assert [one.tolist() for one in model.grip.last.kept] == right

    @pytest.mark.parametrize("bad", ["3", [True], [-1], 3, torch.ones(3), torch.ones(2, 2)])
    def test_bad_prompts_are_refused(self, model, bad):
        with pytest.raises(ConfigError, match="prompt must be"), model.grip.prompt(bad):
            pass

    def test_a_prompt_of_another_shape_is_refused_in_the_call(self, model):
        inputs = make_inputs("llava", ONE)
        with model.grip.prompt([1, 2]), pytest.raises(ConfigError, match="one length per row"):
            model(**inputs)
        with model.grip.prompt(torch.ones(1, 3, dtype=torch.bool)), pytest.raises(ConfigError, match="shape of the"):
            model(**inputs)

    @pytest.mark.parametrize("rows", [1, 4, 7])
    def test_logits_to_keep_changes_nothing(self, model, rows):
        inputs = make_inputs("llava", ONE)
        whole = model(**inputs).logits
        torch.testing.assert_close(model(**inputs, logits_to_keep=rows).logits, whole[:, -rows:])

    def test_a_training_call_that_tells_nothing_warns_once(self, model):
        inputs = make_inputs("llava", ONE)
        full, _ = answered(inputs)
        model.train()
        with pytest.warns(UserWarning, match=r"with model\.grip\.prompt\(mask_or_lengths\)"):
            model(**full)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**full)

    def test_inference_does_not_warn(self, model):
        inputs = make_inputs("llava", ONE)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("error")
            model(**inputs)
            model.generate(**inputs, max_new_tokens=2)

    def test_several_answers_choose_as_one_kv_cache_would(self, model):
        """What each picture keeps is what it keeps where the turns are told to the model one after the other."""
        inputs = make_inputs("llava", TURNS)
        ids, visual = inputs["input_ids"], inputs["input_ids"] == IMAGE_ID
        first = int(visual[0].nonzero()[0]) + int(visual.sum()) // 2 + 4  # where the first answer begins
        labels = torch.full_like(ids, -100)
        labels[:, first : first + 3] = ids[:, first : first + 3]
        labels[:, -2:] = ids[:, -2:]
        together = kept(model, **inputs, labels=labels)[0]
        half = int(visual.sum()) // 2
        pictures = inputs["pixel_values"].split(1)
        alone, cache = [], None
        for start, stop, picture in ((0, first, pictures[0]), (first + 3, ids.shape[1] - 2, pictures[1])):
            if cache is not None:  # the answer, as generation would have put it there
                mask = torch.ones(1, first + 3, dtype=torch.long)
                cache = model(input_ids=ids[:, first : first + 3], attention_mask=mask, **{CACHE: cache})[CACHE]
            call = {"input_ids": ids[:, start:stop], "attention_mask": torch.ones(1, stop, dtype=torch.long)}
            cache = model(**call, pixel_values=picture, use_cache=True, **{CACHE: cache})[CACHE]
            alone.append(model.grip.last.kept[0].tolist())
        assert together == [*alone[0], *(half + one for one in alone[1])]


class TestNothingUnpruned:
    def test_a_part_given_after_the_whole_patches_the_whole(self, model):
        whole = model.grip
        apply_grip(model.model, num_tokens=3, selector="grid")
        assert model.grip is not whole and "grip" not in vars(model.model)
        inputs = make_inputs("llava", ONE)
        assert len(kept(model, **inputs)[0]) == 3

    def test_the_whole_given_after_a_part_leaves_no_second_patch(self):
        model, inputs = build("llava"), make_inputs("llava", ONE)
        plain = model(**inputs).logits
        apply_grip(model.model, num_tokens=3, selector="grid")
        apply_grip(model, num_tokens=5, selector="grid")
        assert len(kept(model, **inputs)[0]) == 5
        remove_grip(model)
        assert torch.equal(model(**inputs).logits, plain)
        assert not hooks_of_ours(model)

    @pytest.mark.parametrize("part", ["language_model", "model"])
    def test_a_copy_put_in_place_is_pruned_and_removed(self, part):
        model, inputs = build("llava"), make_inputs("llava", ONE)
        plain = model(**inputs).logits
        apply_grip(model, num_tokens=5, selector=select_by_content)
        right = model(**inputs).logits
        if part == "model":
            model.model = copy.deepcopy(model.model)
        else:
            model.model.language_model = copy.deepcopy(model.model.language_model)
        assert torch.equal(model(**inputs).logits, right)
        with model.grip.budget(num_tokens=2):
            assert len(kept(model, **inputs)[0]) == 2
        remove_grip(model)
        assert torch.equal(model(**inputs).logits, plain)
        assert not hooks_of_ours(model)

    def test_merged_embeddings_with_ids_are_pruned_like_pixels(self, model, no_grad):
        inputs = make_inputs("llava", ONE)
        right = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        seen = layer_lengths(model)
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        pictures = model.get_image_features(inputs["pixel_values"]).pooler_output
        embeds[inputs["input_ids"] == IMAGE_ID] = torch.cat(list(pictures)).reshape(-1, embeds.shape[-1])
        merged = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
        found = model.generate(input_ids=inputs["input_ids"], **merged, max_new_tokens=4, do_sample=False)
        assert seen[0] == inputs["input_ids"].shape[1] - 11  # 5 of 16 stay
        assert torch.equal(found[:, -4:], right[:, -4:])
        with pytest.warns(UserWarning, match="embeddings without token ids"):
            model.generate(**merged, max_new_tokens=1)

    def test_token_types_tell_what_merged_embeddings_are(self, no_grad):
        model, inputs = build("qwen2_vl"), make_inputs("qwen2_vl", ONE)
        apply_grip(model, num_tokens=4, selector=select_by_content)
        right = kept(model, **inputs)
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        pictures = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        embeds[inputs["input_ids"] == IMAGE_ID] = torch.cat(list(pictures))
        call = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
        positions = positions_and_next(model, inputs, 0)
        assert kept(model, **call, mm_token_type_ids=inputs["mm_token_type_ids"], position_ids=positions) == right


class TestWrongLengths:
    @pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "glm4v"])
    def test_a_turn_by_hand_without_positions_raises(self, family, no_grad):
        model, inputs = build(family), make_inputs(family, ONE)
        length = inputs["input_ids"].shape[1]
        apply_grip(model, keep_ratio=0.25, selector="grid")
        cache = model(**inputs, use_cache=True)[CACHE]
        turn = {"input_ids": torch.tensor([[11, 12, 13]]), CACHE: cache}
        turn["attention_mask"] = torch.ones(1, length + 3, dtype=torch.long)
        with pytest.raises((GripError, RuntimeError)):
            model(**turn)

    @pytest.mark.parametrize("name", ["position_ids", "attention_mask"])
    @pytest.mark.parametrize("change", [-1, 1])
    def test_arguments_of_another_length_raise(self, name, change, no_grad):
        model, inputs = build("llava"), make_inputs("llava", ONE)
        apply_grip(model, keep_ratio=0.25, selector="grid")
        value = torch.ones(1, inputs["input_ids"].shape[1] + change, dtype=torch.long)
        with pytest.raises(GripError, match=f"{name} covers"):
            model(**{**inputs, name: value})


class TestPixelsDecide:
    @pytest.mark.parametrize("selector", ["grid", "cls_attention", "fastv"])
    @pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3", "gemma3"])
    def test_placeholders_in_text_are_text(self, selector, family, no_grad):
        if selector == "cls_attention" and family == "gemma3":
            pytest.skip("its tower has no attention that can be tapped")
        model, token = build(family), IMAGE_ID
        inputs = {"input_ids": torch.tensor([[3, token, token, token, 5, 6, 7]])}
        if TINY[family].types is not None:
            inputs[TINY[family].types] = torch.zeros_like(inputs["input_ids"])
        plain, said = model(**inputs).logits, model.generate(**inputs, max_new_tokens=3, do_sample=False)
        arguments = {"layers": 1} if selector == "fastv" else {}
        apply_grip(model, keep_ratio=0.5, selector=selector, selector_kwargs=arguments)
        assert torch.equal(model(**inputs).logits, plain)
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), said)


class TestTraps:
    def test_a_budget_in_another_thread_warns_and_the_context_takes_it_along(self, no_grad):
        model, inputs = build("llava"), make_inputs("llava", ONE)
        apply_grip(model, keep_ratio=1.0, selector="grid")
        seen, call = layer_lengths(model), {**inputs, "max_new_tokens": 1}
        with model.grip.budget(num_tokens=4):
            run = contextvars.copy_context().run
            for target, args in ((model.generate, ()), (run, (model.generate,))):
                with warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter("always")
                    thread = threading.Thread(target=target, args=args, kwargs=call)
                    thread.start()
                    thread.join()
                assert any("copy_context" in str(one.message) for one in said) == (target is not run)
        assert seen == [inputs["input_ids"].shape[1], inputs["input_ids"].shape[1] - 12]

    def test_two_budgets_for_four_samples_are_refused_but_for_beams(self, no_grad):
        model = apply_grip(build("llava"), keep_ratio=0.5, selector=select_by_content)
        four = make_inputs("llava", [[3, IMAGE, 4], [2, IMAGE, 4, 1], [1, IMAGE, 9], [3, IMAGE, 5]])
        with model.grip.budget(num_tokens=[2, 3]):
            with pytest.raises(ConfigError, match="num_tokens has 2 values for a batch of 4 samples"):
                model(**four)
            two = make_inputs("llava", [[3, IMAGE, 4], [2, IMAGE, 5]])
            out = model.generate(**two, num_beams=2, max_new_tokens=2, return_dict_in_generate=True)
            assert [len(one) for one in model.grip.kept_tokens(out)] == [2, 2, 3, 3]

    def test_more_tokens_than_a_picture_has_is_said_once(self, no_grad):
        model, inputs = apply_grip(build("llava"), num_tokens=900, selector="grid"), make_inputs("llava", ONE)
        with pytest.warns(UserWarning, match="num_tokens=900 keeps all visual tokens: .* has 16"):
            model(**inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**inputs)

    def test_the_mask_of_held_positions_is_for_means(self, model, no_grad):
        inputs = make_inputs("llava", RAGGED)
        hidden = model.model(**inputs).last_hidden_state
        held = model.grip.last.held
        assert torch.equal(held, held_positions(inputs, model.grip.last.kept))
        plain = remove_grip(model)
        expected = reference_logits(plain, inputs, held)
        torch.testing.assert_close(plain.lm_head(hidden)[held], expected[held], atol=5e-5, rtol=1e-4)
        assert hidden.shape[1] == held.shape[1]

    def test_export_is_refused_clearly(self):
        model, inputs = build("llava"), make_inputs("llava", ONE)
        apply_grip(model, keep_ratio=0.5, selector="grid")
        with pytest.raises(Exception, match="cannot be exported"):
            torch.export.export(model, (), inputs, strict=False)

    def test_hidden_states_and_attentions_have_the_length_of_the_call(self, no_grad):
        for family in ("llava", "gemma3n", "qwen2_vl"):
            model, inputs = build(family, "eager"), make_inputs(family, RAGGED)
            plain = model(**inputs, output_hidden_states=True, output_attentions=True)
            apply_grip(model, keep_ratio=0.25, selector=select_by_content)
            found = model(**inputs, output_hidden_states=True, output_attentions=True)
            for name in ("hidden_states", "attentions"):
                shapes = [[one.shape for one in out[name]] for out in (plain, found)]
                assert shapes[0] == shapes[1], (family, name)
            gone = ~model.grip.last.held
            for weights in found.attentions:
                assert not weights.masked_select(gone[:, None, None].expand_as(weights)).any()
            remove_grip(model)


class TestStaleTaps:
    def test_what_other_calls_encoded_does_not_choose(self):
        """Taps belong to the encoded output; a recomputation in the backward pass publishes nothing."""
        first, second = (make_inputs("llava", ONE, seed=seed) for seed in (0, 50))
        model = apply_grip(build("llava"), num_tokens=4, selector="cls_attention")
        call = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True}
        right = {beams: model.grip.kept_tokens(model.generate(**second, num_beams=beams, **call)) for beams in (1, 2)}
        model.gradient_checkpointing_enable()
        for _ in range(2):
            model.train()
            labels = first["input_ids"].where(first["input_ids"] < 89, -100)
            model(**first, labels=labels, use_cache=False).loss.backward()
            with torch.no_grad():
                model.get_image_features(first["pixel_values"])
            model.eval()
            for beams, expected in right.items():
                found = model.grip.kept_tokens(model.generate(**second, num_beams=beams, **call))
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    def test_pictures_encoded_without_the_patch_are_refused(self, no_grad):
        model, inputs = build("llava"), make_inputs("llava", ONE)
        encoded = model.get_image_features(inputs["pixel_values"], return_dict=True)
        apply_grip(model, num_tokens=4, selector="cls_attention")
        pixels = inputs.pop("pixel_values")
        with pytest.raises(GripError, match=r"\['vision.salience'\] of the vision tower"):
            model(**inputs, mm_encoder_outputs={"image": encoded})
        encoded = model.get_image_features(pixels, return_dict=True)  # with it, they carry what is needed
        right = kept(model, **inputs, pixel_values=pixels)
        assert kept(model, **inputs, mm_encoder_outputs={"image": encoded}) == right
