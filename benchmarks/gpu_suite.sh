#!/usr/bin/env bash
# What a GPU is needed for, unattended and offline, in four calls of at most 9 minutes each:
#
#   benchmarks/gpu_suite.sh smoke     is it right: every backend against float64, a captured step, the demo, GPU tests
#   benchmarks/gpu_suite.sh bf16      is it fast: steps, side network and item encoder, losses, an epoch
#   benchmarks/gpu_suite.sh fp32      torch.compile and peers beside it, fp32, the axes
#   benchmarks/gpu_suite.sh profiles  counters of the heaviest kernels, sanitizers, autotuning
#
# Without a name: smoke, then bf16 as far as the time goes. Every row is on disk as it is made, and the log is, so
# that a call that is cut off still tells something; a part that fails fails the call and stops no other. Rows,
# log and whatever else a call makes lie in $OUT where that is set. Settings: benchmarks/suite.sh, and
#
#   CROSSAN_FAST_SUITE_DEVICE=cpu           a rehearsal without a GPU, at small sizes
#   CROSSAN_FAST_SUITE_TRITON_CACHE=FOLDER  kernels compiled elsewhere (default .triton-cache, where there is one):
#                                           `python -m benchmarks.triton_cache fill FOLDER` makes it
set -uo pipefail
cd "$(dirname "$0")/.."
device="${CROSSAN_FAST_SUITE_DEVICE:-cuda}"
calls=("$@")
[ $# -gt 0 ] || calls=(smoke bf16)
for call in "${calls[@]}"; do
  case "$call" in
    smoke | bf16 | fp32 | profiles) ;;
    *) echo "$0: expected calls out of smoke, bf16, fp32, profiles; got $call" >&2; exit 2 ;;
  esac
done
total=540
. benchmarks/suite.sh
share() { echo $((total * $1 / 100)); } # percent of a call's time, in seconds
ours=triton-graph,cuda-graph,auto-graph
if [ "$device" = cpu ]; then
  quick=(--seconds 0.05 --minimum 1)
  ours=cpp
fi
paper="M=4,D=768" many=20314 loss_rows=10240
[ "$device" != cpu ] || { paper="M=2,D=384" many=704 loss_rows=640; }
importable() { "$python" -c "import crossan_fast.kernels" 2>/dev/null; }
# Every machine starts bare. An install that is refused is done without.
prepare() {
  importable || part "install" 40 "$python" -m pip install -q --no-deps --no-build-isolation -e .
  if ! importable; then
    failed=0
    export PYTHONPATH="$PWD/benchmarks/unpacked:$PYTHONPATH"
  fi
  part "build" 120 "$python" -c "
import sys; from crossan_fast import _build
sys.exit(_build.problem('$device'))"
  local carried="${CROSSAN_FAST_SUITE_TRITON_CACHE:-.triton-cache}"
  if [ -d "$carried" ]; then
    part "carried Triton cache" 20 "$python" -m benchmarks.triton_cache use "$carried"
    TRITON_CACHE_DIR="$(cd "$carried" && pwd)"
    export TRITON_CACHE_DIR
  fi
}

smoke() {
  local total=$((total < 240 ? total : 240)) # the first call, and bf16 may follow it
  part "against float64" 60 "$python" -m benchmarks check "side_network_missing/" --device "$device" --dtypes bf16 \
    --only "${ours/triton-graph,cuda-graph/triton,cuda}"
  part "a captured step" 60 "$python" -m benchmarks check "step/B=64,M=2,D=384,loss=in_batch" --device "$device" \
    --dtypes bf16 --only "$ours"
  part "demo" 60 "$python" -m crossan_fast demo --epochs 1 --out "$scratch/demo"
  if [ "$device" = cpu ]; then
    tests "kernel tests" 60 tests/kernels/test_full_loss.py -k "by_hand or no_row"
  else
    tests "GPU tests" 120 -m gpu tests/ops/cuda/test_gpu.py tests/training/test_graph_on_gpu.py tests/cache
    tests "kernel tests" 120 -m gpu tests/kernels
  fi
}
tests() { # tests NAME SECONDS ARGUMENT...: side by side; one file that can't be collected stops no other
  local name="$1" limit="$2" workers=8
  shift 2
  [ "$device" != cpu ] || workers=0
  part "$name" "$limit" "$python" -m pytest -q -p no:cacheprovider -n "$workers" --continue-on-collection-errors \
    --tb short "$@"
}

