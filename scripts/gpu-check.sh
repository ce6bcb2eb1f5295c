#!/usr/bin/env bash
# Checks and measures a GPU. Needs no network and no compiler: to a machine that has neither, carry scripts/ with
#
#   target/release/forebay, target/release/chaos        what is checked
#   .forebay/bin/nats-server                            for the faults
#   .forebay/cuda/                                      scripts/setup.sh gpu; or name such a folder in FOREBAY_CUDA
#   docs/gpu.md                                         where the findings go
#
#   scripts/gpu-check.sh [OPTION…]                      options of `forebay gpu-check`, such as --shapes 0.6b; GPU=1 takes another
#
# Without a GPU it says SKIPPED and why, and ends with 0.
set -euo pipefail
cd "$(dirname "$0")/.."

forebay=target/release/forebay
[ -x $forebay ] || { echo "gpu-check: $forebay is missing: cargo build --release --workspace" >&2; exit 1; }
found=$(mktemp)
trap 'rm -f "$found"' EXIT
$forebay gpu-check --gpu "${GPU:-0}" --report docs/gpu.md "$@" | tee "$found"
if grep -q ^SKIPPED "$found"; then exit 0; fi

# Workers that run the model on the GPU are killed, frozen and cut off under load.
if [ -x target/release/chaos ]; then
    target/release/chaos --engine onnx --device "cuda:${GPU:-0}" --faults "${FAULTS:-30}"
else
    echo "SKIPPED: faults on the GPU: target/release/chaos is missing"
fi

# The same weights in transformers, where that is installed: with a static cache, and compiled.
models=("${FOREBAY_DATA:-$HOME/.local/share/forebay}"/bench/qwen3-*-random)
if ! python3 -c 'import torch, transformers; assert torch.cuda.is_available()' 2>/dev/null; then
    echo "SKIPPED: transformers: torch with CUDA and transformers are not installed"
elif [ ! -d "${models[0]}" ]; then
    echo "SKIPPED: transformers: no model was measured"
else
    CUDA_VISIBLE_DEVICES=${GPU:-0} python3 scripts/gpu/transformers_decode.py "${models[@]}"
fi
