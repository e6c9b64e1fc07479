#!/usr/bin/env bash
# Table -> train, validation and test rows, split by patient.
source "$(dirname "$0")/env.sh"
python slice_idx.py "$CONFIG" --table "$WORK/table.h5" --out "$WORK/split.json" "$@"