bf16() {
  cases "step, B = 64" "$(share 20)" "step/B=64,$paper,loss=in_batch" --dtypes bf16 --only "eager,$ours"
  for op in side_network item_encoder; do
    cases "$op, 704 items" "$(share 12)" "$op/N=704,$paper,L" --dtypes bf16 --only "eager,$ours"
    cases "$op, $many items" "$(share 20)" "$op/N=$many,$paper,L" --dtypes bf16 --only "eager,$ours"
  done
  cases "in-batch loss" "$(share 12)" "in_batch_loss/rows=$loss_rows," --dtypes bf16 --only "eager,triton,$ours"
  cases "full softmax" "$(share 12)" "full_loss/rows=640," --dtypes bf16 --only "eager,triton,$ours"
  if [ "$device" = cuda ]; then
    # Memory is that of the plain call: a graph's pool can't be seen from outside.
    cases "step, B = 1,024" "$(share 20)" "step/B=1024,$paper" --dtypes bf16 --only "eager,triton,$ours"
    cases "epoch" "$(share 15)" "epoch/data=synthetic" --dtypes bf16 --only "$ours"
    cases "full softmax's step" "$(share 12)" "step/B=64,$paper,loss=full" --dtypes bf16 --only "$ours"
    part "a backend each pass" 20 "$python" -m benchmarks choose "$rows"
    [ ! -e crossan_fast/ops/gpu_passes.json ] || cp crossan_fast/ops/gpu_passes.json "$output"
  fi
}

fp32() {
  if [ "$device" = cuda ]; then
    cases "compiled reference, 704 items" "$(share 20)" "item_encoder/N=704,$paper,L" --dtypes bf16 \
      --only eager,compiled,triton-graph,auto-graph
    cases "compiled reference, 20,314 items" "$(share 20)" "item_encoder/N=20314" --dtypes bf16 \
      --only eager,compiled,triton-graph,auto-graph
    cases "peers" "$(share 12)" "full_loss/rows=10240," --dtypes bf16 --only eager,liger,cce,triton,triton-graph
  fi
  cases "fp32, step" "$(share 12)" "step/B=64,$paper,loss=in_batch" --dtypes fp32 --only "eager,$ours"
  cases "fp32, item encoder" "$(share 12)" "item_encoder/N=704,$paper,L" --dtypes fp32 --only "eager,$ours"
  [ "$device" = cuda ] || return 0
  cases "gather, recipe, evaluation" "$(share 20)" --tag gather --tag recipe --tag evaluation --tag missing \
    --dtypes bf16 --only "eager,host,triton,$ours"
  cases "along the axes" "$total" --tag batch --tag modalities --tag width --dtypes bf16 \
    --only eager,triton,triton-graph
}

profiles() {
  local call=("$python" -m benchmarks check --device "$device" --dtypes bf16 --calls 2)
  local kernels="regex:down_gradient_kernel|fused_kernel|grad_walk_kernel|weight_gradient|walk_kernel|hopper_kernel"
  if command -v ncu >/dev/null && [ "$device" = cuda ]; then
    for backend in triton cuda; do
      part "ncu, $backend" "$(share 15)" ncu --clock-control none --set basic --kernel-name "$kernels" \
        --launch-count 12 --log-file "$output/ncu.$backend.txt" \
        "${call[@]}" "side_network/N=704,$paper,L" --only "$backend"
    done
  else
    echo "== ncu: not here"
  fi
  if command -v compute-sanitizer >/dev/null && [ "$device" = cuda ]; then
    for tool in memcheck racecheck; do
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 part "$tool, csrc/cuda" "$(share 15)" compute-sanitizer --tool "$tool" \
        --error-exitcode 9 --log-file "$output/$tool.cuda.txt" \
        "$python" -m pytest -q -p no:cacheprovider tests/ops/cuda/test_gpu.py -k "test_side_network and 33-128"
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 part "$tool, Triton" "$(share 12)" compute-sanitizer --tool "$tool" \
        --error-exitcode 9 --log-file "$output/$tool.triton.txt" \
        "$python" -m pytest -q -p no:cacheprovider tests/kernels/test_side_network.py -k "float64 and backbone"
    done
  else
    echo "== compute-sanitizer: not here"
  fi
  export CROSSAN_FAST_AUTOTUNE=1 CROSSAN_FAST_AUTOTUNE_FILE="$output/autotune.json"
  local untuned="$rows"
  rows="$output/tuned.csv" # beside the others: they are not what runs by default
  for pattern in "item_encoder/N=704,$paper,L" "item_encoder/N=$many,$paper,L" "in_batch_loss/rows=$loss_rows,"; do
    cases "autotuned $pattern" "$(share 15)" "$pattern" --dtypes bf16 --only "${ours%%,*}"
  done
  rows="$untuned"
  unset CROSSAN_FAST_AUTOTUNE CROSSAN_FAST_AUTOTUNE_FILE
}

log="$output/gpu_suite.$(IFS=-; echo "${calls[*]}").log"
exec > >(tee "$log") 2>&1
logged=$!
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"; exec >&- 2>&-; wait "$logged"' EXIT
prepare
for call in "${calls[@]}"; do
  echo "=== $call, $(left) s left"
  "$call"
done
finish
