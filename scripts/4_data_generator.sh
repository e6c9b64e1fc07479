#!/usr/bin/env bash
# Draws a contact sheet of training batches and measures the speed of batch generation.
source "$(dirname "$0")/env.sh"
python data_generator.py "$CONFIG" --table "$WORK/table.h5" --split "$WORK/split.json" --out "$WORK/contact_sheet.png" "$@"
