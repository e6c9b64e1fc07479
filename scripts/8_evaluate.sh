#!/usr/bin/env bash
# Predictions + readers -> scores with intervals, tables, figures.
source "$(dirname "$0")/env.sh"
if [ "$DATA" = "$WORK/phantoms" ]; then set -- --lung_truth "$DATA/truth" "$@"; fi
python evaluate.py --predictions "$WORK/predictions/$NAME" --scans "$WORK/scans" --out "$WORK/scores/$NAME" --workers "$WORKERS" "$@"
