#!/usr/bin/env python3
"""Holds checkpoints that freewheel writes against transformers: they load unchanged and give the same logits.

    python tests/transformers_check.py target/debug/freewheel tests/fixtures/models/* assets/sprout

Each model is written by `freewheel convert` (in shards where it is over a MiB), loaded by transformers in float32, and
both compute the logits of the same random tokens. Of a classifier transformers computes the scores, of what was written and
of the original. Prints a Markdown table and fails above 2e-4. Needs torch and transformers; encoders are left out.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import torch
import transformers

transformers.utils.logging.disable_progress_bar()
TOLERANCE = 2e-4
LENGTHS = (40, 17, 3)


def token_lines(config, seed):
    text = config.get("text_config", config)
    generator = torch.Generator().manual_seed(seed)
    # Ids of images stand for something else than themselves, and lie at the end of the vocabulary.
    vocab = text["vocab_size"] - (16 if "vision_config" in config else 0)
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in LENGTHS]


def scores(config):
    return config["architectures"][0].endswith("ForSequenceClassification")


def ours(binary, folder, lines):
    given = "\n".join(json.dumps({"input_ids": ids}) for ids in lines)
    command = [binary, "logprobs", "--model", folder, "--dtype", "f32", "--logits", "--input", "-"]
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=True)
    return [torch.tensor(json.loads(line)["logits"]) for line in done.stdout.splitlines()]


def theirs(folder, config, lines):
    if scores(config):
        auto = transformers.AutoModelForSequenceClassification
    elif "vision_config" in config:
        auto = transformers.AutoModelForImageTextToText
    else:
        auto = transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    odd = {key: value for key, value in info.items() if value}
    if odd:
        raise SystemExit(f"{folder}: transformers reports {odd}")
    with torch.no_grad():
        return [model(input_ids=torch.tensor([ids])).logits[0] for ids in lines]


def check(binary, source):
    config = json.loads((source / "config.json").read_text())
    if config["architectures"][0].startswith(("Bert", "Deberta")):
        return None
    with tempfile.TemporaryDirectory() as folder:
        command = [binary, "convert", "--model", str(source), "--out", folder, "--shard-mib", "1"]
        subprocess.run(command, capture_output=True, text=True, check=True)
        shards = len(list(pathlib.Path(folder).glob("*.safetensors")))
        lines = token_lines(config, seed=len(source.name))
        expected = theirs(str(source), config, lines) if scores(config) else ours(binary, folder, lines)
        pairs = list(zip(expected, theirs(folder, config, lines), strict=True))
        transformers.AutoTokenizer.from_pretrained(folder)
    return max(float((a - b).abs().max()) for a, b in pairs), shards


def main():
    binary, *sources = sys.argv[1:]
    worst = 0.0
    print("| checkpoint | architecture | files | logits |\n|---|---|---|---|")
    for source in map(pathlib.Path, sources):
        if not (source / "config.json").is_file():
            continue
        found = check(binary, source)
        if found is None:
            continue
        error, shards = found
        name = json.loads((source / "config.json").read_text())["architectures"][0]
        print(f"| `{source.name}` | `{name}` | {shards} | {error:.1e} |", flush=True)
        worst = max(worst, error if error == error else float("inf"))
    sys.exit(0 if worst <= TOLERANCE else f"logits differ by {worst}")


if __name__ == "__main__":
    main()
