#!/usr/bin/env bash
# Everything there is to check on a machine with an NVIDIA GPU, in one go and in some minutes: builds
# the CUDA kernels, runs the GPU tests, runs the small ones again under compute-sanitizer, measures.
#
#     benchmarks/gpu_check.sh [RESULT]
#
# Uses the Python that is active. Missing packages come from the package index, or, without a network,
# from the folder of wheels that FASTHYP_WHEELS names. RESULT (default: benchmarks/results/gpu.json)
# receives all measurements, with the device, its driver, versions and the commit. Exit status: 0 only
# if everything passed.
set -uo pipefail
cd "$(dirname "$0")/.."
result=${1:-benchmarks/results/gpu.json}
measured=$(mktemp -d)
trap 'rm -rf "$measured"' EXIT
failed=()

step() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  echo "== $name"
  timeout "$limit" "$@" || failed+=("$name")
  echo "== $name: $((SECONDS - start)) s"
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

step "info" 30 fasthyp info
step "doctor" 60 fasthyp doctor
step "GPU tests" 150 python -m pytest -m gpu tests
# Small shapes of every kernel; not captured graphs, which the tools do not follow.
small="cuda_steps or cuda_empty or cuda_bad_map or cuda_non_contiguous or cuda_draws or cuda_mmd"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck synccheck; do
    step "compute-sanitizer $tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      --launch-timeout 300 python -m pytest -m gpu -k "$small" -x tests/ops
  done
else
  echo "compute-sanitizer is not on PATH: left out"
fi
for name in coupling_cuda coupling_training_cuda estimator gaussian_fit heatmaps mmd; do
  step "benchmark $name" 90 python "benchmarks/bench_$name.py" --json "$measured/$name.json"
done
step "summary" 30 python benchmarks/gpu_summary.py "$measured" "$result"

if [ ${#failed[@]} -gt 0 ]; then
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
fi
echo "all passed"
