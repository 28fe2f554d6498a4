"""A page to see what pruning does: ask about a picture, with all visual tokens and with a few of them.

python examples/app.py                                                   # the pocket model; needs the extra `app`
python examples/app.py --model llava-hf/llava-1.5-7b-hf --scorer you/grip-llava-1.5-7b

As a Space: this file as `app.py`, a `requirements.txt` with the line `grip-hf[app]`, and a `README.md` beginning with

    ---
    title: Fewer visual tokens
    sdk: gradio
    app_file: app.py
    ---
"""

import argparse
import html
import math
import time
from contextvars import ContextVar

import gradio as gr
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Cache

from grip_hf import apply_grip
from grip_hf.cli.options import words
from grip_hf.errors import ScorerError
from grip_hf.pocket import load_pocket_llava, make_scene
from grip_hf.selectors import get_selector
from grip_hf.viz import draw_kept, draw_scores

SELECTORS = ("similarity", "diversity", "random", "grid")  # none of these needs hooks of its own: they share one patch
CALL = ContextVar("call")  # what one user chose and what came of it; the budget belongs to the call in the same way
SAMPLES = ("object", "reading", "relation", "colour", "where", "count")  # a scene and a question of each kind
CSS = """
#answers .cards {display: grid; grid-template-columns: 1fr 1fr; gap: 12px}
#answers .card {border: 1px solid var(--border-color-primary); border-radius: 12px; padding: 14px 18px}
#answers .card.pruned {border: 2px solid var(--color-accent)}
#answers .said {font-size: 1.7em; font-weight: 600; margin: 4px 0 8px; overflow-wrap: anywhere}
#answers .label {color: var(--body-text-color-subdued)}
"""


def mistake(text):
    """A user's, said on the page; the log of the server need not show it."""
    return gr.Error(text, print_exception=False)


def readable(field):
    """An input for pictures that says on the page when a file is none."""
    plain = field.preprocess

    def preprocess(payload):
        try:
            return plain(payload)
        except (OSError, ValueError, SyntaxError) as error:
            raise mistake("This file cannot be read as a picture.") from error

    field.preprocess = preprocess
    return field


class Page:
    """One patched model, and what is shown of a question to it."""

    def __init__(self, name="pocket", scorer=None):
        self.pocket = name == "pocket"
        if self.pocket:
            self.model, self.processor = load_pocket_llava()
        else:
            self.model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map="auto")
            self.processor = AutoProcessor.from_pretrained(name)
        self.selectors = {one: get_selector(one) for one in SELECTORS}
        try:  # without `scorer`, the one that the model's checkpoint brings, if any
            learned = apply_grip(self.model, scorer=scorer, keep_ratio=1.0, selector="grip").grip.selector
            self.selectors = {"grip": learned, **self.selectors}
        except ScorerError:
            if scorer:
                raise
        apply_grip(self.model, keep_ratio=1.0, selector=self.choose)
        self.ask(*sample(0), next(iter(self.selectors)), 50)  # the first call is slow: not a user's

    def choose(self, batch):
        call = CALL.get()
        call["scores"] = self.selectors[call["selector"]](batch)
        return call["scores"]

    def ask(self, image, question, selector, percent):
        """Both answers as HTML, pictures of the kept tokens and of the order of all; mistakes are said on the page."""
        if image is None:
            raise mistake("Give a picture, or take a sample.")
        if not (question or "").strip():
            raise mistake("Ask a question.")
        if selector not in self.selectors or not percent or not 0 < percent <= 100:
            raise mistake(f"No such choice: {selector}, {percent} %.")
        image, prompt = image.convert("RGB"), question.strip()
        if self.pocket:
            prompt = f"<image>{prompt}"
        else:
            content = [{"type": "image"}, {"type": "text", "text": prompt}]
            chat = [{"role": "user", "content": content}]
            prompt = self.processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = self.processor(images=image, text=prompt, return_tensors="pt").to(self.model.device, self.model.dtype)
        call = {"selector": selector, "scores": None}
        CALL.set(call)
        with self.model.grip.budget(keep_ratio=1.0):
            full, everything = self.run(inputs)
        with self.model.grip.budget(keep_ratio=percent / 100):
            pruned, kept = self.run(inputs)
        total = len(everything)
        shown = card("all visual tokens", total, total, *full) + card(selector, len(kept), total, *pruned, "pruned")
        pictures = image, image
        side = math.isqrt(total)
        if side * side == total:  # otherwise the tokens are no grid over the whole picture
            pictures = draw_kept(image, kept.tolist(), (side, side), size=480), image
            if call["scores"] is not None:
                ranks = call["scores"][0, :total].argsort().argsort()
                heat = draw_scores(image, ranks.tolist(), (side, side), size=480)
                pictures = pictures[0], heat
        return f'<div class="cards">{shown}</div>', *pictures

    @torch.inference_mode()
    def run(self, inputs):
        """What the model says under the present budget, the milliseconds and KV-cache KiB it took; the kept tokens."""
        start = time.perf_counter()
        out = self.model.generate(**inputs, max_new_tokens=64, do_sample=False, return_dict_in_generate=True)
        spent = 1000 * (time.perf_counter() - start)
        said = self.processor.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        cache = next(value for value in out.values() if isinstance(value, Cache))
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        return (said.strip(), spent, size / 1024), self.model.grip.kept_tokens(out)[0]


