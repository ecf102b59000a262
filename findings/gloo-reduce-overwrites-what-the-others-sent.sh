#!/usr/bin/env bash
# torch 2.13.0, gloo, 4 ranks. dist.reduce(x, dst=0) leaves the sum on rank 0. On the others x is an input, and one would
# guess that it is as it was. It is not: where a rank has added what others sent, its x is a sum of some of them, for
# some elements. So a gradient that is reduced to its owner, as ZeRO-1 may do bucket by bucket, is no longer the rank's
# own gradient afterwards: its norm, or a second reduction of it, is wrong without a word.
#
# Seen: ranks 1 to 3, which each sent 8 elements, have others in 6 of the places afterwards.
# The project has no reduce: ZeRO reduce-scatters, whose inputs tests/zero compare to one process.
# Exits with 1 when that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cat > "$folder/reduce.py" <<'PYTHON'
import os
import socket
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

N = 4


def rank_of(rank, port, results):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=N)
    own = torch.arange(8.0) + 10 * rank
    x = own.clone()
    dist.reduce(x, dst=0)
    results[rank] = own.tolist(), x.tolist()
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
    for rank, (own, after) in sorted(results.items()):
        print(f"rank {rank} sent {own}, and has {after}")
    total = [sum(column) for column in zip(*(own for own, _ in results.values()))]
    others = [own != after for rank, (own, after) in results.items() if rank]
    sys.exit(not (results[0][1] == total and any(others)))
PYTHON
"$folder/venv/bin/python" "$folder/reduce.py"
