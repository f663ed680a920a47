#!/usr/bin/env bash
# Everything a GPU is needed for, unattended and offline, in at most 9 minutes, the most important first: install,
# GPU tests, cases; every row is on disk as it is made, so that a run that is cut off still tells something. Ends
# with a short table; exits with an error where a test or a case's check failed. Settings: benchmarks/suite.sh, and
#
#   CROSSAN_FAST_SUITE_DEVICE=cpu      a rehearsal without a GPU
set -uo pipefail
cd "$(dirname "$0")/.."
device="${CROSSAN_FAST_SUITE_DEVICE:-cuda}"
total=540
. benchmarks/suite.sh
[ "$device" != cpu ] || quick=(--seconds 0.05 --minimum 1 --only eager,cpp)
share() { echo $((total * $1 / 100)); } # percent of the whole, in seconds

part "install" "$(share 15)" "$python" -m pip install -q --no-deps --no-build-isolation -e .
part "GPU tests" "$(share 20)" "$python" -m pytest -q -m gpu -p no:cacheprovider tests
if [ "$device" = cuda ]; then
  # Ours and eager first: compiling the reference takes most of the time, and may take what is left.
  cases "main cases" "$(share 35)" --tag paper --only eager,triton,triton-graph,cuda
  cases "compiled reference, 704 items" "$(share 15)" "item_encoder/N=704,M=4,D=768,L" \
    --only eager,compiled --dtypes bf16
  cases "compiled reference, 20,314 items" "$(share 15)" "item_encoder/N=20314" \
    --only eager,compiled --dtypes bf16
  cases "recipe, gather" "$(share 15)" --tag recipe --tag gather --tag cache --tag evaluation \
    --only eager,host,triton,cuda,liger,cce
  cases "along the axes" "$total" --tag batch --tag modalities --tag width \
    --only eager,triton,triton-graph --dtypes bf16
else
  cases "main cases" "$(share 50)" "deduplicate"
  cases "along the axes" "$total" "fusion/N=704,M=1" --dtypes fp32
fi
finish
