#!/usr/bin/env bash
# Segments the lungs of every CT in DATA with their uncertainty, and the nodules inside them, with
# the shipped weights; independent of the nine steps.
#   DATA=/data/scans bash scripts/lungs.sh --n 100
source "$(dirname "$0")/env.sh"
python infer.py --input "$DATA" --result_dir "$WORK/lungs" "$@"
