"""Ask a vLLM server at few visual tokens first, and again at more where the answer is in doubt, as calibrated.

grip-hf calibrate --model MODEL --scorer SCORER --dataset DATA --quality 0.99 --output SCORER
vllm serve MODEL --hf-overrides '{"grip": {"scorer": "SCORER", "keep_ratio": 0.25}}' --trust-request-mm-kwargs
python examples/serving/ladder.py SCORER picture.png "What is on the table?" --quality 0.99

The doubt is that of transformers: the product of the greedy tokens' probabilities, which the server sends along.
vLLM computes in another order of operations, and perhaps in another precision, than the model that was calibrated: the
promise is that of the calibration, as far as both write the same. vLLM keeps the encoded picture for the second look.
"""

import argparse
import base64
import math
from pathlib import Path

import openai

from grip_hf.quality.doubt import FIRST
from grip_hf.quality.promise import Calibration, Promise


def ask(client: openai.OpenAI, model: str, messages: list, promise: Promise, **options) -> tuple[str, int, float]:
    """The answer, how many looks it took, and its confidence."""
    extra = options.pop("extra_body", {})
    for look, rung in enumerate(promise.ladder):
        budget = {"num_tokens": rung} if isinstance(rung, int) and rung > 1 else {"keep_ratio": rung}
        found = client.chat.completions.create(
            model=model,
            messages=messages,
            temperature=0,
            logprobs=True,
            extra_body={**extra, "mm_processor_kwargs": {"grip": budget}},
            **options,
        ).choices[0]
        steps = [token.logprob for token in found.logprobs.content]
        sure = math.exp(sum(steps[:1] if promise.rule == FIRST else steps))
        if look == len(promise.thresholds) or sure >= promise.thresholds[look]:
            return found.message.content.strip(), look + 1, sure
    raise AssertionError("the last budget has no threshold")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scorer", type=Path, help="folder that grip-hf calibrate wrote")
    parser.add_argument("picture", type=Path)
    parser.add_argument("question")
    parser.add_argument("--quality", type=float, default=0.99)
    parser.add_argument("--rule", choices=("answer", "first"), help="what an answer is judged by")
    parser.add_argument("--url", default="http://localhost:8000/v1")
    asked = parser.parse_args()

    calibration = Calibration.load(asked.scorer)
    if calibration.made_for.get("tower") is not None:
        parser.error(
            "this calibration prunes the vision tower, which vLLM does not: calibrate with --tower-keep-ratio 1"
        )
    encoded = base64.b64encode(asked.picture.read_bytes()).decode()
    kind = asked.picture.suffix.lstrip(".").replace("jpg", "jpeg")
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{encoded}"}},
        {"type": "text", "text": asked.question},
    ]
    client = openai.OpenAI(base_url=asked.url, api_key="none")
    text, looks, sure = ask(
        client,
        client.models.list().data[0].id,
        [{"role": "user", "content": content}],
        calibration.promise(asked.quality, asked.rule),
        max_tokens=calibration.max_new_tokens,
    )
    print(text)
    print(f"looks: {looks}; confidence: {sure:.3f}")


if __name__ == "__main__":
    main()
