"""llama.cpp through its low-level interface: `llama_peer.py MODEL.gguf`.

Requests: {"what": "decode", "batch", "prompt", "length"} or {"what": "prefill", "length"}. Several sequences share one batch a step;
tokens are given, not drawn, so that no sampler's time is in the figures.
"""

import sys
import time

import llama_cpp as c

import worker

c.llama_backend_init()
# Kept by name: the library calls it as long as it lives.
SILENT = c.llama_log_callback(lambda level, text, data: None)
c.llama_log_set(SILENT, None)
MODEL = c.llama_model_load_from_file(sys.argv[1].encode(), c.llama_model_default_params())
VOCABULARY = c.llama_vocab_n_tokens(c.llama_model_get_vocab(MODEL))


class Context:
    """A context for `sequences` of `length` positions, and a batch of its rows."""

    def __init__(self, sequences, length, rows):
        params = c.llama_context_default_params()
        params.n_ctx = sequences * ((length + 255) // 256 * 256)
        params.n_batch, params.n_ubatch, params.n_seq_max = max(rows, 512), 512, sequences
        params.n_threads = params.n_threads_batch = worker.threads()
        self.context = c.llama_init_from_model(MODEL, params)
        if not self.context:
            raise SystemExit("llama.cpp cannot make this context")
        self.batch = c.llama_batch_init(max(rows, 512), 0, 1)

    def decode(self, rows):
        """One call over rows of (sequence, position, token, whether its logits are wanted)."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (sequence, position, token, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, sequence, wanted
        if c.llama_decode(self.context, batch) != 0:
            raise SystemExit("llama_decode failed")

    def clear(self):
        c.llama_memory_clear(c.llama_get_memory(self.context), True)


CONTEXTS = {}


def context(sequences, length, rows):
    key = (sequences, length, rows)
    if key not in CONTEXTS:
        CONTEXTS[key] = Context(sequences, length, rows)
    CONTEXTS[key].clear()
    return CONTEXTS[key]


def decode(batch, prompt, length):
    held = context(batch, prompt + length, batch * prompt)
    texts = [worker.tokens(prompt + length, VOCABULARY, s) for s in range(batch)]
    for s, text in enumerate(texts):
        held.decode([(s, i, t, i + 1 == prompt) for i, t in enumerate(text[:prompt])])
    began = time.perf_counter()
    # As many steps as a sampler that drew the first token from the prompt would need.
    for position in range(prompt, prompt + length - 1):
        held.decode([(s, position, text[position], True) for s, text in enumerate(texts)])
    return batch * (length - 1) / (time.perf_counter() - began)


def prefill(length):
    held = context(1, length, length)
    text = worker.tokens(length, VOCABULARY)
    began = time.perf_counter()
    held.decode([(0, i, t, i + 1 == length) for i, t in enumerate(text)])
    return length / (time.perf_counter() - began)


def answer(request):
    what = request.pop("what")
    return {"tokens_per_s": {"decode": decode, "prefill": prefill}[what](**request)}


worker.serve(answer)
