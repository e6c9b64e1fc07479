#!/usr/bin/env bash
# Scans + run -> probability maps of validation and test patients. Of a run for lungs, its lungs:
# --nodules RUN also looks for nodules in them.
source "$(dirname "$0")/env.sh"
python infer.py --exp_dir "$WORK/runs/$NAME" --scans "$WORK/scans" --result_dir "$WORK/predictions/$NAME" \
    --nodules None "$@"
