"""A local Ray and three engines, started once per session."""

import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.actors.engine_helpers import Rig, make_model, run_config, save_tokenizer


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """A local Ray on loopback; gives its address."""
    import ray

    # Sockets live below it, and their paths must be short.
    folder = tempfile.mkdtemp(prefix="r", dir=tempfile.gettempdir())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_raylet_start_wait_time_s", "180")
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=100 << 20,
            _temp_dir=folder,
            _node_ip_address="127.0.0.1",
        )
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def rigs(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Rig]]:
    """An engine for each of the three families, started side by side; by name of the family."""
    from ray.util.placement_group import placement_group

    from actors.engine_start import create_engines

    families = ("llama", "qwen3", "moe")
    group = placement_group([{"CPU": 0.5}] * len(families))
    assert group.wait(60)

    def start(number: int) -> Rig:
        model = models[number]
        path = paths[number]
        config = run_config(path)
        engines = create_engines(config, str(path), group, [number])
        engines.ready(engines.start(), config.cluster.start_timeout_s)
        return Rig(engines=engines, model=model, config=config)

    models = [make_model(family, seed=1) for family in families]
    paths = [tmp_path_factory.mktemp(family) for family in families]
    for model, path in zip(models, paths, strict=True):
        model.save_pretrained(path)
        save_tokenizer(path)
    with ThreadPoolExecutor(len(families)) as threads:
        found = dict(zip(families, threads.map(start, range(len(families))), strict=True))
    yield found
    for rig in found.values():
        rig.engines.close()
