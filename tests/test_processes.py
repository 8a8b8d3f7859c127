"""How the processes of a run meet; what happens when one is lost or fails is tested with real ones (tests/multidevice)."""

import jax
import pytest

from configs.default import get_config
from diffpo_jax import processes


@pytest.fixture
def settings(monkeypatch):
    """config.distributed; joining changes no setting of JAX here."""
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    return get_config().distributed


def test_one_process_is_left_alone(settings, monkeypatch):
    for name in ("_join", "_last_words", "_watch"):
        monkeypatch.setattr(processes, name, None)
    with processes.together(settings):
        pass
    with pytest.raises(ValueError, match="^mine$"), processes.together(settings):
        raise ValueError("mine")


def test_processes_are_joined_as_the_configuration_says(settings, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **_: calls.append(args))
    processes._join(settings)
    settings.update(coordinator="host:1234", processes=3, process_id=0)
    processes._join(settings)
    assert calls == [(None, None, None), ("host:1234", 3, 0)]  # None: from the environment


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_processes_that_do_not_find_each_other(settings, monkeypatch, error):
    def lonely(*_, **__):
        raise error("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", lonely)
    with pytest.raises(RuntimeError, match=r"did not find each other \(coordinator_address should be .*distributed.coordinator=HOST:PORT"):
        processes._join(settings)
