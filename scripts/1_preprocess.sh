#!/usr/bin/env bash
# Reads CT and writes scan files with HU, geometry, lung mask and the readers' nodule masks.
source "$(dirname "$0")/env.sh"
python preprocess.py "$CONFIG" --source "$DATA" --cohort "$COHORT" --scans "$WORK/scans" --workers "$WORKERS" "$@"
