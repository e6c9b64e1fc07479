#!/usr/bin/env bash
# Trains and scores a base experiment and its ablations on one table, then writes the table
# of differences: BASE=thesis bash experiments/ablations.sh [ablation ...]
# Run steps 1 and 2 first. TRAIN adds options of train.py, as in lung_ablations.sh.
BASE=${BASE:-smoke}
source "$(dirname "$0")/../scripts/env.sh"
export DATA COHORT WORK WORKERS

ablations=("$@")
if [ "$#" -eq 0 ]; then
    ablations=(no-gcn no-se gdl-only wce-only unet no-lung-mask slice-split)
fi

for name in "$BASE" "${ablations[@]/#/$BASE-}"; do   # a misspelt name fails before any training
    python train.py "$name" --help > /dev/null
done

scores=()
for name in "$BASE" "${ablations[@]/#/$BASE-}"; do
    export CONFIG=$name NAME=$name
    split="$WORK/split.json"
    if [ "$name" = "$BASE-slice-split" ]; then split="$WORK/split-by-slice.json"; fi
    run 3_slice_idx --out "$split"
    run 5_train --split "$split" ${TRAIN:-}
    for step in 6_infer 7_postprocess 8_evaluate; do run "$step"; done
    scores+=("$WORK/scores/$name")
done
python -m experiments.ablation_table --scores "${scores[@]}" --out "$WORK/scores/ablations-$BASE"
exit "$skipped"
