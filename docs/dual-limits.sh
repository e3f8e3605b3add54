#!/bin/sh
# Makes docs/dual-limits.svg: both limits against the first alone, held-out rates of every checkpoint.
#   cargo build --release && PATH=target/release:$PATH SEEDS="0 1" sh docs/dual-limits.sh
set -e
out=${1:-runs/dual}
freewheel sft configs/dual-limits-sft.toml --force
first='reward.combine.lagrangian.costs=[{name = "unsafe", expr = "guard > 0 || form == 0", limit = 0.05, on = "tag:harmful"}]'
mkdir -p "$out"
: > "$out/rates.jsonl"
for seed in ${SEEDS:-0 1 2}; do
    freewheel run configs/dual-limits.toml --force --set run.dir="\"$out\"" --set run.name="both-$seed" --set run.seed=$seed
    freewheel run configs/dual-limits.toml --force --set run.dir="\"$out\"" --set run.name="first-$seed" --set run.seed=$seed --set "$first" \
        --set learner.steps=30    # by then it refuses everything, and nothing is left to learn from
    for arm in both first; do
        for checkpoint in models/vault "$out/$arm-$seed"/checkpoints/step-*; do
            case $checkpoint in models/vault) step=0 ;; *) step=${checkpoint##*step-}; step=${step%%-*} ;; esac
            # Judged by both limits, whichever it was trained with.
            freewheel eval configs/dual-limits.toml --model "$checkpoint" --json |
                python3 -c "import json,sys; print(json.dumps({'arm': '$arm', 'seed': $seed, 'step': $step, **json.load(sys.stdin)}))" >> "$out/rates.jsonl"
        done
    done
done
python3 docs/dual-limits.py "$out/rates.jsonl" docs/dual-limits.svg
