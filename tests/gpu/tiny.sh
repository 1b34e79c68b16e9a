#!/bin/sh
# The small model on a GPU host: tests/gpu/tiny.sh STEP DATA.npz.xz WORK_DIR
#
#   train      SECONDS_OF_TRAINING (150), then a second seed on a quarter of the tokens
#   sglang     is what SGLang says the same as Transformers in WORK_DIR/reference.npz? (SGLang beside softprune)
#   vllm       is what vLLM says the same?
#
# `python -m tests.gpu.tiny reference CHECKPOINT reference.npz --data DATA.npz.xz --cpu` makes that file on any machine with softprune's dependencies.
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
    python3 -m tests.gpu.tiny "$step" "$work/$step" "$work/$step.json" --checkpoint "$work/a/mxfp4" --reference "$work/reference.npz"
    ;;
*)
    sed -n '2,10s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
