# Settings of the numbered scripts; each can be set from outside, e.g. CONFIG=thesis.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

CONFIG=${CONFIG:-smoke}            # named experiment of configs/
DATA=${DATA:-}                     # folder with CT; phantoms are made if empty
COHORT=${COHORT:-lidc}             # how DATA is laid out: lidc, luna16 or nifti
WORK=${WORK:-work}                 # where everything is written
NAME=${NAME:-$CONFIG}              # name of the run
WORKERS=${WORKERS:-$(nproc)}       # processes for scans, threads for batches
PHANTOMS=${PHANTOMS:-20}           # how many phantoms are made
export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2} TF_ENABLE_ONEDNN_OPTS=${TF_ENABLE_ONEDNN_OPTS:-1}

if [ -x .venv/bin/python ]; then PATH="$PWD/.venv/bin:$PATH"; fi
if [ -z "$DATA" ]; then DATA="$WORK/phantoms"; fi
