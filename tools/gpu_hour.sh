#!/usr/bin/env bash
# All that a GPU can tell, in commands of less than ten minutes each on a machine with one:
#
#   bash tools/gpu_hour.sh 1    build, smoke, all gpu tests
#   bash tools/gpu_hour.sh 2    compute-sanitizer, what the graphs are worth, recurrent layers, benchmarks
#   bash tools/gpu_hour.sh 3    profiles, ncu, memory, repeatability, precision
#   bash tools/gpu_hour.sh 4    a step over 1 to 5,000 tensors, in turns with the older tree in the folder $GPU_HOUR_BEFORE
#
# No network is used. Results of all steps so far are packed after each step into $OUT (default: out/gpu-hour). A step
# ends at its limit, and no step begins after nine minutes. Without a GPU, GPU_HOUR_DEVICE=cpu goes through the same
# motions, shortened.
set -uo pipefail
cd "$(dirname "$0")/.."
STAGE=${1:?stage: expected 1, 2, 3 or 4}
DEVICE=${GPU_HOUR_DEVICE:-cuda}
PYTHON=${PYTHON:-python3}
OUT=${OUT:-out/gpu-hour}
WORKERS=${GPU_HOUR_WORKERS:-6}  # each test process takes about 0.6 GB of the GPU
WORK=$(mktemp -d)
mkdir -p "$OUT"
SUMMARY=$OUT/$STAGE-summary.txt
: > "$SUMMARY"
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD OMP_WAIT_POLICY=passive MPLBACKEND=Agg HVP_TEST_DEVICE=$DEVICE
HVP_ENGINE_CUDA=$([ "$DEVICE" = cuda ] && echo ON || echo AUTO)
export HVP_ENGINE_CUDA
LIMIT=540

say() { echo "[$SECONDS s] $*" | tee -a "$SUMMARY"; }
pack() { tar -C "$WORK" -czf "$OUT/$STAGE-results.tgz" .; }

# step NAME SECONDS LINES COMMAND: never ends the script; the log is packed, its last lines go to the summary.
step() {
  local name=$1 limit=$2 lines=$3 begun=$SECONDS left=$((LIMIT - SECONDS))
  if [ $left -lt 5 ]; then
    say "$name: not begun, no time is left"
    return
  fi
  [ "$limit" -lt $left ] || limit=$left
  timeout -k 10 "$limit" bash -c "$4" > "$WORK/$name.log" 2>&1
  say "$name: exit $? in $((SECONDS - begun)) s (limit $limit)"
  tail -n "$lines" "$WORK/$name.log" | cut -c1-300 | tee -a "$SUMMARY"
  pack
}
on_gpu() { [ "$DEVICE" = cuda ]; }

SMOKE="$PYTHON -m tools.gpu_smoke --device $DEVICE"
TESTS="$PYTHON -m pytest -q -p no:cacheprovider -n $WORKERS"
# Nothing is installed; without an installation the Triton kernels are found by a link.
BUILD="$PYTHON setup.py -q build_ext --inplace && { [ -e hvp_engine/kernels ] || $PYTHON -c 'import hvp_engine.kernels' \
  2> /dev/null || ln -s ../kernels hvp_engine/kernels; } && $PYTHON -m hvp_engine doctor"

case $STAGE in
1)
  on_gpu && step machine 30 12 "nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv; nvcc --version | tail -2;
    $PYTHON -m pip list 2> /dev/null | grep -iE '^(torch|triton|numpy|pytest|pytest-xdist|hypothesis|cmake|ninja|pybind11) '"
  step build 150 25 "$BUILD"
  step smoke 100 60 "$SMOKE"
  # Ops first: what they show decides what the rest means.
  if on_gpu; then
    step ops 110 5 "$TESTS -m 'gpu and not soak' --junitxml=$WORK/ops.xml tests/test_ops.py tests/test_ops_registered.py"
    step rest 240 30 "$TESTS -m 'gpu and not soak' --junitxml=$WORK/rest.xml --ignore tests/test_ops.py --ignore tests/test_ops_registered.py tests"
  else
    step ops 110 5 "$TESTS -k 'cpu-cpp and f32-mixed' tests/test_ops.py"
  fi
  ;;