def card(title, tokens, total, said, ms, kib, kind="full"):
    figures = f"{tokens} of {total} visual tokens · {ms:.0f} ms · {kib:,.0f} KiB KV cache"
    said = html.escape(said) or "(nothing)"
    label = f'<div class="label">{html.escape(title)}</div>'
    return f'<div class="card {kind}">{label}<div class="said">{said}</div><div class="label">{figures}</div></div>'


def sample(number):
    """A held-out scene, and a question about it that is not the same kind as the others'."""
    scene = make_scene(number)
    asked = next((one for one in scene.questions if one.kind == SAMPLES[number]), scene.questions[0])
    return scene.image, asked.text


def build(page):
    """The page: inputs on the left; answers, kept tokens and scores on the right."""
    samples = [list(sample(number)) for number in range(len(SAMPLES))]
    with gr.Blocks(title="grip_hf", analytics_enabled=False) as blocks:
        gr.Markdown("# Fewer visual tokens\nThe same model answers with all of its visual tokens, and with a few.")
        if page.pocket:
            asked = ", ".join(f"*{text}*" for text in dict.fromkeys(text for _, text in samples))
            gr.Markdown(f"The pocket model knows pictures like the samples, and questions like these: {asked}.")
        with gr.Row():
            with gr.Column(scale=2):
                image = readable(gr.Image(samples[0][0], type="pil", label="Picture", height=300, elem_id="picture"))
                question = gr.Textbox(samples[0][1], label="Question", elem_id="question")
                selector = gr.Dropdown(list(page.selectors), label="Selector", elem_id="selector")
                percent = gr.Slider(1, 100, 11, step=1, label="Visual tokens kept, %", elem_id="budget")
                button = gr.Button("Ask", variant="primary", elem_id="ask")
            with gr.Column(scale=3):
                answers = gr.HTML(elem_id="answers", min_height=130)
                with gr.Row():
                    options = {"height": 340, "show_label": False, "interactive": False, "buttons": ["fullscreen"]}
                    with gr.Column():
                        gr.Markdown("**What the language model sees**")
                        kept = gr.Image(label="Kept tokens", elem_id="kept", **options)
                    with gr.Column():
                        gr.Markdown("**What is kept first**, from yellow to blue")
                        scores = gr.Image(label="Order of the scores", elem_id="scores", **options)
        gr.Examples(samples, [image, question], label="Samples", cache_examples=False)
        asked = {"fn": page.ask, "inputs": [image, question, selector, percent], "outputs": [answers, kept, scores]}
        gr.on([button.click, question.submit, percent.release, selector.input], concurrency_limit=4, **asked)
        if page.pocket:  # fast enough to begin with an answer
            blocks.load(concurrency_limit=4, **asked)
    return blocks


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket", help="a model on the Hub, a folder, or 'pocket'")
    parser.add_argument("--scorer", help="folder or Hub id of a scorer; without it, the one that the model brings")
    parser.add_argument("--port", type=int, help="port of the page; 7860 or the next free one")
    args = parser.parse_args(words())
    build(Page(args.model, args.scorer)).launch(server_port=args.port, theme=gr.themes.Soft(), css=CSS)
