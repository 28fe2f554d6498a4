"""Many threads on one model, and long loops."""

import gc
import threading

import pytest
import torch
from tiny import IMAGE, build, make_inputs, select_by_content

from grip_hf import apply_grip
from grip_hf.engine.context import innermost

PROMPTS = [[[3, IMAGE, 4]], [[2, IMAGE, 2, IMAGE, 3]], [[3, IMAGE, 4], [5]], [[6]]]


def run(model, number, job):
    """One call with its own input and budget: its tokens and what it kept."""
    inputs, budget = job
    with torch.no_grad(), model.grip.budget(num_tokens=budget):
        out = model.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
        kept = model.grip.kept_tokens(out) if "pixel_values" in inputs else []
    return out.sequences, torch.cat([*kept, torch.tensor([number])])


@pytest.mark.parametrize("rounds", [4, pytest.param(125, marks=pytest.mark.slow)])
def test_eight_threads_give_the_sequential_results(rounds):
    model = build("llava")
    apply_grip(model, keep_ratio=0.5, selector=select_by_content)
    jobs = [(make_inputs("llava", PROMPTS[i % 4]), 1 + 2 * i) for i in range(8)]
    expected = [run(model, i, job) for i, job in enumerate(jobs)]
    wrong = []

    def worker(first):
        for step in range(rounds):
            number = (first + step) % 8
            try:
                result = run(model, number, jobs[number])
                if not all(torch.equal(a, b) for a, b in zip(result, expected[number], strict=True)):
                    wrong.append(number)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=worker, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("rounds", [30, pytest.param(10_000, marks=pytest.mark.slow)])
def test_long_loops_leave_nothing_behind(rounds):
    model, inputs = build("llava"), make_inputs("llava", [[2, IMAGE, 2]])

    def step():
        apply_grip(model, num_tokens=3, selector=select_by_content)
        with torch.no_grad():
            model.generate(**inputs, max_new_tokens=2, do_sample=False)

    def tables():
        names = [(module, name) for module in model.modules() for name in vars(module) if "hooks" in name]
        return sum(len(table) for module, name in names if isinstance(table := getattr(module, name), dict))

    for _ in range(3):
        step()
    gc.collect()
    before, hooks = len(gc.get_objects()), tables()
    for _ in range(rounds):
        step()
    gc.collect()
    assert tables() == hooks and innermost() is None
    assert len(gc.get_objects()) - before < 100
