#!/usr/bin/env bash
# Leaves one source of scans out: for each, trains a lung network without its patients and
# scores it on them, the worst scan first.
#   INIT=work/runs/phantoms/best.weights.h5 bash experiments/lung_leave_one_out.sh
# INIT are weights that saw none of the sources. TRUTH is the folder of scan files with known
# lungs; SOURCES lists one source per line: its name, a pattern of scan files of other patients
# that show it too (chests stitched to its abdomen) or "none", and its patients. TRAIN adds
# options of train.py.
if [ -n "${TRUTH:-}" ]; then TRUTH=$(realpath "$TRUTH"); fi
if [ -n "${INIT:-}" ]; then INIT=$(realpath "$INIT"); fi
if [ -n "${SOURCES:-}" ]; then SOURCES=$(realpath "$SOURCES"); fi
source "$(dirname "$0")/../scripts/env.sh"
TRUTH=$(realpath "${TRUTH:-$WORK/labelled}")
SOURCES=${SOURCES:-experiments/lung_leave_one_out.txt}
config=lung3d-anywhere
set -f                                     # patterns are for find, not for the shell

try() {  # exit code 3 means that some scans were skipped, which a table lists
    python "$@" || { code=$?; [ "$code" -eq 3 ] || exit "$code"; skipped=3; }
}

score() {  # MASKS SCORES
    rm -rf "$1/references" && mkdir -p "$1/references"
    find "$1" -name mask.nii.gz -printf '%P\n' | while IFS=/ read -r scan _; do
        ln -sf "$TRUTH/$scan.h5" "$1/references/"
    done
    try -m experiments.lung_sources --references "$1/references" --masks "$1" --out "$2"
}

while read -r source pattern patients; do
    out="$WORK/left-out/$source"
    rm -rf "$out/train" "$out/others" && mkdir -p "$out/train" "$out/others"
    find "$TRUTH" -name '*.h5' ! -name "$pattern.h5" -exec ln -sf -t "$out/train" {} +
    find "$TRUTH" -name "$pattern.h5" -exec ln -sf -t "$out/others" {} +
    if [ "$pattern" != none ] && [ -z "$(find "$out/others" -name '*.h5')" ]; then
        echo "no scan file in $TRUTH is called $pattern.h5; see $SOURCES" >&2
        exit 1
    fi
    python table.py $config --scans "$out/train" --out "$out/table.h5" --workers "$WORKERS"
    python slice_idx.py $config --table "$out/table.h5" --out "$out/split.json" \
        --split.fractions 0.97 0.03 0 --split.held-out $patients
    python train.py $config --table "$out/table.h5" --split "$out/split.json" \
        --runs "$out" --name run --workers "$WORKERS" ${INIT:+--init "$INIT"} ${TRAIN:-}
    cp "$out/run/last.weights.h5" "$out/run/best.weights.h5"   # validation has few scans
    try infer.py --exp_dir "$out/run" --scans "$out/train" --parts test \
        --result_dir "$out/masks" --nodules None --n 1
    score "$out/masks" "$out/scores"
    if [ -n "$(find "$out/others" -name '*.h5')" ]; then
        try infer.py --exp_dir "$out/run" --scans "$out/others" \
            --parts train validation test --result_dir "$out/masks-others" --nodules None \
            --n 1
        score "$out/masks-others" "$out/scores-others"
    fi
done < "$SOURCES"
exit "$skipped"
