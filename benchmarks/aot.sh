#!/usr/bin/env bash
# Compiles every Triton kernel ahead of time (benchmarks/aot.py), by the oldest promised Triton and by the newest on the
# registry, and puts the rows of both in benchmarks/results/aot.csv. Hours on one core; no GPU needed.
#   benchmarks/aot.sh [PYTHON] [OPTION…]     options of `python -m benchmarks.aot`; VERSIONS="3.6.0" for other Tritons
set -uo pipefail
cd "$(dirname "$0")/.."
python="${1:-.venv/bin/python}" status=0

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
for version in ${VERSIONS:-3.6.0 newest}; do
  wanted="triton==$version"
  [ "$version" = newest ] && wanted=triton
  "$python" -m pip install -q --no-deps --target "$work/$version" "$wanted" || exit 1
  PYTHONPATH="$work/$version" TRITON_INTERPRET=0 "$python" -m benchmarks.aot "${@:2}" || status=1
done
exit $status
