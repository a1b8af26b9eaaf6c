#!/usr/bin/env bash
# Everything there is to check on a machine with an NVIDIA GPU, in one go: builds the CUDA kernels,
# runs the GPU tests, runs them again under compute-sanitizer, and measures.
#
#     benchmarks/gpu_check.sh [RESULTS_DIR]
#
# Uses the Python that is active. Missing packages come from the package index, or, without a network,
# from the folder of wheels that FASTHYP_WHEELS names. RESULTS_DIR (default: benchmarks/results)
# receives gpu_*.json. Exit status: 0 only if everything passed.
set -uo pipefail
cd "$(dirname "$0")/.."
results=${1:-benchmarks/results}
mkdir -p "$results"
failed=()

step() {
  local name=$1
  shift
  echo "== $name"
  "$@" || failed+=("$name")
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv || exit 2
index=()
[ -n "${FASTHYP_WHEELS:-}" ] && index=(--no-index --find-links "$FASTHYP_WHEELS")
packages=(scikit-build-core pybind11 cmake ninja FrEIA==0.2 safetensors typer rich matplotlib pytest hypothesis scipy)
python -m pip install --quiet "${index[@]}" "${packages[@]}" || exit 2

# Only this machine's architecture: the check is about the kernels, not about the fat binary.
arch=$(python -c 'import torch; print("%d%d-real" % torch.cuda.get_device_capability())') || exit 2
export FASTHYP_CUDA=1 FASTHYP_CUDA_ARCHS=${FASTHYP_CUDA_ARCHS:-$arch}
python -m pip install --quiet --no-deps --no-build-isolation . || exit 2

step "info" fasthyp info
step "doctor" fasthyp doctor
step "GPU tests" python -m pytest -m gpu tests
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck synccheck; do
    # The tests that compare kernels; not those that capture graphs, which the tools do not follow.
    step "compute-sanitizer $tool" compute-sanitizer --tool "$tool" --error-exitcode 1 --launch-timeout 300 \
      python -m pytest -m gpu -k "not graph" -x tests/ops
  done
else
  echo "compute-sanitizer is not on PATH: left out"
fi
step "benchmark coupling" python benchmarks/bench_coupling_cuda.py --json "$results/gpu_coupling.json"
step "benchmark gaussian_fit" python benchmarks/bench_gaussian_fit.py --json "$results/gpu_gaussian_fit.json"
step "benchmark heatmaps" python benchmarks/bench_heatmaps.py --json "$results/gpu_heatmaps.json"

if [ ${#failed[@]} -gt 0 ]; then
  echo "FAILED: ${failed[*]}"
  exit 1
fi
echo "all passed"
