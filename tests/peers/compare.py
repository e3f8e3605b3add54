#!/usr/bin/env python3
"""Freewheel beside its peers on one machine, in one run: rounds alternate, medians count.

    compare.py --freewheel target/release/freewheel --gguf smollm2-bf16.gguf --model SmolLM2=models/smollm2 \\
               --model "Qwen3-MoE 90 M=models/qwen3-moe-90m" --batch 1,8,32 --out peers

writes peers.md and peers.json. `--gguf` (llama.cpp) goes with the first model. Run it on an idle machine, with the Python that has
torch, transformers and llama-cpp-python. How the weights are made: docs/performance.md.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
PROMPT, PREFILLED = 16, 512
TRAINED = (8, 256)
GEMM_ROWS = [1, 4, 8, 32, 128, 512, 2048]


class Peer:
    """A peer's process, kept between rounds."""

    def __init__(self, script, *arguments):
        command = [sys.executable, str(HERE / script), *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended at {request}")
        return json.loads(line)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Comparison:
    def __init__(self, options):
        self.options, self.rows = options, []

    def ours(self, *arguments):
        """A row of `freewheel bench`, one round; with the machine's limits."""
        command = [self.options.freewheel, "bench", *arguments, "--json", "--threads", str(self.options.threads)]
        output = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        return [{**row, "machine": output["machine"]} for row in output["rows"]]

    def paired(self, what, key, ours, theirs):
        """Rounds in turn. `ours()` gives a row; `theirs`: name → call that gives {tokens_per_s, memory_peak_bytes}."""
        rounds = {name: [] for name in ["freewheel", *theirs]}
        for call in theirs.values():
            call()
        for _ in range(self.options.rounds):
            rounds["freewheel"].append(ours())
            for name, call in theirs.items():
                rounds[name].append(call())
        row = {"what": what, **key, "rounds": self.options.rounds, "freewheel": rounds["freewheel"]}
        for name, found in rounds.items():
            rates = [one["tokens_per_s"] for one in found]
            row[name] = {
                "tokens_per_s": statistics.median(rates), "lowest": min(rates), "highest": max(rates),
                "memory_peak_bytes": max((one.get("memory_peak_bytes") or 0 for one in found)) or None,
            }
        middle = sorted(rounds["freewheel"], key=lambda one: one["tokens_per_s"])[self.options.rounds // 2]
        row["freewheel"]["bench"] = middle
        self.rows.append(row)
        self.write()
        print(json.dumps({name: round(row[name]["tokens_per_s"], 1) for name in rounds} | {"what": what, **key}), file=sys.stderr)

    def write(self):
        out = self.options.out
        machines = [row["freewheel"]["bench"]["machine"] for row in self.rows if row["what"] != "gemm"]
        pathlib.Path(out + ".json").write_text(json.dumps(self.rows, indent=1))
        pathlib.Path(out + ".md").write_text(report(self.rows, machines[0] if machines else None))

    def sampling(self, name, path, gguf):
        """Decode by batch size, and one prompt's prefill."""
        peers = {"transformers": Peer("torch_peer.py", path)}
        if gguf:
            peers["llama.cpp"] = Peer("llama_peer.py", gguf)
        for batch in self.options.batch if "decode" in self.options.only else []:
            size = {"batch": batch, "prompt": PROMPT, "length": self.options.length}
            arguments = [f"--{key}={value}" for key, value in size.items()]
            self.paired(
                "decode", {"model": name, "batch": batch},
                lambda: self.ours("decode", "--model", path, "--rounds=1", *arguments)[0],
                {peer: lambda held=held: held.ask(what="decode", **size) for peer, held in peers.items()},
            )
        if "prefill" not in self.options.only:
            return [held.close() for held in peers.values()]
        arguments = [f"--length={PREFILLED}", f"--rows={PREFILLED}"]
        self.paired(
            "prefill", {"model": name, "length": PREFILLED},
            lambda: self.ours("prefill", "--model", path, "--rounds=1", *arguments)[0],
            {peer: lambda held=held: held.ask(what="prefill", length=PREFILLED) for peer, held in peers.items()},
        )
        for held in peers.values():
            held.close()

    def train(self, name, path):
        batch, length = TRAINED
        numbers = {"PyTorch bf16 autocast": "autocast", "PyTorch f32": "f32"}
        peers = {peer: Peer("torch_peer.py", path, kind) for peer, kind in numbers.items()}
        self.paired(
            "train", {"model": name, "batch": batch, "length": length},
            lambda: self.ours("train", "--model", path, "--rounds=1", f"--batch={batch}", f"--length={length}")[0],
            {
                peer: lambda held=held: held.ask(what="train", batch=batch, length=length)
                for peer, held in peers.items()
            },
        )
        for held in peers.values():
            held.close()

    def gemm(self, name, path):
        """Each product of the model, cold below 128 rows (as in decoding), warm above."""
        torch = Peer("torch_peer.py", "gemm")
        for cold in (True, False):
            rows = [m for m in GEMM_ROWS if (m < 128) == cold]
            arguments = ["gemm", "--model", path, f"--rows={','.join(map(str, rows))}", *(["--cold"] if cold else [])]
            rounds = [self.ours(*arguments) for _ in range(max(1, self.options.rounds // 2))]
            for index, one in enumerate(rounds[0]):
                shape = {key: one[key] for key in ("m", "n", "k")}
                theirs = torch.ask(**shape, dtype=one["precision"], cold=cold)["seconds"]
                flops = 2 * one["m"] * one["n"] * one["k"]
                mine = statistics.median(rows[index]["flops_per_s"] for rows in rounds)
                row = {"what": "gemm", "model": name, "product": one["what"], **shape, "cold": cold, "precision": one["precision"]}
                row |= {"freewheel": mine, "oneDNN": flops / statistics.median(theirs)}
                if one["precision"] == "bf16" and not cold:
                    theirs = torch.ask(**shape, dtype="mixed", cold=cold)["seconds"]
                    row["oneDNN f32"] = flops / statistics.median(theirs)
                row |= {"peak_fraction": mine / one["machine"]["peak_flops_per_s"], "count": one["count"]}
                self.rows.append(row)
        self.write()
        torch.close()


def times(ours, theirs):
    return f"{ours / theirs:.2f}×"


def cell(row, name):
    return f"{row[name]['tokens_per_s']:,.0f}" if name in row else "–"


def speed_table(rows, peers, size):
    lines = [
        f"| model | {size} | freewheel | " + " | ".join(peers) + " | times the best peer | of the roofline |",
        "|" + "---|" * (5 + len(peers)),
    ]
    for row in rows:
        best = max(row[peer]["tokens_per_s"] for peer in peers if peer in row)
        mine = row["freewheel"]
        over = mine["bench"].get("over_roofline")
        share = f"{100 / over:.0f} % ({mine['bench']['bound']})" if over else f"{100 * mine['bench']['peak_fraction']:.0f} % of peak"
        cells = [row["model"], str(row.get("batch", row.get("length"))), f"**{mine['tokens_per_s']:,.0f}**"]
        cells += [cell(row, peer) for peer in peers] + [times(mine["tokens_per_s"], best), share]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def memory_table(rows, peers):
    lines = ["| model | freewheel | " + " | ".join(peers) + " |", "|" + "---|" * (2 + len(peers))]
    for row in rows:
        held = [f"{row[name]['memory_peak_bytes'] / 2**20:,.0f} MiB" for name in ["freewheel", *peers]]
        lines.append(f"| {row['model']} | " + " | ".join(held) + " |")
    return "\n".join(lines)


def gemm_table(rows):
    lines = []
    sizes = sorted({row["m"] for row in rows})
    lines.append("| model | product | n × k | " + " | ".join(f"m = {m}" for m in sizes) + " |")
    lines.append("|" + "---|" * (3 + len(sizes)))
    shapes = {}
    for row in rows:
        shapes.setdefault((row["model"], row["product"], row["n"], row["k"], row["precision"]), {})[row["m"]] = row
    for (model, product, n, k, precision), by_rows in shapes.items():
        cells = []
        for m in sizes:
            row = by_rows[m]
            rates = [row[name] for name in ("freewheel", "oneDNN", "oneDNN f32") if name in row]
            cells.append(" / ".join(f"{rate / 1e9:,.0f}" for rate in rates) + f" ({times(rates[0], rates[1])})")
        what = product if precision == "bf16" else f"{product} ({precision})"
        lines.append(f"| {model} | {what} | {n} × {k} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def decode_at_onednn(gemms):
    """Tokens/s of decoding if nothing but the products cost, at oneDNN's rates: by model and batch, where no expert is chosen."""
    found = {}
    for row in gemms:
        found.setdefault((row["model"], row["m"]), []).append(row)
    lines = []
    for (model, m), products in found.items():
        if m <= 128 and not any("expert" in row["product"] for row in products):
            seconds = sum(row["count"] * 2 * row["m"] * row["n"] * row["k"] / row["oneDNN"] for row in products)
            lines.append(f"{model}, {m} at once: {m / seconds:,.0f}")
    return "; ".join(lines)


def report(rows, machine):
    of = lambda what: [row for row in rows if row["what"] == what]
    parts = []
    if machine:
        parts.append(
            f"{machine['threads']} threads, {machine['features']}: memory {machine['memory_bytes_per_s'] / 1e9:.1f} GB/s, "
            f"large product {machine['gemm_flops_per_s'] / 1e9:,.0f} GFLOP/s, registers {machine['peak_flops_per_s'] / 1e9:,.0f} GFLOP/s"
        )
    if of("decode"):
        parts += ["Decoding, tokens/s:", speed_table(of("decode"), ["llama.cpp", "transformers"], "batch")]
    if of("prefill"):
        parts += ["Prefill of one prompt, tokens/s:", speed_table(of("prefill"), ["llama.cpp", "transformers"], "tokens")]
    if of("train"):
        peers = ["PyTorch bf16 autocast", "PyTorch f32"]
        parts += [f"Training step at {TRAINED[0]} × {TRAINED[1]}, tokens/s:", speed_table(of("train"), peers, "batch")]
        parts += ["Memory at its peak:", memory_table(of("train"), peers)]
    if of("gemm"):
        legend = "ours / oneDNN in bf16 / oneDNN on f32 computing in bf16; weights from memory below 128 rows"
        parts += [f"Products, GFLOP/s ({legend}):", gemm_table(of("gemm"))]
        parts += ["Decoding, tokens/s, if products at oneDNN's bf16 rates were all: " + decode_at_onednn(of("gemm"))]
    return "\n\n".join(parts) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--freewheel", required=True)
    parser.add_argument("--model", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--gguf", help="the first model for llama.cpp")
    parser.add_argument("--batch", default="1,8,32")
    parser.add_argument("--length", type=int, default=64, help="tokens that each sequence decodes in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", default="decode,prefill,train,gemm")
    parser.add_argument("--train", default="", help="names of models to train; all if left out")
    parser.add_argument("--out", default="peers")
    options = parser.parse_args()
    options.batch = [int(batch) for batch in options.batch.split(",")]
    os.environ["PEER_THREADS"] = str(options.threads)
    comparison, gguf = Comparison(options), options.gguf
    for model in options.model:
        name, path = model.split("=", 1)
        if "decode" in options.only or "prefill" in options.only:
            comparison.sampling(name, path, gguf)
        if "train" in options.only and (not options.train or name in options.train.split(",")):
            comparison.train(name, path)
        if "gemm" in options.only:
            comparison.gemm(name, path)
        gguf = None


main()
