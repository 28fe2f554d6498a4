"""The promise that comes with the pocket model."""

import torch
from first_testbed import load_pocket_llava, make_scene

from grip_hf import GripConfig, apply_grip
from grip_hf.quality.promise import Calibration


def test_the_pocket_model_keeps_what_came_with_it():
    model, processor = load_pocket_llava()
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
        for scene in map(make_scene, range(7700, 7706))
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
    assert kept == [round(144 * ladder[number - 1]) for number in looks] and min(kept) < 30
