"""Mean negative log-prob of the held-out completions, nats a token: python3 heldout.py MODEL ..."""

import json
import os
import subprocess
import sys

rows = [json.loads(line) for line in open("heldout.jsonl")]
for model in sys.argv[1:]:
    command = [os.environ.get("FREEWHEEL", "freewheel"), "logprobs", "--model", model, "--threads", "1", "--input", "heldout.jsonl"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    total = count = 0
    for row, line in zip(rows, out.splitlines(), strict=True):
        kept = json.loads(line)["logprobs"][-row["completion"] :]
        total, count = total - sum(kept), count + len(kept)
    print(json.dumps({"model": model, "loss": round(total / count, 4), "tokens": count}))
