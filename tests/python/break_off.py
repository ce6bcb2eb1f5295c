"""Reads the beginning of a stream, and goes: BASE_URL HOW. HOW is `close`, as a program does that has seen enough,
or `hang`, which waits to be killed."""

import sys
import time

from report import MODEL, client, report, user

base_url, how = sys.argv[1:]
ai = client(base_url)
stream = ai.chat.completions.create(
    model=MODEL, messages=user("Go on."), stream=True, max_tokens=3000, extra_body={"ignore_eos": True}
)
text = ""
for chunk in stream:
    text += chunk.choices[0].delta.content or ""
    if len(text) > 20:
        break
report(chunk.id, text)
if how == "hang":
    time.sleep(600)
stream.close()
# The connection must go with the stream, not with this program.
time.sleep(1)
assert ai.models.list().data, "the client serves on"
