"""A page to see what pruning does: ask about a picture, with all visual tokens and with a few of them.

python examples/app.py                                                   # the pocket model; needs the extra `app`
python examples/app.py --model llava-hf/llava-1.5-7b-hf --scorer you/grip-llava-1.5-7b

As a Space: this file as `app.py`, and `grip-hf[app]` in `requirements.txt`.
"""

import argparse
import math
import time
from contextvars import ContextVar

import gradio as gr
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from grip_hf import apply_grip
from grip_hf.pocket import load_pocket_llava, make_scene
from grip_hf.selectors import get_selector
from grip_hf.viz import draw_kept

SELECTORS = ("similarity", "diversity", "random", "grid")  # none of these needs hooks of its own: they share one patch
CHOSEN = ContextVar("chosen selector")  # belongs to the call, as the budget does: users do not disturb each other
ROWS = (("answer", "said"), ("visual tokens", "tokens"), ("milliseconds", "ms"), ("KV cache, KiB", "kib"))


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
        if scorer:
            learned = apply_grip(self.model, scorer, keep_ratio=1.0).grip.selector
            self.selectors = {"grip": learned, **self.selectors}
        apply_grip(self.model, keep_ratio=1.0, selector=lambda batch: self.selectors[CHOSEN.get()](batch))
        self.ask(make_scene(0).image, "is there any key", SELECTORS[0], 50)  # the first call is slow: not a user's

    def ask(self, image, question, selector, percent):
        """The table of both answers, and the picture with the kept tokens; what is wrong is said on the page."""
        if image is None:
            raise gr.Error("Give a picture, or take a sample.")
        if not (question or "").strip():
            raise gr.Error("Ask a question.")
        if selector not in self.selectors or not 0 < percent <= 100:
            raise gr.Error(f"No such choice: {selector}, {percent} %.")
        image, prompt = image.convert("RGB"), question.strip()
        if self.pocket:
            prompt = f"<image>{prompt}"
        else:
            content = [{"type": "image"}, {"type": "text", "text": prompt}]
            chat = [{"role": "user", "content": content}]
            prompt = self.processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = self.processor(images=image, text=prompt, return_tensors="pt").to(self.model.device, self.model.dtype)
        CHOSEN.set(selector)
        with self.model.grip.budget(keep_ratio=1.0):
            full, everything = self.run(inputs)
        with self.model.grip.budget(keep_ratio=percent / 100):
            pruned, kept = self.run(inputs)
        side = math.isqrt(len(everything))
        whole = side * side == len(everything)  # otherwise the tokens are no grid over the whole picture
        picture = draw_kept(image, kept.tolist(), (side, side), size=480) if whole else image
        lines = [f"| {label} | {full[name]} | {pruned[name]} |" for label, name in ROWS]
        return "\n".join(["| | all visual tokens | pruned |", "|---|---|---|", *lines]), picture

    @torch.inference_mode()
    def run(self, inputs):
        """What the model says under the present budget, with its cost; and the kept tokens."""
        start = time.perf_counter()
        out = self.model.generate(**inputs, max_new_tokens=64, do_sample=False, return_dict_in_generate=True)
        spent = 1000 * (time.perf_counter() - start)
        said = self.processor.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        kept = self.model.grip.kept_tokens(out)[0]
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers)
        shown = {"said": said.strip().replace("|", "\\|").replace("\n", " "), "tokens": len(kept)}
        return {**shown, "ms": f"{spent:.0f}", "kib": f"{size / 1024:.0f}"}, kept


def build(page):
    """The page: inputs on the left, answers and kept tokens on the right."""
    samples = [(scene.image, scene.questions[0].text) for scene in map(make_scene, range(6))]
    with gr.Blocks(title="grip_hf", analytics_enabled=False) as blocks:
        gr.Markdown(
            "# Fewer visual tokens\nAsk about a picture, with all of its visual tokens and with a few of them."
        )
        with gr.Row():
            with gr.Column():
                image = gr.Image(samples[0][0], type="pil", label="Picture", height=320, elem_id="picture")
                question = gr.Textbox(samples[0][1], label="Question", elem_id="question")
                selector = gr.Dropdown(list(page.selectors), label="Selector", elem_id="selector")
                percent = gr.Slider(1, 100, 11, step=1, label="Visual tokens kept, %", elem_id="budget")
                button = gr.Button("Ask", variant="primary", elem_id="ask")
            with gr.Column():
                table = gr.Markdown(elem_id="answers")
                kept = gr.Image(label="Kept tokens", height=400, elem_id="kept")
        gr.Examples([list(sample) for sample in samples], [image, question], label="Samples", cache_examples=False)
        asked = {"fn": page.ask, "inputs": [image, question, selector, percent], "outputs": [table, kept]}
        gr.on([button.click, question.submit, percent.release, selector.input], concurrency_limit=4, **asked)
    return blocks


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket", help="a model on the Hub, a folder, or 'pocket'")
    parser.add_argument("--scorer", help="folder or Hub id of a scorer, to choose with it too")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args()
    build(Page(args.model, args.scorer)).launch(server_port=args.port)
