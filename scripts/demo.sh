#!/usr/bin/env bash
# Program of `make demo`: runs every step, then segments lungs and nodules of one scan with the
# shipped weights. Exit code 3 means that some scans were skipped.
code=0
bash "$(dirname "$0")/all.sh" || code=$?
if [ "$code" -ne 0 ] && [ "$code" -ne 3 ]; then exit "$code"; fi
source "$(dirname "$0")/env.sh"
first=$(find -L "$DATA" -type f -iname '*.dcm' | sort | sed -n 1p)
if [ -n "$first" ]; then DATA=$(dirname "$first"); fi   # else DATA holds no DICOM
python infer.py --input "$DATA" --result_dir "$WORK/demo"
for folder in "$WORK"/demo/*/; do   # a page with the lungs in 3-D, for any browser
    python -m viewers.lungs "$folder" --overwrite || echo "no page for $folder" >&2
    break
done
exit "$code"
