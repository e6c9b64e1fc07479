#!/usr/bin/env bash
# Scan files -> one HDF5 table.
source "$(dirname "$0")/env.sh"
python table.py "$CONFIG" --scans "$WORK/scans" --out "$WORK/table.h5" --workers "$WORKERS" "$@"
