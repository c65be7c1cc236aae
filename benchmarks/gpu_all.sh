#!/usr/bin/env bash
# Measure everything that needs one GPU, in calls of ten minutes, without a network.
#
#     benchmarks/gpu_all.sh            start it again while its exit code is 75
#     benchmarks/gpu_all.sh --smoke    tiny sizes on the CPU of any machine
#
# The parts are ordered by value. A part that has its CSV is not repeated, and an interrupted one
# continues. The exit code is 0 if all parts are done, 75 if parts are left for another call, and 1
# if a part failed, a check exceeds its limit, or a published result is missed, in this call or an
# earlier one.
#
# Variables, with their defaults:
#   OUT=results/gpu   the CSV files, and state.tar with all that is worth keeping
#   WORK=runs/gpu     checkpoints, compiled programs and data; keep it between calls if you can
#   STATE=            a state.tar of an earlier call: its parts are not repeated on a bare machine
#   WHEELS=           a folder of wheels, from which two virtual environments are made: one for JAX
#                     and one for timm, since both bring libraries of NVIDIA
#   PYTHON=python     the Python to use, or to make the environments with
#   TIMM_PYTHON=      the Python that has torch and timm, if it is another
#   CIFAR10=          a folder, or a tar file, with train/CLASS and test/CLASS
#   CIFAR100=         the same. Without them, TFDS's copies in TFDS_DATA_DIR are used
#   FASHION_MNIST=    a folder with its IDX files, by default that of Debian's dataset-fashion-mnist
#   PHOTOS=           a folder with train/CLASS and val/CLASS, for the input and the miniatures
#   TOTAL=570         seconds of this call
#   PART=480          seconds of a part, at most
set -euo pipefail
cd "$(dirname "$0")/.."
name=gpu
if [[ ${1-} == --smoke ]]; then name=gpu-smoke; fi
OUT=${OUT:-results/$name} WORK=${WORK:-runs/$name} TOTAL=${TOTAL:-570} PART=${PART:-480}
PYTHON=${PYTHON:-python}
smoke=() least=60
if [[ ${1-} == --smoke ]]; then
  smoke=(--smoke) least=1
  export JAX_PLATFORMS=cpu
fi
state=$WORK/state
mkdir -p "$OUT" "$state" "$WORK/reproduce"
if [[ -n ${STATE-} ]]; then tar -xf "$STATE" -C "$state" --skip-old-files; fi
if [[ -d $state/reproduce ]]; then cp -rn "$state/reproduce/." "$WORK/reproduce/"; fi
work=$(realpath "$WORK")
# Make $work/$1 from the wheels of the other arguments, once.
environment() {
  [[ ! -e $work/$1/complete ]] || return 0
  "$PYTHON" -m venv --clear "$work/$1"
  "$work/$1/bin/pip" install --quiet --no-index --find-links "$WHEELS" "${@:2}"
  touch "$work/$1/complete"
}
if [[ -n ${WHEELS-} ]]; then
  environment jax -r requirements.txt 'jax[cuda13]'
  environment timm torch timm
  PYTHON=$work/jax/bin/python
  export TIMM_PYTHON=$work/timm/bin/python
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$work/compiled}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$work/inductor}

