# Settings of the numbered scripts; each can be set from outside, e.g. CONFIG=thesis.
set -euo pipefail
if [ -n "${DATA:-}" ] && [ -e "$DATA" ]; then DATA=$(realpath "$DATA"); fi
if [ -n "${WORK:-}" ]; then mkdir -p "$WORK" && WORK=$(realpath "$WORK"); fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

CONFIG=${CONFIG:-smoke}            # named experiment of configs/
DATA=${DATA:-}                     # folder with CT; phantoms are made if empty
COHORT=${COHORT:-lidc}             # how DATA is laid out: lidc, luna16, nifti, npy or patches
WORK=${WORK:-work}                 # where everything is written
NAME=${NAME:-$CONFIG}              # name of the run
WORKERS=${WORKERS:-$(getconf _NPROCESSORS_ONLN)}  # processes for scans, threads for batches
PHANTOMS=${PHANTOMS:-12}           # how many phantoms are made
NODULES=${NODULES:-4 8}            # fewest and most nodules of a phantom
export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-3} TF_ENABLE_ONEDNN_OPTS=${TF_ENABLE_ONEDNN_OPTS:-1}

if [ -x .venv/bin/python ]; then PATH="$PWD/.venv/bin:$PATH"; fi
if [ -z "$DATA" ]; then DATA="$WORK/phantoms"; fi

# run STEP [ARGUMENT ...]: one numbered script. Its exit code 3, some scans were skipped, is
# kept in `skipped`; any other but 0 ends everything.
skipped=0
run() {
    echo "== $1" >&2
    bash "scripts/$1.sh" "${@:2}" || { code=$?; [ "$code" -eq 3 ] || exit "$code"; skipped=3; }
}
