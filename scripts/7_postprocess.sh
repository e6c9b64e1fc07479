#!/usr/bin/env bash
# Tunes thresholds on validation and turns probability maps into nodule masks and tables.
source "$(dirname "$0")/env.sh"
if [ -f "$WORK/predictions/$NAME/lungs.json" ]; then
    echo "$WORK/predictions/$NAME holds lungs; infer.py already wrote their labels"
    exit
fi
python postprocess.py --predictions "$WORK/predictions/$NAME" --scans "$WORK/scans" --run "$WORK/runs/$NAME" --workers "$WORKERS" "$@"
