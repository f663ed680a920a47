# What gpu_suite.sh and cpu_suite.sh share, sourced by them after they set `device` and `total` (seconds):
# parts under a timeout, the most important first, every row on disk as it is made, a table at the end.
#
#   CROSSAN_FAST_SUITE_SECONDS=N       for all of it
#   CROSSAN_FAST_SUITE_PYTHON=python3  the interpreter that has torch
#   CROSSAN_FAST_SUITE_OUTPUT=FOLDER   rows and logs (default $OUT, or benchmarks/results)
python="${CROSSAN_FAST_SUITE_PYTHON:-python3}"
total="${CROSSAN_FAST_SUITE_SECONDS:-$total}"
output="${CROSSAN_FAST_SUITE_OUTPUT:-${OUT:-benchmarks/results}}"
failed=0
cut=()    # parts that lack rows, though nothing failed
tables=() # files of rows that something was measured for
quick=()
mkdir -p "$output"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" # cases are importable even where the install is refused

left() { echo $((total - SECONDS)); }

# part NAME SECONDS COMMAND...: run with at most SECONDS, and no more than what is left but for the twenty
# seconds that the table needs.
part() {
  local name="$1" limit="$2" room=$(($(left) - 20)) status=0 began="$SECONDS"
  shift 2
  [ "$limit" -le "$room" ] || limit="$room"
  if [ "$limit" -lt 2 ]; then
    echo "== $name: no time left"
    cut+=("$name")
    return
  fi
  echo "== $name (at most $limit s, $(left) s left)"
  timeout --kill-after=5 "$limit" "$@" || status=$?
  case "$status" in
    0) echo "== $name: $((SECONDS - began)) s" ;;
    124 | 137) echo "== $name: stopped after $limit s"; cut+=("$name") ;;
    *) echo "== $name: FAILED with status $status"; failed=1 ;;
  esac
}

rows="$("$python" -c "
import torch; from benchmarks import results; print(results.default_path(torch.device('$device')).name)")" || exit 1
rows="$output/$rows"
cases() { # cases NAME SECONDS ARGUMENT...
  local name="$1" limit="$2"
  shift 2
  [[ " ${tables[*]-} " == *" $rows "* ]] || tables+=("$rows")
  part "$name" "$limit" "$python" -m benchmarks run "$@" --device "$device" --output "$rows" \
    ${quick[@]+"${quick[@]}"}
}

finish() {
  local table part
  for table in ${tables[@]+"${tables[@]}"}; do
    echo "== table of $table"
    timeout 20 "$python" -m benchmarks report --short "$table" ||
      { echo "== table: FAILED with status $?"; failed=1; }
  done
  for part in ${cut[@]+"${cut[@]}"}; do echo "== not to its end: $part"; done
  echo "== done in $SECONDS s, $([ "$failed" = 0 ] && echo 'nothing failed' || echo 'SOMETHING FAILED')"
  exit "$failed"
}
