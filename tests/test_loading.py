"""Weights that go straight to the devices of a mesh; see eight_devices_loading.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_hosts import free_port

ROOT = Path(__file__).parent.parent
MIB = 2**20


@pytest.mark.slow
def test_several_devices_hold_what_one_does():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    file = Path(__file__).with_name("eight_devices_loading.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", file],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=1_200,
    )
    assert done.returncode == 0, done.stdout[-5_000:] + done.stderr[-2_000:]


# Llama with 107 million parameters: 408 MiB in float32.
LAYERS, DIM, MLP_DIM, VOCAB = 8, 1_024, 2_816, 2_048


def write_model(folder: Path) -> int:
    """Its size in bytes. Each tensor has other numbers, which are cheap to make."""
    shapes = {
        "model.embed_tokens.weight": (VOCAB, DIM),
        "model.norm.weight": (DIM,),
        "lm_head.weight": (VOCAB, DIM),
    }
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (DIM, DIM) for name in "qkvo"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (MLP_DIM, DIM) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (DIM, MLP_DIM)
        shapes |= {f"{layer}.{n}_layernorm.weight": (DIM,) for n in ("input", "post_attention")}
    rng = np.random.default_rng(0)
    tensors = {key: rng.standard_normal(shape, np.float32) for key, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": "llama",
        "hidden_size": DIM,
        "intermediate_size": MLP_DIM,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 16,
        "vocab_size": VOCAB,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return sum(x.nbytes for x in tensors.values())


LOAD = """
import json, sys
import jax, numpy as np
from flax import nnx
from safetensors import safe_open
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
from slam_jax.interop import load_pretrained
from slam_jax.training.mesh import MeshConfig, make_mesh
from slam_jax.training.sharding import shardings_of
folder, scan, sizes = sys.argv[3], sys.argv[4] == "True", json.loads(sys.argv[5])

def memory(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

mesh = make_mesh(MeshConfig(process=1, **sizes))
before = memory("VmRSS")
model, _ = load_pretrained(folder, mesh=mesh, scan_layers=scan)
used = memory("VmHWM") - before
state = nnx.to_pure_dict(nnx.state(model))
held = sum(s.data.nbytes for x in jax.tree.leaves(state) for s in x.addressable_shards)
layer = next(iter(state["blocks"].values()))
kernel = layer["mlp"]["down"]["kernel"]
with safe_open(folder + "/model.safetensors", framework="numpy") as tensors:
    for shard in kernel.addressable_shards:
        (first, index) = (shard.index[0].start or 0, shard.index[1:]) if scan else (0, shard.index)
        data = shard.data[0] if scan else shard.data
        key = f"model.layers.{first}.mlp.down_proj.weight"
        np.testing.assert_array_equal(data, tensors.get_tensor(key).T[index])
print(json.dumps({"used": used, "held": held}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("sizes", [dict(data=1, fsdp=8), dict(data=1, fsdp=2, tensor=4)])
def test_two_processes_hold_half_a_model_each(tmp_path, scan_layers, sizes):
    """Each needs at most its half, the largest group of tensors and 48 MiB at any time."""
    size = write_model(tmp_path)
    address = f"127.0.0.1:{free_port()}"
    flags = "--xla_force_host_platform_device_count=4"
    started = [
        subprocess.Popen(
            [
                *(sys.executable, "-c", LOAD, address, str(i)),
                *(str(tmp_path), str(scan_layers), json.dumps(sizes)),
            ],
            env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    said = [process.communicate(timeout=540) for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(map(str, said))
    group = DIM * MLP_DIM * 4 * (LAYERS if scan_layers else 1)
    for out, _ in said:
        found = json.loads(out.splitlines()[-1])
        assert size / 2 <= found["held"] < size / 2 + MIB
        assert found["used"] <= size / 2 + group + 48 * MIB
