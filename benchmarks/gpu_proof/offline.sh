#!/usr/bin/env bash
# Run the proof on a machine without network, in the project's folder with the .gpu that prepare.py filled:
#   bash benchmarks/gpu_proof/offline.sh [--only PART ...]
# Nothing is installed: wheels are unpacked into a temporary folder. report.md, proof.json and logs.tar.gz go to
# $OUT, or to runs/gpu_proof.
set -euo pipefail
cd "$(dirname "$0")/../.."
prepared=${PREPARED:-.gpu}
if [ ! -d "$prepared/wheels" ]; then
    echo "error: $prepared/wheels does not exist: python -m benchmarks.gpu_proof.prepare fills it elsewhere." >&2
    exit 2
fi
out=${OUT:-runs/gpu_proof}
mkdir -p "$out"
scratch=$(mktemp -d)
mkdir "$scratch/site" "$scratch/logs"
trap 'tar czf "$out/logs.tar.gz" -C "$scratch" logs; rm -rf "$scratch"' EXIT
for wheel in "$prepared"/wheels/*.whl; do
    python3 -m zipfile -e "$wheel" "$scratch/site"
done
export PYTHONPATH="$PWD:$scratch/site${PYTHONPATH:+:$PYTHONPATH}"
python3 -m benchmarks.gpu_proof --output "$out" --logs "$scratch/logs" "$@"
