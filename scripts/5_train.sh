#!/usr/bin/env bash
# Trains a network on the table and the split; writes a run directory.
source "$(dirname "$0")/env.sh"
python train.py "$CONFIG" --table "$WORK/table.h5" --split "$WORK/split.json" --runs "$WORK/runs" --name "$NAME" --workers "$WORKERS" "$@"
