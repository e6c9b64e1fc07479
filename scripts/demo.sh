#!/usr/bin/env bash
# What `make demo` runs: every step, then lungs and nodules of one scan by the weights that ship.
# Exit code 3: done, but some scans were skipped.
code=0
bash "$(dirname "$0")/all.sh" || code=$?
if [ "$code" -ne 0 ] && [ "$code" -ne 3 ]; then exit "$code"; fi
source "$(dirname "$0")/env.sh"
first=$(find -L "$DATA" -type f -iname '*.dcm' | sort | sed -n 1p)
if [ -n "$first" ]; then DATA=$(dirname "$first"); fi   # else DATA is of another kind
DATA=$DATA WORK=$WORK bash scripts/lungs.sh
exit "$code"
