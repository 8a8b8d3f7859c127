"""What the viewer shows, over a mesh: python -m tests.multidevice.pages_worker '{"mesh": {...}, "workdir": ..., "out": ..., ...}'.

Writes {"fixed": [indices, records], "chosen": likewise} as JSON to OUT; the first process does.
"""

import contextlib
import json
import sys

import jax

from diffpo_jax import denoisings, processes, sharding
from diffpo_jax.build import build
from diffpo_jax.train import init_train_state
from tests.multidevice.worker import small_config
from tests.reference import sharpen


def main(stack, mesh, workdir, out, distributed=None):
    if distributed:
        settings = small_config({}).distributed
        settings.update(distributed | {"initialize": True})
        stack.enter_context(processes.together(settings))
    config = small_config(mesh)
    parts = build(config, workdir)
    params = sharding.init_sharded(parts.mesh, lambda key: sharpen(parts.policy.init(key), 15.0), parts.key("policy"))
    network = init_train_state(parts, params).threshold_params
    found = {
        "fixed": denoisings.denoise_test(parts, params, 12, threshold=4.0),
        "chosen": denoisings.denoise_test(parts, params, 12, threshold_params=network),
    }
    if jax.process_index() == 0:
        with open(out, "w") as file:
            json.dump(found, file)


if __name__ == "__main__":
    with contextlib.ExitStack() as stack:
        main(stack, **json.loads(sys.argv[1]))
