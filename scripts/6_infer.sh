#!/usr/bin/env bash
# Predicts probability maps for validation and test patients. A run for lungs segments their lungs;
# --nodules RUN then also finds nodules inside them.
source "$(dirname "$0")/env.sh"
python infer.py --exp_dir "$WORK/runs/$NAME" --scans "$WORK/scans" --result_dir "$WORK/predictions/$NAME" \
    --nodules None "$@"
