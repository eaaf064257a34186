#!/usr/bin/env bash
# Reproduce the paper's 125M text run, from raw files to a GSM8K score: docs/tutorials/tinygsm.md.
#
#   slurm/tinygsm.sh TINYGSM GSM8K_TEST TOKENIZER [options of tools/submit.py, such as --nodes 1 --dry-run]
#
# TINYGSM and GSM8K_TEST are jsonl or parquet files, TOKENIZER is Qwen2's tokenizer.json. Prepared data goes to data/,
# or to the folder DATA, and is reused.
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "error: give TinyGSM's file, GSM8K's test file and a tokenizer.json; see the comment at the top of $0." >&2
    exit 2
fi
raw=$1 benchmark=$2 tokenizer=$3
shift 3
code=$(cd "$(dirname "$0")/.." && pwd)
data=${DATA:-data}
[ -d "$data/qwen2_tokenizer" ] ||
    python "$code/tools/train_tokenizer.py" --import-json "$tokenizer" --output "$data/qwen2_tokenizer"
[ -e "$data/tinygsm/counts.json" ] ||
    python "$code/tools/prepare_tinygsm.py" --input "$raw" --benchmark "$benchmark" --output "$data/tinygsm"
exec python "$code/tools/submit.py" --config "$code/configs/tinygsm_125m.yaml" \
    --corpus "--input '$data/tinygsm/train.jsonl' --prompt-key prompt --answer-key answer" \
    --evaluate "--task gsm8k-program --data '$benchmark' --tokens-per-step 2" \
    --set "data.tokenizer=$data/qwen2_tokenizer" "data.prefixes=[$data/tinygsm]" "$@"
