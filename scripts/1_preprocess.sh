#!/usr/bin/env bash
# CT -> scan files: HU, geometry, lung mask, the readers' nodule masks.
source "$(dirname "$0")/env.sh"
python preprocess.py "$CONFIG" --source "$DATA" --cohort "$COHORT" --scans "$WORK/scans" --workers "$WORKERS" "$@"
