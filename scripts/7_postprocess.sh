#!/usr/bin/env bash
# Thresholds tuned on validation; probability maps -> nodule masks and tables.
source "$(dirname "$0")/env.sh"
python postprocess.py --predictions "$WORK/predictions/$NAME" --scans "$WORK/scans" --run "$WORK/runs/$NAME" --workers "$WORKERS" "$@"
