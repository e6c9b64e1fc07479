#!/usr/bin/env bash
# Runs every step in order. Exit code 3 means that some scans were skipped.
#   bash scripts/all.sh                                       phantoms; takes minutes
#   CONFIG=thesis DATA=/data/LIDC-IDRI bash scripts/all.sh    setup of the thesis
made_phantoms=${DATA:+no}
source "$(dirname "$0")/env.sh"
export CONFIG DATA COHORT WORK NAME WORKERS PHANTOMS NODULES

if [ -z "$made_phantoms" ]; then run 0_phantoms; fi
for step in 1_preprocess 2_table 3_slice_idx 4_data_generator 5_train 6_infer \
    7_postprocess 8_evaluate 9_export; do
    run "$step"
done
exit "$skipped"
