"""Ask a vLLM server that prunes pictures, with the plain OpenAI client.

pip install 'grip-hf[vllm]'
vllm serve MODEL --hf-overrides '{"grip": {"scorer": "user/scorer", "keep_ratio": 0.25}}'
python examples/serving/client.py picture.png "What is on the table?" --keep-ratio 0.11
"""

import argparse
import base64
from pathlib import Path

import openai


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("question")
    parser.add_argument("--keep-ratio", type=float, help="another budget than the server's, for this request")
    parser.add_argument("--url", default="http://localhost:8000/v1")
    asked = parser.parse_args()

    client = openai.OpenAI(base_url=asked.url, api_key="none")
    budget = {} if asked.keep_ratio is None else {"mm_processor_kwargs": {"grip": {"keep_ratio": asked.keep_ratio}}}
    encoded = base64.b64encode(asked.picture.read_bytes()).decode()
    kind = asked.picture.suffix.lstrip(".").replace("jpg", "jpeg")
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{encoded}"}},
                    {"type": "text", "text": asked.question},
                ],
            }
        ],
        temperature=0,
        extra_body=budget,
    )
    print(answer.choices[0].message.content)
    print(f"prompt tokens, pruned pictures included: {answer.usage.prompt_tokens}")


if __name__ == "__main__":
    main()
