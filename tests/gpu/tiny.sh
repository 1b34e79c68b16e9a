#!/bin/sh
# The small model on a GPU host:
#
#   tests/gpu/tiny.sh train DATA.npz.xz WORK_DIR      SECONDS_OF_TRAINING (150), then a second seed on a quarter of the tokens
#   tests/gpu/tiny.sh sglang REFERENCE.npz WORK_DIR   does SGLang say the same as Transformers in that file? (SGLang beside softprune)
#   tests/gpu/tiny.sh vllm REFERENCE.npz WORK_DIR     does vLLM?
#
# DATA is of `make tiny-data`. REFERENCE is of `python -m tests.gpu.tiny reference bench/tiny/weights REFERENCE.npz`, where softprune's own
# dependencies are: 90 s on 2 cores. CHECKPOINT (bench/tiny/weights) is the one that is compared.
#
# Training begins with tries of a few seconds: the first combination of attention and compilation that works on this host is taken.
# What is to be committed lies in WORK_DIR afterwards: a/mxfp4, a/curve.json, a/training.json, b/training.json, sglang.json, vllm.json.
set -eu
step=$1 data=$2 work=$3
mkdir -p "$work"
train() { python3 -m softprune.bench.tiny.train "$data" "$@"; }

case $step in
train)
    for options in "" "--no-compile" "--attention eager" "--attention eager --no-compile"; do
        rm -rf "$work/try"
        # shellcheck disable=SC2086
        if train "$work/try" --seconds 5 --heldout-blocks 8 $options > "$work/try.log" 2>&1; then break; fi
        echo "does not work here: $options"; tail -n 3 "$work/try.log"
    done
    echo "options: $options"; tail -n 1 "$work/try.log"
    # shellcheck disable=SC2086
    train "$work/a" --seconds "${SECONDS_OF_TRAINING:-150}" $options
    tokens=$(python3 -c "import json; print(json.load(open('$work/a/training.json'))['tokens'] // 4)")
    # shellcheck disable=SC2086
    train "$work/b" --seed 1 --seconds 1e6 --tokens "$tokens" $options
    ;;
sglang | vllm)
    python3 -m tests.gpu.tiny "$step" "$work/$step" "$work/$step.json" --checkpoint "${CHECKPOINT:-bench/tiny/weights}" --reference "$data"
    ;;
*)
    sed -n '2,12s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
