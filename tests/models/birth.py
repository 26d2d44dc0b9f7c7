"""One of several processes that load a model together; prints what it read, held and keeps."""

import json
import pathlib
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import models, processes, sharding
from jaxdistill.errors import ModelError
from jaxdistill.formats import exchange, shards
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


def as_whole(params, whole) -> bool:
    """Whether the slices that lie here have the bits of those of a model that was read whole."""
    return all(
        np.asarray(shard.data).tobytes() == np.asarray(all_of_it)[shard.index].tobytes()
        for leaf, all_of_it in zip(jax.tree.leaves(params), jax.tree.leaves(whole), strict=True)
        for shard in leaf.addressable_shards
    )


def told(folder: str, mesh) -> list[str]:
    """What each process says where the second cannot read one of the weights."""
    original = shards.Folder.read

    def torn(self, name, index, memory=None):
        if jax.process_index() == 1 and "up_proj" in name:
            raise ModelError("no such block")
        return original(self, name, index)

    shards.Folder.read = torn
    try:
        models.load(folder, mesh=mesh, tokenizer=False)
    except ModelError as error:
        return [type(error).__name__, str(error)]
    return []


def main(folder: str, shared: str) -> None:
    """Loads from a folder of its own, as another host has, then from one that both share."""
    processes.start()
    read, together, exchanged = [0], [0], []
    original, turning = shards.Folder.read, exchange._turning

    def counted(self, name, index, memory=None):
        values = original(self, name, index, memory)
        read[0] += values.nbytes
        together[0] += values.nbytes * values.flags.c_contiguous
        return values

    mesh = sharding.make_mesh(fsdp=-1)
    # What JAX needs for its first programs and connections is no part of a model.
    columns = jax.NamedSharding(mesh, jax.P(None, None, "fsdp"))
    zeros = np.zeros((2, 256, 256), np.float32)
    exchange.array(
        zeros.shape, columns, lambda slices: [zeros[one] for one in slices], 1, 2, zeros.dtype
    )
    shards.Folder.read = counted
    exchange._turning = lambda *given: exchanged.append(given) or turning(*given)
    watch = Watch()
    watch.start()
    params = models.load(folder, mesh=mesh, tokenizer=False).params
    watch.done.set()
    watch.join()
    shards.Folder.read = original
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    result = {"read": read[0], "together": together[0], "whole": whole}
    result |= {"local": local_bytes(params), "told": told(folder, mesh)}
    shards.Folder.read = original
    whole_model = models.load(folder, tokenizer=False).params
    result |= {"same": as_whole(params, whole_model), "exchanged": len(exchanged)}
    exchanged.clear()
    of_one_file = models.load(shared, mesh=mesh, tokenizer=False).params
    result["same_of_one_file"] = as_whole(of_one_file, whole_model)
    result["exchanged_of_one_file"] = len(exchanged)
    result |= {"grown": watch.peak - watch.first, "layouts": [layout(*sizes) for sizes in MESHES]}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
