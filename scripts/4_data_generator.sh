#!/usr/bin/env bash
# A contact sheet of training batches, and their speed.
source "$(dirname "$0")/env.sh"
python data_generator.py "$CONFIG" --table "$WORK/table.h5" --split "$WORK/split.json" --out "$WORK/contact_sheet.png" "$@"
