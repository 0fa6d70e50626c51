"""A program: the contrastive losses over a mesh of several processes, against dense float64."""

from __future__ import annotations

import sys

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mmjax.losses import infonce, sigmoid
from mmjax.parallel import make_mesh
from mmjax.parallel.distributed import Launch, batch_part
from tests.losses.dense import TOLERANCE, dense_infonce, dense_sigmoid, embeddings, reference, value_bound


def main(coordinator: str, count: int, index: int) -> None:
    Launch(coordinator=coordinator, num_processes=count, process_id=index).start()
    mesh = make_mesh({"data": count, "fsdp": -1})
    assert batch_part(mesh) == (index, count)
    # One device of each process along "tensor": both processes then need all rows.
    assert batch_part(make_mesh({"tensor": -1})) == (0, 1)
    split = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    image, text = embeddings(48)
    rows = slice(index * 48 // count, (index + 1) * 48 // count)
    spread = [jax.make_array_from_process_local_data(split, x[rows]) for x in (image, text)]
    for scale, tolerance in TOLERANCE.items():
        for loss, dense, rest in (
            (infonce, dense_infonce, (np.float32(scale),)),
            (sigmoid, dense_sigmoid, (np.float32(scale), np.float32(-10))),
        ):

            def f(*arguments, loss=loss):
                return loss(*arguments, mesh=mesh, axis=("data", "fsdp"), block_size=4)

            value, grads = jax.jit(jax.value_and_grad(f, tuple(range(2 + len(rest)))))(*spread, *rest)
            expected, wanted = reference(dense, image, text, *rest)
            assert abs(float(value) - expected) <= value_bound(expected), (loss, scale)
            for ours, theirs in zip(grads, wanted, strict=True):
                largest = np.abs(theirs).max()
                for shard in ours.addressable_shards:
                    error = np.abs(np.asarray(shard.data) - theirs[shard.index]).max()
                    assert error <= tolerance * largest, (loss, scale, error / largest)
            assert grads[0].sharding.is_equivalent_to(split, 2)
    print("exact", flush=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
