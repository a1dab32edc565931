"""A program on Ray that ends without shutting its engine down: as quiet, and as thorough, as on one machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ray_cluster import ENVIRONMENT, RayCluster

from engine.testing.instruments import eventually
from engine_ray.link.registry import Registry

_PROGRAM = """
{first}
import os
from engine import Engine

def pid(request):
    return os.getpid()

engine = Engine(backend="ray", http_options={{"location": None}})
engine.create_backend("pid", pid)
engine.create_endpoint("pid", backend="pid")
handle = engine.get_handle("pid")
print(handle.call(), engine.get(handle.remote()), engine._id)
"""


@pytest.mark.parametrize("first", ["", "import ray"], ids=["Ray unused before", "Ray imported before"])
def test_the_end_of_the_program_is_the_end_of_the_engine(ray_cluster: RayCluster, first: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(first=first)],
        cwd=tmp_path,
        env={**os.environ, **ENVIRONMENT, "RAY_ADDRESS": ray_cluster.address},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert (done.returncode, done.stderr) == (0, "")
    one, other, engine_id = done.stdout.splitlines()[0].split()  # Ray may print lines of its own after it
    assert one == other
    eventually(lambda: not Path(f"/proc/{one}").exists())
    assert Registry(engine_id).get() is None, "its secret is still in the control plane"
