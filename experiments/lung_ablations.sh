#!/usr/bin/env bash
# Trains lung networks on one table and split, and writes the tables that compare their
# masks, without snapping, with the classical masks: on the test scans as they are, and with
# simulated pathology.
#   bash experiments/lung_ablations.sh lung2d-small-{p0,p06,p08,p09}
#   N=20 bash experiments/lung_ablations.sh lung3d-3mm lung3d-{nomask,mask30,dropout}
# Run step 1 first. TRUTH is the folder of scan files with known lungs, which are used for
# training. SPLIT names an existing split; TRAIN adds options of train.py, such as
# TRAIN="--train.epochs 2 --train.steps_per_epoch 20" to try the script.
CONFIG=${1:?name one or more experiments for lungs}
if [ -n "${SPLIT:-}" ]; then SPLIT=$(realpath "$SPLIT"); fi
if [ -n "${TRUTH:-}" ]; then TRUTH=$(realpath "$TRUTH"); fi
source "$(dirname "$0")/../scripts/env.sh"
TRUTH=${TRUTH:-$WORK/phantoms/truth}
N=${N:-auto}                       # passes of networks trained with masks or dropout
mkdir -p "$WORK/lungs"
table="$WORK/lungs/table-$CONFIG.h5"      # made for the first experiment, used by all
split=${SPLIT:-"$WORK/lungs/split-$CONFIG.json"}
python table.py "$CONFIG" --scans "$TRUTH" --out "$table" --workers "$WORKERS"
if [ -z "${SPLIT:-}" ]; then python slice_idx.py "$CONFIG" --table "$table" --out "$split"; fi
python -m experiments.lesioned_scans --truth "$TRUTH" --out "$WORK/lungs/ill" \
    --workers "$WORKERS"

well=("classical=$WORK/scans") ill=("classical=$WORK/lungs/ill/scans")
for name in "$@"; do
    python train.py "$name" --table "$table" --split "$split" --runs "$WORK/runs" \
        --name "$name" --workers "$WORKERS" ${TRAIN:-}
    settings="$WORK/runs/$name/config.json" passes=$N
    if grep -q '"mask_fraction": 0.0' "$settings" && grep -q '"dropout": 0.0' "$settings"; then
        passes=1                   # without masks or dropout all passes are equal
    fi
    for kind in well ill; do
        scans="$WORK/scans"
        if [ "$kind" = ill ]; then scans="$WORK/lungs/ill/scans"; fi
        python infer.py --exp_dir "$WORK/runs/$name" --scans "$scans" --parts test \
            --result_dir "$WORK/lungs/$kind-$name" --n "$passes" --snap 0 --nodules None
    done
    well+=("$name=$WORK/lungs/well-$name") ill+=("$name=$WORK/lungs/ill-$name")
done

compare() {
    python -m experiments.lung_comparison --truth "$TRUTH" --split "$split" \
        --workers "$WORKERS" "$@"
}
compare --scans "$WORK/scans" --methods "${well[@]}" --out "$WORK/scores/lungs"
compare --scans "$WORK/lungs/ill/truth" --methods "${ill[@]}" --out "$WORK/scores/lungs-ill"
