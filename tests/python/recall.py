"""Asks for values out of lists: BASE_URL SEED. One seed gives one set of questions."""

import random
import sys

from report import MODEL, client, report_whole, user
from skills import recall_turns

LISTS = 20
# Longer than a chunk of prefill, so that KV moves in pieces; too long for the model to be held to the answer.
LONG = [80, 150]

base_url, seed = sys.argv[1:]
rng = random.Random(int(seed))
with client(base_url) as ai:
    for pairs in [rng.randint(4, 8) for _ in range(LISTS)] + LONG:
        (_, question), (_, expected) = recall_turns(rng, pairs, 1)
        fields = {"model": MODEL, "temperature": 0, "seed": 1, "max_tokens": 20}
        answer = ai.chat.completions.create(messages=user(question), **fields)
        right = answer.choices[0].message.content == expected
        report_whole(answer, right=None if pairs in LONG else right)
