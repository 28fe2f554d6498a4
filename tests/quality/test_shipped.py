"""The promises that come with the pocket models."""

import pytest
import torch

from grip_hf import GripConfig, apply_grip
from grip_hf.pocket import load_pocket, make_scene
from grip_hf.pocket.testbeds import TESTBEDS
from grip_hf.quality.promise import Calibration


@pytest.mark.parametrize("testbed", list(TESTBEDS))
def test_a_pocket_model_keeps_what_came_with_it(testbed):
    model, processor = load_pocket(testbed)
    handle = apply_grip(model, GripConfig(quality=0.98)).grip
    ladder = handle.promise(0.98).ladder
    assert isinstance(handle.calibration, Calibration) and ladder[-1] == 1.0
    chats = [
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": scene.image}, {"type": "text", "text": question.text}],
            }
        ]
        for scene in (make_scene(seed, testbed=testbed) for seed in range(7700, 7706))
        for question in scene.questions[:8]
    ]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(chats, **options, processor_kwargs={"padding": True})
    prompt, answers = inputs["input_ids"].shape[1], []
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        answers.append(processor.batch_decode(out[:, prompt:], skip_special_tokens=True))
        looks, kept = handle.last.looks, [len(one) for one in handle.last.kept]
        with handle.disabled():
            out = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        answers.append(processor.batch_decode(out[:, prompt:], skip_special_tokens=True))
    same = sum(one == other for one, other in zip(*answers, strict=True))
    assert same >= 45 and len(set(answers[1])) > 10  # of 48; 98 % are promised
    assert 1 < len(set(looks)) <= len(ladder) and sum(looks) < 48 * 1.5
    assert kept == [round(TESTBEDS[testbed].tokens * ladder[number - 1]) for number in looks] and min(kept) < 30
