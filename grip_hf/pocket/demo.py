"""The demo: held-out scenes through `processor -> apply_grip -> generate`, full and pruned answers side by side."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from transformers import LlavaProcessor

from grip_hf.config import GripConfig
from grip_hf.patch import apply_grip, remove_grip
from grip_hf.pocket.model import load_pocket
from grip_hf.pocket.questions import Question
from grip_hf.pocket.scenes import Scene, make_scene
from grip_hf.pocket.testbeds import DEFAULT, Testbed, get_testbed
from grip_hf.viz import contact_sheet, draw_kept

NEW_TOKENS = 4  # the longest answer is three letters and the end


@dataclass(frozen=True)
class Reply:
    """One generated answer.

    Attributes:
        text: What the model said.
        kept: Indices of the visual tokens that stayed; none of an unpruned model, where nothing was chosen.
        ms: Milliseconds of the whole `generate` call.
    """

    text: str
    kept: tuple[int, ...]
    ms: float


@dataclass(frozen=True)
class Comparison:
    """One line of the demo's table."""

    kind: str
    question: str
    truth: str
    full: str
    pruned: str
    kept: int
    total: int
    full_ms: float
    pruned_ms: float


@dataclass(frozen=True)
class Cell:
    """Accuracy of one selector at one budget; `selector="none"` is the unpruned model."""

    selector: str
    keep_ratio: float
    tokens: int
    right: int
    asked: int


@dataclass(frozen=True)
class Demo:
    """All that the demo shows."""

    rows: list[Comparison]
    summary: list[Cell]
    picture: Image.Image

    def to_dict(self) -> dict:
        """The table and the summary as plain data."""
        return {"table": [asdict(row) for row in self.rows], "summary": [asdict(cell) for cell in self.summary]}


def run_demo(
    selectors: Sequence[str],
    budgets: Sequence[float],
    show: tuple[str, float],
    scenes: int = 6,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
    testbed: str = DEFAULT.name,
) -> Demo:
    """Ask all questions of some held-out scenes, unpruned and with each selector at each budget.

    Args:
        selectors: Names of selectors for the summary.
        budgets: Keep ratios in (0, 1] for the summary.
        show: Selector and keep ratio of the table and the picture.
        scenes: Number of scenes, >= 1; the first two are in the table and the picture.
        seed: Seed of the first scene.
        progress: Called with a line of text as each part begins.
        testbed: "pocket" or "pocket2".

    Raises:
        ValueError: `scenes` is less than 1, or there is no such testbed.
    """
    if scenes < 1:
        raise ValueError(f"scenes={scenes} must be >= 1")
    chosen = get_testbed(testbed)
    loaded = load_pocket(testbed)
    model: Any = loaded[0]  # transformers narrows the type of `generate` too far for its own models
    processor = loaded[1]
    shown = [make_scene(seed + i, testbed=testbed) for i in range(scenes)]
    progress("unpruned answers")
    remove_grip(model)
    full = ask_all(model, processor, shown)
    summary = [_cell("none", 1.0, shown, full, chosen)]
    for selector in selectors:
        for keep_ratio in budgets:
            progress(f"{selector} at {keep_ratio:.0%}")
            apply_grip(model, GripConfig(keep_ratio=keep_ratio, selector=selector))
            summary.append(_cell(selector, keep_ratio, shown, ask_all(model, processor, shown), chosen))
    progress("one question at a time")
    config = GripConfig(keep_ratio=show[1], selector=show[0])
    rows, picture = _side_by_side(model, processor, shown[:2], config, chosen)
    return Demo(rows, summary, picture)


def ask_one(model: Any, processor: LlavaProcessor, scene: Scene, question: Question) -> Reply:
    """Put one question about one scene to the model, as a user would."""
    inputs = processor(images=scene.image, text=f"<image>{question.text}", return_tensors="pt")
    begin = time.perf_counter()
    out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True)
    ms = 1000 * (time.perf_counter() - begin)
    text = processor.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    pruned = hasattr(model, "grip")
    kept = model.grip.kept_tokens(out)[0].tolist() if pruned else ()
    return Reply(text.strip(), tuple(kept), ms)


@torch.no_grad()
def ask_all(model: Any, processor: LlavaProcessor, scenes: Sequence[Scene]) -> list[str]:
    """The answers to all questions of all scenes, a scene's questions as one batch."""
    answers: list[str] = []
    for scene in scenes:
        texts = [f"<image>{question.text}" for question in scene.questions]
        inputs = processor(images=[scene.image] * len(texts), text=texts, padding=True, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        replies = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers += [reply.strip() for reply in replies]
    return answers


def _cell(selector: str, keep_ratio: float, scenes: Sequence[Scene], answers: Sequence[str], testbed: Testbed) -> Cell:
    questions = [question for scene in scenes for question in scene.questions]
    right = sum(answer == question.answer for answer, question in zip(answers, questions, strict=True))
    tokens = GripConfig(keep_ratio=keep_ratio).num_kept(testbed.tokens)
    return Cell(selector, keep_ratio, tokens, right, len(questions))


def _side_by_side(
    model: Any, processor: LlavaProcessor, scenes: Sequence[Scene], config: GripConfig, testbed: Testbed
) -> tuple[list[Comparison], Image.Image]:
    """The table, and a picture of each scene beside what was kept for its first questions of different kinds."""
    rows, sheet = [], []
    for scene in scenes:
        captions: dict[str, tuple[Image.Image, str]] = {}
        for question in scene.questions:
            remove_grip(model)
            full = ask_one(model, processor, scene, question)
            apply_grip(model, config)
            pruned = ask_one(model, processor, scene, question)
            rows.append(
                Comparison(
                    question.kind,
                    question.text,
                    question.answer,
                    full.text,
                    pruned.text,
                    len(pruned.kept),
                    testbed.tokens,
                    full.ms,
                    pruned.ms,
                )
            )
            caption = f"{question.text}\nfull: {full.text}   pruned: {pruned.text}"
            drawn = draw_kept(scene.image, pruned.kept, (testbed.side,) * 2, 384)
            captions.setdefault(question.kind, (drawn, caption))
        best = [captions[kind] for kind in ("colour", "relation", "reading") if kind in captions]
        whole = scene.image.resize((384, 384), Image.Resampling.LANCZOS)
        title = f"all {testbed.tokens} visual tokens\nright: {config.selector}, {config.keep_ratio:.0%} of them"
        sheet.append([(whole, title), *best])
    remove_grip(model)
    return rows, contact_sheet(sheet)


def means(summary: Sequence[Cell]) -> dict[str, dict[float, float]]:
    """Accuracy in percent by selector and keep ratio."""
    table: dict[str, dict[float, float]] = defaultdict(dict)
    for cell in summary:
        table[cell.selector][cell.keep_ratio] = 100 * cell.right / cell.asked
    return dict(table)