2)
  ls hvp_engine/_C*.so > /dev/null 2>&1 || step build 150 25 "$BUILD"
  if on_gpu; then
    WATCHED="compute-sanitizer --target-processes all --error-exitcode 99"
    step memcheck 110 6 "PYTORCH_NO_CUDA_MEMORY_CACHING=1 $WATCHED --tool memcheck $SMOKE --only ops"
    step racecheck 80 6 "$WATCHED --tool racecheck $SMOKE --only ops"
    step initcheck 50 6 "$WATCHED --tool initcheck $SMOKE --only ops"
    QUICK="--seconds 0.3 --rounds 5"
    PROBLEMS="mlp lenet resnet44 transformer"
    GRAPHS="lenet resnet20"
    TUNERS="mlp lenet lstm"
  else
    QUICK="--quick --threads 1"
    PROBLEMS=logistic
    GRAPHS=logistic
    TUNERS=logistic
  fi
  BENCH="$PYTHON -m bench.run --device $DEVICE $QUICK --out $WORK/bench"
  for problem in $GRAPHS; do
    step "graphs-$problem" 60 20 "$PYTHON -m tools.gpu_graphs --device $DEVICE --problem $problem --only stopping compiled batched whole"
  done
  for problem in $TUNERS; do
    step "steps-$problem" 60 12 "$PYTHON -m tools.gpu_graphs --device $DEVICE --problem $problem --only steps"
  done
  step recurrent 60 40 "$PYTHON -m tools.gpu_recurrent --device $DEVICE"
  step bench-step 60 30 "$BENCH --benchmarks step"
  for problem in $PROBLEMS; do
    step "bench-$problem" 70 12 "$BENCH --problems $problem --benchmarks update hvp inverse_hvp hypergradient memory"
  done
  ;;
3)
  ls hvp_engine/_C*.so > /dev/null 2>&1 || step build 150 25 "$BUILD"
  PROFILES="lenet:linearized"
  on_gpu && PROFILES="lenet:cudagraph lenet:linearized lenet:eager resnet44:cudagraph resnet44:compiled"
  for pair in $PROFILES; do
    step "profile-${pair/:/-}" 60 40 "$PYTHON -m bench.profile_gpu --device $DEVICE --problem ${pair%:*} --engine ${pair#*:} --terms 10 --out $WORK/profile"
  done
  find "$WORK" -name '*.json' -size +12M -delete  # timelines too large to bring home
  if on_gpu; then
    # Bandwidth and occupancy of the step at 50 million weights; clocks are left alone.
    METRICS=dram__throughput.avg.pct_of_peak_sustained_elapsed,gpu__time_duration.sum,sm__warps_active.avg.pct_of_peak_sustained_active,launch__registers_per_thread
    step ncu 100 25 "ncu --clock-control none --set full --kernel-name regex:step_kernel --launch-skip 6 --launch-count 4 --export $WORK/step $SMOKE --only bandwidth && ncu --import $WORK/step.ncu-rep --page raw --csv --metrics $METRICS"
  fi
  step more 150 30 "$SMOKE --only repeatability memory tf32"
  step precision 60 20 "$PYTHON -m bench.precision --quick --out $WORK/precision.csv"
  ;;
4)
  BEFORE=$(cd "${GPU_HOUR_BEFORE:?expected the folder of an older tree}" && pwd) || exit 2
  ls hvp_engine/_C*.so > /dev/null 2>&1 || step build 150 25 "$BUILD"
  ls "$BEFORE"/hvp_engine/_C*.so > /dev/null 2>&1 || step build-before 150 25 "cd $BEFORE && $BUILD"
  for round in 1 2; do
    for tree in "before $BEFORE" "now $PWD"; do
      # The same measurements of both: this tree's tool with that tree's package.
      step "launches-${tree%% *}-$round" 60 40 "cd ${tree#* } && PYTHONPATH=${tree#* } $PYTHON $PWD/tools/gpu_smoke.py \
        --device $DEVICE --only launches bandwidth"
    done
  done
  ;;
*)
  say "stage: expected 1, 2, 3 or 4; got $STAGE"
  exit 2
  ;;
esac
pack
say "stage $STAGE done: $(ls "$OUT")"
rm -rf "$WORK"
