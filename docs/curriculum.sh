#!/bin/sh
# Makes docs/curriculum.svg and its table: the curriculum against uniform sampling, on the quickstart's prompts and on prompts of which nine in ten teach nothing.
#   cargo build --release && PATH=target/release:$PATH sh docs/curriculum.sh
set -e
out=${1:-runs/curriculum}
mkdir -p "$out"
out=$(cd "$out" && pwd)
: > "$out/arms.jsonl"
# Nine in ten always solved or never: what the policy solves 16 times of 16, and questions whose reference answer is wrong.
filter="freewheel filter configs/quickstart.toml --all --force"
[ -f "$out/degenerate.jsonl" ] || {
    $filter --count 3000 --out "$out/all.jsonl"
    $filter --count 900 --set prompts.seed=99 --samples 2 --out "$out/others.jsonl"
    python3 docs/curriculum.py pool "$out/all.jsonl" "$out/others.jsonl" "$out/degenerate.jsonl" "$out/held-out.jsonl"
}
# The quickstart with those prompts instead of its generator.
sed -e '/^generator/d; /^levels/d; /^count = 6000/d' -e 's|^path = .*|path = "'"$PWD"'/assets/sprout"|' \
    -e 's|^\[prompts\]|&\nfile = "degenerate.jsonl"|' -e 's|^\[eval\]|&\nfile = "held-out.jsonl"|' configs/quickstart.toml > "$out/degenerate.toml"
for seed in ${SEEDS:-0 1 2}; do
    for pool in ${POOLS:-quickstart degenerate}; do
        case $pool in
        quickstart) config=configs/quickstart.toml arms=${ARMS:-uniform informative} more= ;;
        degenerate) config=$out/degenerate.toml arms=${ARMS:-uniform informative band} more="--set learner.groups_per_step=16 --set learner.steps=80" ;;
        esac
        for arm in $arms; do
            freewheel run "$config" --force --set run.dir="\"$out\"" --set run.name="$pool-$arm-$seed" --set run.seed=$seed --set eval.every=5 \
                --set prompts.curriculum.selection="\"$arm\"" $more
            python3 docs/curriculum.py run "$pool" "$arm" "$seed" "$out/$pool-$arm-$seed" >> "$out/arms.jsonl"
        done
    done
done
python3 docs/curriculum.py plot "$out/arms.jsonl" docs/curriculum.svg
