"""PyTorch and transformers: `torch_peer.py gemm` or `torch_peer.py MODEL [bf16 | autocast | f32] [eager | batched_mm | grouped_mm]`.

Requests: {"what": "decode", "batch", "prompt", "length"} (`generate`, timed from its first token to its last),
{"what": "prefill", "length"}, {"what": "train", "batch", "length"} (forward, backward, AdamW, fused), and, for `gemm`,
{"m", "n", "k", "dtype": "bf16" | "f32" | "mixed", "cold"}. `autocast` keeps f32 parameters and computes in bf16, as is usual in training.
"""

import sys
import time

import torch

import worker

torch.set_num_threads(worker.threads())
COLD_BYTES = 512 << 20


class Clock:
    """Takes the time of each token that `generate` hands out."""

    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass


class Model:
    def __init__(self, path, numbers="bf16", experts=None):
        import transformers

        dtype = torch.bfloat16 if numbers == "bf16" else torch.float32
        options = {"experts_implementation": experts} if experts else {}
        self.model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)
        self.autocast = numbers == "autocast"
        self.vocabulary = self.model.config.vocab_size
        self.optimizer = None

    def ids(self, batch, length):
        return torch.tensor([worker.tokens(length, self.vocabulary, s) for s in range(batch)])

    @torch.inference_mode()
    def decode(self, batch, prompt, length):
        ids, clock = self.ids(batch, prompt), Clock()
        self.model.generate(
            ids, attention_mask=torch.ones_like(ids), streamer=clock, do_sample=False,
            max_new_tokens=length, min_new_tokens=length, pad_token_id=0,
        )
        # The first call hands out the prompt, the second the token drawn from it.
        assert len(clock.times) == length + 1, len(clock.times)
        return batch * (length - 1) / (clock.times[-1] - clock.times[1])

    @torch.inference_mode()
    def prefill(self, length):
        ids = self.ids(1, length)
        began = time.perf_counter()
        self.model(ids, logits_to_keep=1)
        return length / (time.perf_counter() - began)

    def train(self, batch, length):
        if self.optimizer is None:
            self.model.train()
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        ids = self.ids(batch, length)
        began = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            loss = self.model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return batch * length / (time.perf_counter() - began)


@torch.inference_mode()
def gemm(m, n, k, dtype, cold):
    """Seconds of single products, rising. "mixed": f32 in and out, computed in bf16, as ours are."""
    torch.backends.mkldnn.matmul.fp32_precision = "bf16" if dtype == "mixed" else "ieee"
    dtype = {"bf16": torch.bfloat16, "f32": torch.float32, "mixed": torch.float32}[dtype]
    x, w = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    copies = -(-COLD_BYTES // (w.numel() * w.element_size())) if cold else 1
    weights, times = [w.clone() for _ in range(copies)], []
    torch.nn.functional.linear(x, weights[-1])
    start = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - start < 0.2:
        began = time.perf_counter()
        torch.nn.functional.linear(x, weights[len(times) % copies])
        times.append(time.perf_counter() - began)
    return sorted(times)


def main():
    if sys.argv[1] == "gemm":
        return worker.serve(lambda request: {"seconds": gemm(**request)})
    model = Model(*sys.argv[1:])
    calls = {"decode": model.decode, "prefill": model.prefill, "train": model.train}
    worker.serve(lambda request: {"tokens_per_s": calls[request.pop("what")](**request)})


main()
