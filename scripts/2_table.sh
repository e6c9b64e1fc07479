#!/usr/bin/env bash
# Collects the scan files in one HDF5 table.
source "$(dirname "$0")/env.sh"
python table.py "$CONFIG" --scans "$WORK/scans" --out "$WORK/table.h5" --workers "$WORKERS" "$@"
