# Settings of the numbered scripts; environment variables override them, e.g. CONFIG=thesis.
set -euo pipefail
if [ -n "${DATA:-}" ] && [ -e "$DATA" ]; then DATA=$(realpath "$DATA"); fi
if [ -n "${WORK:-}" ]; then mkdir -p "$WORK" && WORK=$(realpath "$WORK"); fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

CONFIG=${CONFIG:-smoke}            # experiment name in configs/
DATA=${DATA:-}                     # folder with CT; if empty, phantoms are made
COHORT=${COHORT:-lidc}             # layout of DATA: lidc, luna16, nifti, npy or patches
WORK=${WORK:-work}                 # folder of all output
NAME=${NAME:-$CONFIG}              # name of the run
WORKERS=${WORKERS:-$(getconf _NPROCESSORS_ONLN)}  # processes for scans, threads for batches
PHANTOMS=${PHANTOMS:-12}           # number of phantoms
NODULES=${NODULES:-4 8}            # smallest and largest number of nodules per phantom
export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-3} TF_ENABLE_ONEDNN_OPTS=${TF_ENABLE_ONEDNN_OPTS:-1}

if [ -x .venv/bin/python ]; then PATH="$PWD/.venv/bin:$PATH"; fi
if [ -z "$DATA" ]; then DATA="$WORK/phantoms"; fi

# run STEP [ARGUMENT ...] runs one numbered script. It stores exit code 3 (some scans were
# skipped) in `skipped`; any other code except 0 ends the whole run.
skipped=0
run() {
    echo "== $1" >&2
    bash "scripts/$1.sh" "${@:2}" || { code=$?; [ "$code" -eq 3 ] || exit "$code"; skipped=3; }
}
