"""One finished debug run, with what was traced and compiled meanwhile, shared by the tests of this folder."""

import importlib
import shutil

import jax
import pytest

import diffpo_jax as dp
from configs import sudoku
from diffpo_jax.metrics import Writer

train_module = importlib.import_module("diffpo_jax.train")  # `dp.train` is the function


class Compilations:
    """While open: what JAX traced and compiled, between the metric lines that were written meanwhile."""

    def __init__(self):
        self.events = []  # ("line", phase, step) | ("trace" | "compile", name of the function)

    def __enter__(self):
        self._patch = pytest.MonkeyPatch()
        write = Writer.write

        def noted(writer, phase, step, values):
            self.events.append(("line", phase, step))
            return write(writer, phase, step, values)

        self._patch.setattr(Writer, "write", noted)
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self._listen)
        self._patch.undo()

    def _listen(self, event, duration, fun_name="", **_):
        kind = {"/jax/core/compile/jaxpr_trace_duration": "trace", "/jax/core/compile/backend_compile_duration": "compile"}.get(event)
        if kind and fun_name != "bind":  # the eager dispatch of one primitive, which JAX 0.11 reports as a trace
            self.events.append((kind, fun_name))

    def after(self, *line):
        """(kind, name) of each event between the line and the next."""
        first = self.events.index(("line", *line)) + 1
        rest = self.events[first:]
        end = next((i for i, event in enumerate(rest) if event[0] == "line"), len(rest))
        return rest[:end]


@pytest.fixture(scope="package")
def finished_run(tmp_path_factory):
    """(workdir, configuration, summary, Compilations) of a debug run on sudoku in this process."""
    workdir, config = tmp_path_factory.mktemp("finished") / "run", sudoku.get_config("debug")
    jax.clear_caches()  # of what other tests compiled
    with Compilations() as compilations:
        summary = dp.train(config, str(workdir))
    return workdir, config, summary, compilations


@pytest.fixture
def finished(finished_run, tmp_path_factory):
    """`finished_run` with a copy of its workdir, which a test may change."""
    workdir, *rest = finished_run
    return shutil.copytree(workdir, tmp_path_factory.mktemp("finished") / "run"), *rest
