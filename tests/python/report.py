"""What the scripts share: the client, and the line that tells the Rust test of an answer."""

import json
import pathlib
import sys

import openai

DEMO = pathlib.Path(__file__).parents[2] / "models" / "demo"
sys.path.append(str(DEMO))

MODEL = "demo"
TIMEOUT_S = 120


def client(base_url: str) -> openai.OpenAI:
    # A retry would hide what the first try met.
    return openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=TIMEOUT_S)


def user(question: str) -> list[dict]:
    return [{"role": "user", "content": question}]


def report(request: str, text: str, finish: str | None = None, usage=None, **more) -> None:
    usage = usage and usage.model_dump()
    print(json.dumps({"request": request, "text": text, "finish": finish, "usage": usage, **more}))


def report_whole(answer, **more) -> None:
    choice = answer.choices[0]
    report(answer.id, choice.message.content, choice.finish_reason, answer.usage, **more)
