#!/bin/sh
# The proof on a GPU host: tests/gpu/run.sh ENGINE [WORK_DIR] [OUT.json]
#
# ENGINE is sglang or vllm, installed beside softprune; one GPU with 80 GB (PARALLEL=3) or 140 GB (PARALLEL=5), 45 GB of disk.
# A run takes at most SECONDS_LEFT (560) and goes on where the last one stopped; run it again until it says that no rows are left.
# Afterwards, `python -m tests.gpu.figures ENGINE OUT.json` puts the results and the headline figures under bench/results.
set -eu
engine=$1 work=${2:-.cache/gpu} out=${3:-$work/$1.json}
mkdir -p "$work"
exec python3 -m tests.gpu.prove "$engine" "$work" "$out" --seconds "${SECONDS_LEFT:-560}" --parallel "${PARALLEL:-5}"
