#!/usr/bin/env bash
# Predictions + readers -> scores with intervals, tables, figures.
source "$(dirname "$0")/env.sh"
python evaluate.py --predictions "$WORK/predictions/$NAME" --scans "$WORK/scans" --out "$WORK/scores/$NAME" "$@"
