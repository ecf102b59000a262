#!/usr/bin/env bash
# torch 2.13.0, gloo, 2 ranks, DTensor. The sum of a sharded DTensor is one whose value is still partial on each rank.
# Compared, used in arithmetic or turned by full_tensor() it is summed over the ranks first; .item() and float() do not:
# each rank gets the sum of its own shard, silently. A loss or a count of tokens that is logged so, or a branch that is
# taken by float(x) > limit, differs from rank to rank, where the same lines in one process are right.
#
# Seen, of 0, 1, 4, ..., 81: rank 0 says 30 by .item(), float() and rank 1 255; both 285 by .full_tensor(), and == 285.
# The project has no DTensor: a sum over an axis is an all-reduce in sight (core/comm.py), and what is logged is compared
# to one process in every lesson.
# Exits with 1 when that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cat > "$folder/sum.py" <<'PYTHON'
import os
import socket
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

N = 2


def rank_of(rank, port, results):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=N)
    x = distribute_tensor(torch.arange(10.0) ** 2, init_device_mesh("cpu", (N,)), [Shard(0)])
    total = x.sum()
    same = bool((total == 285).full_tensor())
    results[rank] = total.item(), float(total), total.full_tensor().item(), same
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(rank_of, (port, results), nprocs=N)
        results = dict(results)
    print("torch", torch.__version__, "with gloo,", N, "ranks")
    for rank, (item, number, full, same) in sorted(results.items()):
        print(f"rank {rank}: .item() {item:g}, float() {number:g}, .full_tensor() {full:g}, == 285: {same}")
    sys.exit(results != {0: (30.0, 30.0, 285.0, True), 1: (255.0, 255.0, 285.0, True)})
PYTHON
"$folder/venv/bin/python" "$folder/sum.py"
