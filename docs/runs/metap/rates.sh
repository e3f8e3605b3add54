# Loss after 80 updates by width and learning rate, with and without MetaP, as JSONL: SEEDS=0 bash rates.sh > rates.jsonl
set -e
FREEWHEEL=${FREEWHEEL:-freewheel}
cat > sft.toml <<'T'
[model]
path = "start"
dtype = "f32"
[data]
generator = "arithmetic"
levels = [1, 2]
count = 4000
worked = 1.0
[sft]
steps = 80
batch_size = 32
schedule = "constant"
warmup_steps = 5
weight_decay = 0.0
threads = 1
[output]
dir = "out"
T
for seed in ${SEEDS:-0 1 2}; do
    for width in 64 128 256; do
        for metap in false true; do
            base="" keys=""
            if $metap; then
                base="--metap-base-width 64 --metap-base-layers 2"
                keys="--set sft.metap_base_width=64 --set sft.metap_base_layers=2"
            fi
            rm -rf start
            $FREEWHEEL init-model qwen3_moe --seed $seed --set hidden_size=$width --set num_hidden_layers=2 --set head_dim=16 \
                --set num_attention_heads=$((width / 16)) --set num_key_value_heads=$((width / 16)) --set num_experts=4 \
                --set moe_intermediate_size=$((width / 2)) --set num_experts_per_tok=2 --set tie_word_embeddings=false $base \
                --dtype f32 --out start > log 2>&1
            for rate in 1e-3 2e-3 4e-3 8e-3 1.6e-2 3.2e-2; do
                $FREEWHEEL sft sft.toml --force --set sft.seed=$seed --set sft.learning_rate=$rate $keys > log 2>&1
                python3 - $seed $width $metap $rate <<'P'
import json, sys

seed, width, metap, rate = sys.argv[1:]
lines = [json.loads(line) for line in open("out/metrics.jsonl")]
loss = round(sum(line["train/loss"] for line in lines[-10:]) / 10, 4)
print(json.dumps({"seed": int(seed), "width": int(width), "metap": metap == "true", "rate": float(rate), "loss": loss}))
P
            done
        done
    done
done
rm -rf start out log sft.toml
