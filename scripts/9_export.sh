#!/usr/bin/env bash
# Exports the run as a SavedModel for TensorFlow Serving.
source "$(dirname "$0")/env.sh"
python export.py --run "$WORK/runs/$NAME" --out "$WORK/export/$NAME" "$@"
