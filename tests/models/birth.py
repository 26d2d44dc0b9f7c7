"""One of several processes that load a model together; prints what it read, held and keeps."""

import json
import pathlib
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import models, processes, sharding
from jaxdistill.formats import shards
from jaxdistill.train import step
from jaxdistill.types import Batch

MESHES = ((2, 4, 1), (1, 2, 4), (1, 1, 8))


def anonymous() -> int:
    """Bytes of this process's memory that no file stands behind."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Watch(threading.Thread):
    """Looks at the memory all the time."""

    def __init__(self):
        super().__init__(daemon=True)
        self.first = self.peak = anonymous()
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.001):
            self.peak = max(self.peak, anonymous())


def local_bytes(params) -> int:
    """Bytes of the slices that lie here, copies of one slice counted once."""
    return sum(
        {str(shard.index): shard.data.nbytes for shard in leaf.addressable_shards}[index]
        for leaf in jax.tree.leaves(params)
        for index in {str(shard.index) for shard in leaf.addressable_shards}
    )


def layout(data: int, fsdp: int, tensor: int) -> dict:
    """Which process each place of a mesh belongs to, and which of 16 rows lie in this one."""
    mesh = sharding.make_mesh(data, fsdp, tensor)
    owners = [device.process_index for device in mesh.devices.flat]
    rows = sharding.local_rows(mesh, 16)
    own = np.arange(32).reshape(16, 2)[rows]
    batch = Batch(tokens=own, targets=own, mask=own > 0, positions=own, segment_ids=own)
    total = int(jax.jit(jnp.sum)(step.place(batch, mesh).tokens))
    return {"owners": owners, "rows": rows, "total": total}


def main(folder: str) -> None:
    processes.start()
    read = [0]
    original = shards.Folder.read

    def counted(self, name, index):
        values = original(self, name, index)
        read[0] += values.nbytes
        return values

    shards.Folder.read = counted
    mesh = sharding.make_mesh(fsdp=-1)
    watch = Watch()
    watch.start()
    params = models.load(folder, mesh=mesh, tokenizer=False).params
    watch.done.set()
    watch.join()
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    result = {"read": read[0], "local": local_bytes(params), "whole": whole}
    result |= {"grown": watch.peak - watch.first, "layouts": [layout(*sizes) for sizes in MESHES]}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
