#!/usr/bin/env bash
# Every lesson, one after another, as a combined smoke test, with one summary table at the end: a few steps each, enough
# for every claim.
#   ./run_all.sh              8 ranks a lesson
#   NPROC=4 ./run_all.sh      4 ranks
#   PAGES=pages ./run_all.sh  the course as a site: a page of every run in this folder, and an index
# Each rank is a process of its own with torchrun's environment, but forked from one that has imported torch already:
# on two cores most of the time of a short run is eight imports of torch. Two lessons run at a time, because ranks wait.
# Goes on after a failure; exits 1 if a lesson failed, 2 if it cannot start at all.
set -u
cd "$(dirname "$0")" || exit 2
NPROC=${NPROC:-8}
if ! [[ $NPROC =~ ^[1-9][0-9]*$ ]]; then
  echo "run_all.sh: NPROC=$NPROC: must be a positive number of ranks; use NPROC=8" >&2
  exit 2
fi
if [[ -n ${PAGES:-} ]] && ! mkdir -p "$PAGES"; then
  echo "run_all.sh: PAGES=$PAGES: cannot make this folder; use PAGES=pages" >&2
  exit 2
fi
lessons=(
  zero/ddp.py
  zero/zero1.py
  zero/zero2.py
  zero/zero3.py
  zero/memory.py
  zero/offload.py
  zero/zeropp.py
  zero/muon.py
  megatron_tp/principle.py
  megatron_tp/tensor_parallel.py
  megatron_tp/train.py
  sequence_parallel/megatron_sp.py
  sequence_parallel/activations.py
  sequence_parallel/ulysses.py
  sequence_parallel/ring_attention.py
  sequence_parallel/all_gather.py
  sequence_parallel/hybrid.py
  sequence_parallel/long_context.py
  pipeline/naive.py
  pipeline/gpipe.py
  pipeline/1f1b.py
  pipeline/interleaved.py
  pipeline/zero_bubble.py
  pipeline/dualpipe.py
  pipeline/auto.py
  pipeline/compare.py
  expert_parallel/router.py
  expert_parallel/moe.py
  expert_parallel/dispatch.py
  expert_parallel/train.py
  expert_parallel/upcycle.py
  cluster/ranks.py
  cluster/topology.py
  cluster/accuracy.py
  cluster/dry_run.py
  cluster/hang.py
  cluster/train.py
)
# What the defaults have not got: a Llama, experts, sp, cp, dropout, Muon.
if ((NPROC % 8 == 0)); then
  lessons+=(
    "cluster/train.py --model llama --kv-heads 1 --tp 2 --cp 2 --pp 2 --sp"
    "cluster/train.py --tp 2 --cp 2 --pp 2 --experts 4 --ep 4"
    "cluster/train.py --pp 4 --schedule zb-h1 --zero 3 --optimizer muon"
    "cluster/train.py --tp 2 --zero 3 --recompute full --dtype bfloat16"
    "cluster/train.py --tp 2 --pp 1 --zero 1 --microbatches 2 --attention softmax --dropout 0.1"
  )
elif ((NPROC % 4 == 0)); then
  lessons+=(
    "cluster/train.py --model llama --tp 2 --sp --experts 4 --ep 2 --bias-rate 0.01 --zero 1 --dtype float64"
    "cluster/train.py --cp 2 --pp 2 --schedule zb-h1 --zero 3 --optimizer muon"
    "cluster/train.py --tp 2 --pp 1 --zero 1 --microbatches 2 --attention softmax --dropout 0.1"
  )
fi

if ! command -v torchrun >/dev/null; then
  echo "run_all.sh: torchrun is not installed here; first: . .venv/bin/activate (see README.md)" >&2
  exit 2
fi

exec python -m tests.run_all "$NPROC" "${lessons[@]}"
