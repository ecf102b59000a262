#!/usr/bin/env bash
# Every lesson, one after another, as a combined smoke test, with one summary table at the end.
#   ./run_all.sh              8 ranks a lesson
#   NPROC=4 ./run_all.sh      4 ranks
# Goes on after a failure; exits 1 if a lesson failed, 2 if it cannot start at all.
set -u
cd "$(dirname "$0")" || exit 2
NPROC=${NPROC:-8}
lessons=(
  zero/ddp.py
  zero/zero1.py
  zero/zero2.py
  zero/zero3.py
  zero/memory.py
  zero/offload.py
  zero/zeropp.py
  megatron_tp/principle.py
  megatron_tp/tensor_parallel.py
  megatron_tp/train.py
  sequence_parallel/megatron_sp.py
  sequence_parallel/activations.py
  pipeline/naive.py
  pipeline/gpipe.py
  pipeline/1f1b.py
)

if ! [[ $NPROC =~ ^[1-9][0-9]*$ ]]; then
  echo "run_all.sh: NPROC=$NPROC: must be a positive number of ranks; use NPROC=8" >&2
  exit 2
fi
if ! command -v torchrun >/dev/null; then
  echo "run_all.sh: torchrun is not installed here; first: . .venv/bin/activate (see README.md)" >&2
  exit 2
fi

reports=$(mktemp -d) || exit 2
trap 'rm -rf "$reports"' EXIT
for lesson in "${lessons[@]}"; do
  printf '\n======== torchrun --nproc_per_node=%s %s\n' "$NPROC" "$lesson"
  began=$SECONDS
  torchrun --standalone --nproc_per_node="$NPROC" "$lesson" --report "$reports/${lesson//\//.}.json"
  printf '%s %s %s\n' "$lesson" $? $((SECONDS - began)) >>"$reports/runs"
done

python - "$reports" <<'PYTHON'
import json
import pathlib
import sys

from tabulate import tabulate

folder = pathlib.Path(sys.argv[1])
rows, failed = [], 0
for line in (folder / "runs").read_text().splitlines():
    lesson, code, seconds = line.split()
    report = folder / f"{lesson.replace('/', '.')}.json"
    claims = json.loads(report.read_text())["claims"] if report.exists() else []
    held = sum(claim["holds"] for claim in claims)
    good = code == "0" and held == len(claims) > 0
    failed += not good
    rows.append((lesson, f"{held} of {len(claims)}" if claims else "no report", seconds, "ok" if good else "FAILED"))
print("\n" + tabulate(rows, ("lesson", "claims held", "seconds", "")))
sys.exit(1 if failed else 0)
PYTHON
