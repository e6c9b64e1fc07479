#!/usr/bin/env bash
# Writes chest phantoms as DICOM series with LIDC-style XML; only needed without real CT.
source "$(dirname "$0")/env.sh"
python -m phantoms.write --out "$WORK/phantoms" --count "$PHANTOMS" --phantom.nodules $NODULES --workers "$WORKERS" "$@"
