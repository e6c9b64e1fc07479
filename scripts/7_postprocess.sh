#!/usr/bin/env bash
# Thresholds tuned on validation; probability maps -> nodule masks and tables.
source "$(dirname "$0")/env.sh"
if [ -f "$WORK/predictions/$NAME/lungs.json" ]; then
    echo "$WORK/predictions/$NAME holds lungs: infer.py has made their labels"
    exit
fi
python postprocess.py --predictions "$WORK/predictions/$NAME" --scans "$WORK/scans" --run "$WORK/runs/$NAME" --workers "$WORKERS" "$@"
