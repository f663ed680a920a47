#!/usr/bin/env bash
# Everything a GPU is needed for, unattended and offline, in at most 9 minutes, the most important first: install,
# GPU tests, cases; every row is on disk as it is made, so that a run that is cut off still tells something. Ends
# with a short table; exits with an error where a test or a case's check failed.
#
#   CROSSAN_FAST_SUITE_DEVICE=cpu      a rehearsal without a GPU
#   CROSSAN_FAST_SUITE_SECONDS=540     for all of it
#   CROSSAN_FAST_SUITE_PYTHON=python3  the interpreter that has torch
#   CROSSAN_FAST_SUITE_OUTPUT=FOLDER   rows and logs (default benchmarks/results)
set -uo pipefail
cd "$(dirname "$0")/.."

device="${CROSSAN_FAST_SUITE_DEVICE:-cuda}"
python="${CROSSAN_FAST_SUITE_PYTHON:-python3}"
total="${CROSSAN_FAST_SUITE_SECONDS:-540}"
output="${CROSSAN_FAST_SUITE_OUTPUT:-benchmarks/results}"
failed=0
mkdir -p "$output"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" # cases are importable even where the install is refused

left() { echo $((total - SECONDS)); }

# part NAME SHARE COMMAND...: run with at most SHARE percent of the whole, and no more than what is left but for
# the twenty seconds that the table needs.
part() {
  local name="$1" limit=$((total * $2 / 100)) room=$(($(left) - 20)) status=0
  shift 2
  [ "$limit" -le "$room" ] || limit="$room"
  if [ "$limit" -lt 2 ]; then
    echo "== $name: no time left"
    return
  fi
  echo "== $name (at most $limit s, $(left) s left)"
  timeout --kill-after=5 "$limit" "$@" || status=$?
  case "$status" in
    0) ;;
    124 | 137) echo "== $name: stopped after $limit s" ;;
    *) echo "== $name: FAILED with status $status"; failed=1 ;;
  esac
}

rows="$("$python" -c "
import torch; from benchmarks import results; print(results.default_path(torch.device('$device')).name)")" || exit 1
rows="$output/$rows"
cases() { # cases NAME SHARE ARGUMENT...
  local name="$1" share="$2"
  shift 2
  part "$name" "$share" "$python" -m benchmarks run "$@" --device "$device" --output "$rows" ${quick[@]+"${quick[@]}"}
}
quick=()
[ "$device" != cpu ] || quick=(--seconds 0.05 --minimum 1 --only eager,cpp)

part "install" 15 "$python" -m pip install -q --no-deps --no-build-isolation -e .
part "GPU tests" 20 "$python" -m pytest -q -m gpu -p no:cacheprovider tests
if [ "$device" = cuda ]; then
  # Ours and eager first: compiling the reference takes most of the time, and may take what is left.
  cases "main cases" 35 --tag paper --only eager,triton,triton-graph,cuda
  cases "compiled reference, 704 items" 15 "item_encoder/N=704,M=4,D=768,L" --only eager,compiled --dtypes bf16
  cases "compiled reference, 20,314 items" 15 "item_encoder/N=20314" --only eager,compiled --dtypes bf16
  cases "recipe, gather" 15 --tag recipe --tag gather --tag evaluation --only eager,triton,cuda,liger,cce
  cases "along the axes" 100 --tag batch --tag modalities --tag width --only eager,triton,triton-graph --dtypes bf16
else
  cases "main cases" 50 "deduplicate"
  cases "along the axes" 100 "fusion/N=704,M=1" --dtypes fp32
fi

echo "== table of $rows"
timeout 20 "$python" -m benchmarks report --short "$rows" || failed=1
echo "== done in $SECONDS s, $([ "$failed" = 0 ] && echo 'nothing failed' || echo 'SOMETHING FAILED')"
exit "$failed"
