#!/usr/bin/env bash
# Splits the patients of the table into train, validation and test.
source "$(dirname "$0")/env.sh"
python slice_idx.py "$CONFIG" --table "$WORK/table.h5" --out "$WORK/split.json" "$@"
