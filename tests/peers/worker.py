"""One round at a time: a peer reads a request per line from stdin and answers with a line of JSON on stdout.

So a peer loads its model once and its rounds alternate with ours. Memory peaks are of the process: one case, one process.
"""

import json
import os
import resource
import sys


def threads():
    return int(os.environ.get("PEER_THREADS", "0")) or os.cpu_count()


def tokens(count, vocabulary, stream=0):
    """Token ids that look like nothing in particular, the same in every run."""
    state, out = 0x9E3779B97F4A7C15 * (stream + 1) % 2**64, []
    for _ in range(count):
        state = (6364136223846793005 * state + 1442695040888963407) % 2**64
        out.append((state >> 33) % vocabulary)
    return out


def serve(answer):
    """Answers requests until stdin ends. `answer(request)` gives a dict."""
    for line in sys.stdin:
        result = answer(json.loads(line))
        result["memory_peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        os.write(ANSWERS, (json.dumps(result) + "\n").encode())


# Libraries print to stdout as they like: answers keep a way of their own.
ANSWERS = os.dup(1)
os.dup2(2, 1)
