# Codistillation under each rule for the weight of soft targets: a student and a larger teacher, both from random weights, learn the
# same examples at once. FREEWHEEL names the binary, SEEDS the seeds of start and order; writes NAME-SEED.jsonl and the plots here.
set -e
FREEWHEEL=${FREEWHEEL:-freewheel}
init() {
    $FREEWHEEL init-model llama --seed $5 --set hidden_size=$2 --set num_hidden_layers=$3 --set num_attention_heads=$4 \
        --set num_key_value_heads=$4 --set head_dim=$(($2 / $4)) --set intermediate_size=$(($2 * 2)) --dtype f32 --out $1
}
cat > codistillation.toml <<'T2'
[model]
path = "student"
[teacher]
path = "teacher"
train = true
output = "teacher-out"
[data]
generator = "arithmetic"
levels = [1, 2, 3]
count = 12000
worked = 1.0
[distill]
steps = 240
batch_size = 32
learning_rate = 3e-3
warmup_steps = 10
threads = 1
[output]
dir = "out"
T2
arm() {
    name=$1-$2
    $FREEWHEEL distill codistillation.toml --force --set distill.seed=$2 --set distill.weighting=$3
    cp out/metrics.jsonl $name.jsonl
}
for seed in ${SEEDS:-0 1 2}; do
    rm -rf student teacher
    init student 48 2 2 $seed
    init teacher 128 4 4 $seed
    arm falling $seed schedule
    arm progress $seed progress
    arm confidence $seed confidence
done
plot() {
    out=$1 title=$2 y=$3
    shift 3
    python3 ../lines.py $out.svg --title "$title" --x step --y $y --smooth 9 falling=falling-*.jsonl \
        progress=progress-*.jsonl confidence=confidence-*.jsonl "$@"
}
plot weights "weight of soft targets" distill/weight
plot losses "loss on what is written, nats a token" distill/hard_loss teacher=falling-*.jsonl@distill/teacher_loss
