#!/bin/sh
# A red team from end to end, with toys: attack, take in, train, attack again. Harmless: what must not be said is a code word.
#   cargo build --release && PATH=target/release:$PATH sh docs/redteam.sh
set -e
out=${1:-runs/redteam}
mkdir -p "$out"
out=$(cd "$out" && pwd)
python3 docs/redteam.py data "$out"
for who in attacker target; do
    # An attacker reads a thousand tokens, a target a hundred.
    [ $who = attacker ] && less="--set sft.steps=400 --set sft.batch_size=16" || less=
    freewheel sft configs/redteam-toy-sft.toml --force --set data.file="\"$out/$who.jsonl\"" --set output.dir="\"models/redteam-$who\"" $less
done
team="freewheel redteam run configs/redteam-toy.toml --set redteam.enabled=true"
measure="freewheel measure --data $out/harmless-held-out.jsonl --max-new-tokens 64 --json"
$team --out "$out/before"
$measure --model models/redteam-target > "$out/before.json"
# What worked, its twin, and what is harmless.
cat "$out/before/intake.jsonl" "$out/harmless.jsonl" > "$out/prompts.jsonl"
freewheel run configs/redteam-toy.toml --force --set prompts.file="\"$out/prompts.jsonl\"" --set run.dir="\"$out\"" --set run.name=trained
trained=$out/trained/checkpoints/$(cat "$out/trained/checkpoints/LATEST")
$team --target "$trained" --out "$out/after"
$measure --model "$trained" > "$out/after.json"
python3 docs/redteam.py table "$out"
