#!/usr/bin/env bash
# Makes the picture of the README from LIDC-IDRI-0003.   bash docs/pictures/make.sh /data/LIDC-IDRI/LIDC-IDRI-0003
set -euo pipefail
scan=$(realpath "$1")
cd "$(dirname "$0")/../.."
if [ -x .venv/bin/python ]; then PATH="$PWD/.venv/bin:$PATH"; fi
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
python infer.py --input "$scan" --result_dir "$out"
python - "$out" docs/pictures/overview.jpg <<'PYTHON'
import sys
from pathlib import Path

import cv2

(picture,) = Path(sys.argv[1]).glob("*/overview.png")
cv2.imwrite(sys.argv[2], cv2.imread(str(picture)), [cv2.IMWRITE_JPEG_QUALITY, 80])
PYTHON
