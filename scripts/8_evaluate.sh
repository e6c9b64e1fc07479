#!/usr/bin/env bash
# Predictions + readers -> scores with intervals, tables, figures.
source "$(dirname "$0")/env.sh"
if [ -d "$DATA/truth" ]; then set -- --lung_truth "$DATA/truth" "$@"; fi  # phantoms have it
python evaluate.py --predictions "$WORK/predictions/$NAME" --scans "$WORK/scans" --out "$WORK/scores/$NAME" --workers "$WORKERS" "$@"
