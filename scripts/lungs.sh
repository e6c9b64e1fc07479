#!/usr/bin/env bash
# Beside the nine steps: lungs of every CT in DATA with their uncertainty, and the nodules in them,
# by the weights that ship.   DATA=/data/scans bash scripts/lungs.sh --n 100
source "$(dirname "$0")/env.sh"
python infer.py --input "$DATA" --result_dir "$WORK/lungs" "$@"
