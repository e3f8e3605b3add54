"""Thirty-six things to say a sentence about: prompts.jsonl, for `freewheel generate`."""

import json

THINGS = """cat dog horse cow owl fox bear wolf duck frog bee ant forest desert river mountain beach city village farm garden
island school market chair table book lamp clock knife bottle shoe hat wheel boat train"""

with open("prompts.jsonl", "w") as out:
    for thing in THINGS.split():
        ask = f"Write one short sentence about this: {thing}"
        out.write(json.dumps({"id": thing, "messages": [{"role": "user", "content": ask}]}) + "\n")
