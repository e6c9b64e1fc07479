#!/usr/bin/env bash
# Compares predictions with the readers; writes scores with intervals, tables and figures.
source "$(dirname "$0")/env.sh"
if [ -f "$WORK/predictions/$NAME/lungs.json" ]; then
    if [ "$DATA" = "$WORK/phantoms" ]; then set -- --truth "$DATA/truth" "$@"; fi
    python -m experiments.lung_comparison --scans "$WORK/scans" --split "$WORK/split.json" \
        --methods "classical=$WORK/scans" "$NAME=$WORK/predictions/$NAME" \
        --out "$WORK/scores/$NAME" --workers "$WORKERS" "$@"
    exit
fi
if [ "$DATA" = "$WORK/phantoms" ]; then set -- --lung_truth "$DATA/truth" "$@"; fi
python evaluate.py --predictions "$WORK/predictions/$NAME" --scans "$WORK/scans" --out "$WORK/scores/$NAME" --workers "$WORKERS" "$@"