# Let the folder or tar file $2 appear as $WORK/$1, whose name does not depend on the machine.
place() {
  [[ -n $2 && ! -e $WORK/$1 ]] || return 0
  if [[ -d $2 ]]; then ln -s "$(realpath "$2")" "$WORK/$1"; return; fi
  mkdir "$WORK/$1.part"
  tar -xf "$2" -C "$WORK/$1.part"
  mv "$WORK/$1.part" "$WORK/$1"
}
rm -rf "$WORK"/*.part
place cifar10 "${CIFAR10-}"
place cifar100 "${CIFAR100-}"
if [[ -e $WORK/cifar10 ]]; then export VIT_JAX_CIFAR10=folder:$WORK/cifar10; fi
if [[ -e $WORK/cifar100 ]]; then export VIT_JAX_CIFAR100=folder:$WORK/cifar100; fi

# Copy what is worth keeping to $OUT: a CSV file of each kind of part, and everything as a tar file.
keep() {
  local file kind
  (cd "$WORK" && find reproduce -name result.json -exec cp --parents {} state/ \;)
  for kind in correctness step memory input reproduced mini; do
    file=$(find "$state" -maxdepth 1 -name "$kind*.csv" | sort)
    # shellcheck disable=SC2086  # One argument for each file; their names have no spaces.
    if [[ -n $file ]]; then awk 'FNR > 1 || NR == 1' $file >"$OUT/$kind.csv"; fi
  done
  tar -cf "$OUT/.state.tar" -C "$state" . && mv "$OUT/.state.tar" "$OUT/state.tar"
}

is_done() { # FILE, or FILE:NAME for a row of a file
  case $1 in
    *:*) grep -qs "^${1#*:}," "$state/${1%%:*}" ;;
    *) [[ -s $state/$1 ]] ;;
  esac
}

left=() failed=() number=0
# Run a part: its name, the CSV that it writes in $state at its end, and its command. If it writes the
# CSV piece by piece, NAME.done in place of the CSV says that it has ended.
part() {
  local name=$1 csv=$2 limit=$((TOTAL - SECONDS)) code=0
  shift 2
  number=$((number + 1))
  if is_done "$csv"; then
    echo "== $number $name: done before"
    if grep -Fqsx -- "$name" "$state/missed"; then failed+=("$name"); fi
    return
  fi
  if ((limit < least)); then echo "== $number $name: left for the next call"; left+=("$name"); return; fi
  if ((limit > PART)); then limit=$PART; fi
  echo "== $number $name: at most $limit s, after $SECONDS s"
  timeout --kill-after=15 "$limit" "$PYTHON" "$@" || code=$?
  if [[ $csv == *.done ]] && ((!code)); then echo "$name" >"$state/$csv"; fi
  # A part that is done is not repeated, so later calls must know that it missed its result.
  if is_done "$csv" && ((code)); then echo "$name" >>"$state/missed"; fi
  keep
  if is_done "$csv"; then
    if ((code)); then failed+=("$name"); fi
  elif ((code == 124 || code == 137)); then
    echo "== $number $name: interrupted; the next call continues it"
    left+=("$name")
  else
    echo "== $number $name: failed with exit code $code"
    failed+=("$name")
  fi
}

step() { # MODEL
  part "step of $1" "step_${1/\//}.csv" benchmarks/gpu.py --csv "$state/step_${1/\//}.csv" "${smoke[@]}" "$1"
}
reproduce() { # NAME
  part "$1" "reproduced.csv:$1" benchmarks/gpu_reproduce.py "$1" \
    --root "$WORK/reproduce" --out "$state" "${smoke[@]}"
}
fashion_mnist=${FASHION_MNIST:-/usr/share/datasets/fashion-mnist}
mini() { # EXPERIMENT TABLE
  local options=("--fashion_mnist=idx:$fashion_mnist")
  if ((${#smoke[@]})); then
    options=(--effort=0.002 --seeds=1 --runs=1 --cifar10=builtin:digits)
  elif [[ -n ${VIT_JAX_CIFAR10-} ]]; then
    options+=("--cifar10=$VIT_JAX_CIFAR10")
  fi
  if [[ -n ${PHOTOS-} ]]; then options+=("--photos=folder:$PHOTOS"); fi
  part "miniature $1" "mini_$1.done" -m vit_jax tables "$2" --scale=mini \
    --root "$WORK/mini" --out "$state" "${options[@]}"
}
measure_input() { # MODEL…
  part input input.csv benchmarks/gpu_input.py --csv "$state/input.csv" "${smoke[@]}" \
    ${PHOTOS:+--photos="$PHOTOS"} "$@"
}

part correctness correctness.csv benchmarks/gpu_correctness.py \
  --csv "$state/correctness.csv" "${smoke[@]}"
if ((${#smoke[@]})); then
  step Ti/16
  measure_input
  part memory memory.csv benchmarks/gpu_memory.py --csv "$state/memory.csv" --smoke
  reproduce cifar10-94-fast
  mini positions 8
else
  step B/16
  step L/16
  has_cifar10=${VIT_JAX_CIFAR10-}${TFDS_DATA_DIR-} has_cifar100=${VIT_JAX_CIFAR100-}${TFDS_DATA_DIR-}
  if [[ -n $has_cifar10 ]]; then reproduce vit-lite-cifar10; fi
  step S/16
  measure_input
  part memory memory.csv benchmarks/gpu_memory.py --csv "$state/memory.csv"
  step H/14
  if [[ -n $has_cifar10 ]]; then
    for name in kentaroy-cifar10-500 kentaroy-cifar10-1000 vit-cifar-cifar10 spt-lsa-vit-cifar10 scratch-vit-cifar10 cifar10-94-fast; do
      reproduce "$name"
    done
  else
    echo '== neither CIFAR10 nor TFDS_DATA_DIR is set: results on CIFAR-10 are left out'
  fi
  if [[ -n $has_cifar100 ]]; then reproduce vit-lite-cifar100; fi
  if [[ -n $has_cifar10 && -d $fashion_mnist ]]; then
    mini positions 8
    mini data_size fig4
    mini scaling fig5
    mini optimizers 7
    mini pooling fig9
    mini masked_patches selfsupervision
    mini transfer 2
  else
    echo "== CIFAR-10 or $fashion_mnist is missing: the miniatures are left out"
  fi
fi

keep
if grep -qs ',FAIL,' "$state/correctness.csv"; then failed+=('correctness: see its CSV'); fi
echo "== $OUT: $(cd "$OUT" && echo *.csv)"
if ((${#failed[@]})); then printf '== failed, or over a limit: %s\n' "${failed[@]}"; fi
if ((${#left[@]})); then printf '== left for the next call: %s\n' "${left[@]}"; exit 75; fi
if ((${#failed[@]})); then exit 1; fi
echo '== all parts are done'
