"""Scores a server that runs: the questions of evaluate.py, greedily, whole answers only. Needs nothing but Python.

    forebay up --kv-type int8
    python ask.py http://127.0.0.1:8080
"""

import argparse
import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import skills
from skills import Turn

CLIENTS = 8
NEW_TOKENS_MAX = 30


def answer(url: str, model: str, turns: list[Turn]) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": NEW_TOKENS_MAX}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)["choices"][0]["message"]["content"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="where the server is, without /v1")
    parser.add_argument("--model", default="demo", help="its name there")
    parser.add_argument("--lists", type=int, default=200, help="fresh lists for each score")
    parser.add_argument("--seed", type=int, default=12345)
    args = parser.parse_args()
    sets = skills.scored(args.lists, args.seed)
    scores = []
    with ThreadPoolExecutor(CLIENTS) as clients:
        for conversations in sets.values():
            answers = clients.map(lambda turns: answer(args.url, args.model, turns[:-1]), conversations)
            right = sum(given == turns[-1][1] for given, turns in zip(answers, conversations))
            scores.append(f"{100 * right / len(conversations):.1f}")
    print("| " + " | ".join(sets) + " |\n" + "|---" * len(sets) + "|\n| " + " | ".join(scores) + " |")


if __name__ == "__main__":
    main()
