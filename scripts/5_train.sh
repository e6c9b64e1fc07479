#!/usr/bin/env bash
# Configuration + table + split -> run directory.
source "$(dirname "$0")/env.sh"
python train.py "$CONFIG" --table "$WORK/table.h5" --split "$WORK/split.json" --runs "$WORK/runs" --name "$NAME" --workers "$WORKERS" "$@"
