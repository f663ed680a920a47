#!/usr/bin/env bash
# Builds csrc/cuda for sm_80 and sm_90a against the oldest promised torch, as the registry has it for CUDA, links it, and
# loads it: no GPU needed, but nvcc of torch's CUDA and gigabytes of wheels. Says seconds, bytes and what is inside.
#   benchmarks/build_cuda.sh [PYTHON] [FOLDER]     FOLDER: an environment to keep, or one that this command kept
set -euo pipefail
cd "$(dirname "$0")/.."
python="${1:-python3.12}" kept="${2:-}"
torch="$(sed -n 's/^  "torch>=\([0-9.]*\)",$/\1/p' pyproject.toml)"
[ -n "$torch" ] || { echo 'pyproject.toml: no line "torch>=…"' >&2; exit 1; }

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
venv="${kept:-$work/venv}"
if [ ! -x "$venv/bin/python" ]; then
  "$python" -m venv "$venv"
  grep -vE '^(torch|numpy)==' constraints.txt > "$work/constraints.txt"
  # No local version: the registry's wheel is CUDA's.
  "$venv/bin/pip" install -q -c "$work/constraints.txt" "torch==$torch" 'setuptools>=77' -e .
fi
CROSSAN_FAST_BUILD_DIR="$work/built" CROSSAN_FAST_CUDA_ARCH="${CROSSAN_FAST_CUDA_ARCH:-80;90a}" "$venv/bin/python" - << 'EOF'
import platform, re, subprocess
from pathlib import Path
import torch, triton
from crossan_fast import _build

print("python", platform.python_version(), "torch", torch.__version__, "nvcc", _build.nvcc_version(), flush=True)
info = _build.load("cuda")  # builds, links, and loads into this process
ops = [n for n in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA") if n.startswith("crossan_fast_cuda::")]
sources = [path.read_text() for path in Path("csrc/cuda").rglob("*.cpp")]
defined = {name for text in sources for name in re.findall(r'\.def\(\s*"(\w+)\(Tensor', text)}
missing = sorted(defined - {name.partition("::")[2] for name in ops}) if defined else ["what sources define"]
cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"  # not every toolkit has one
# Not --list-elf: before 13 its names of files leave out what sm_90a has after its number.
listed = subprocess.run([cuobjdump, info.library], capture_output=True, text=True, check=True).stdout
targets = sorted(set(re.findall(r"^arch = sm_(\w+)$", listed, re.MULTILINE)))
print(f"{info.seconds:.0f} s, {info.size / 1e6:.1f} MB for {', '.join(f'sm_{t}' for t in targets)}; {len(ops)} ops: {ops}")
if missing or targets != sorted(_build.cuda_architectures()):
    raise SystemExit(f"without {missing}, for {targets} of {_build.cuda_architectures()}")
EOF
