# Prompts, texts, a student, both arms, held-out losses. FREEWHEEL names the binary; models/smollm2 is the teacher.
set -e
export FREEWHEEL=${FREEWHEEL:-freewheel}
python3 prompts.py
$FREEWHEEL generate --model models/smollm2 --temperature 1 --top-p 0.9 --max-new-tokens 32 --samples 64 --seed 1 --input prompts.jsonl -o texts.jsonl
python3 split.py
$FREEWHEEL init-model llama --tokenizer models/smollm2 --dtype f32 --seed 1 --set hidden_size=128 --set num_hidden_layers=2 \
    --set num_attention_heads=4 --set num_key_value_heads=4 --set head_dim=32 --set intermediate_size=256 --set tie_word_embeddings=true --out student
$FREEWHEEL sft sft.toml --set sft.seed=1
$FREEWHEEL distill distill.toml --set distill.seed=1
python3 heldout.py student student-sft student-distilled
