"""The notebooks of colabs/: short, without logic or outputs of their own, and they run."""

import ast
import html
import time

import nbformat
import pytest
from nbclient import NotebookClient

from tests.integration.test_published import write_problems
from tests.published_model import write_model
from tests.runs import ROOT

ADDRESS = "https://colab.research.google.com/github/diffpo-jax/diffpo_jax/blob/main/colabs"  # of a repository that is yet to be published
NOTEBOOKS = sorted((ROOT / "colabs").glob("*.ipynb"))
LOGIC = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.While, ast.Try, ast.With, ast.Match)
NAME = {"ids": lambda path: path.stem}


def read(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_of(cell) -> ast.Module:
    """A code cell's program, without IPython's own lines."""
    return ast.parse("\n".join(f"{line[: len(line) - len(line.lstrip())]}pass" if line.lstrip()[:1] in "%!" and line.strip() else line
                               for line in cell.source.splitlines()))  # fmt: skip


def has_logic(program: ast.Module) -> bool:
    """Whether it defines or branches, but for an if around imports and downloads, or loops over more than a few plain lines."""
    for node in ast.walk(program):
        if isinstance(node, LOGIC):
            return True
        if isinstance(node, ast.For) and (len(node.body) > 5 or any(isinstance(inner, ast.If) for inner in ast.walk(node))):
            return True
        if isinstance(node, ast.If) and (node.orelse or len(node.body) > 1):
            return True
    return False


def test_there_are_four():
    assert [path.stem for path in NOTEBOOKS] == ["likelihoods", "llada", "pareto", "quickstart"]


@pytest.mark.parametrize("path", NOTEBOOKS, **NAME)
def test_form(path):
    notebook = read(path)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5) and len({cell.id for cell in notebook.cells}) == len(notebook.cells) <= 15
    assert f"]({ADDRESS}/{path.name})" in notebook.cells[0].source
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code), "clear the outputs before committing"
    assert not [cell.id for cell in code if has_logic(code_of(cell))]
    assert [cell.metadata.get("tags") for cell in code].count(["parameters"]) == 1


def test_logic_is_seen():
    assert has_logic(ast.parse("def f(): pass")) and has_logic(ast.parse("for i in x:\n    if i:\n        print(i)"))
    assert has_logic(ast.parse("if a:\n    b()\nelse:\n    c()")) and not has_logic(ast.parse("for i in x:\n    print(i)"))


@pytest.fixture
def parameters(tmp_path):
    """Of each notebook, in place of those for people: seconds on a CPU."""
    model, problems = write_model(tmp_path / "model"), write_problems(tmp_path / "data")
    sizes = {"task.test_size": 4, "eval.lengths": (32,), "task.response_length": 32, "rl.inner_steps": 1, "eval.thresholds": (1.0,)}
    return {
        "likelihoods": {"DRAWS": 20},
        "llada": {"MODEL": str(model), "DATA": str(problems), "PRESET": "published_debug", "SIZES": sizes},
        "pareto": {"PRESET": "debug"},
        "quickstart": {"PRESET": "debug"},
    }


def execute(path, parameters, folder):
    """The notebook after a run in `folder`, with the parameters set as papermill does, in a cell after the tagged one."""
    notebook = read(path)
    tagged = next(i for i, cell in enumerate(notebook.cells) if cell.metadata.get("tags") == ["parameters"])
    known = {node.targets[0].id for node in code_of(notebook.cells[tagged]).body}
    assert parameters.keys() <= known
    given = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    notebook.cells.insert(tagged + 1, nbformat.v4.new_code_cell(given))
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def printed(cell) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


def has_picture(cell) -> bool:
    return any("image/png" in output.get("data", {}) for output in cell.outputs)


EXPECTED = {  # notebook -> (cells that show a picture, {cell: what it prints})
    "likelihoods": (["surrogates"], {
        "enumerate": "162 trajectories of total probability 1.000000",
        "surrogates": "exact        sums to 1.0000, KL(exact || it) = 0.0000",
        "weights-table": "exact                 1.000  1.00",
    }),
    "llada": (["curves"], {"denoise": "for 64 positions", "export": "threshold_head.safetensors"}),
    "pareto": (["picture", "learned"], {"gamma": "gamma 100.0", "compare": "hypervolume, trained"}),
    "quickstart": (["pareto", "curves"], {}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, **NAME)
def test_runs(path, parameters, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the kernel takes this environment, the compilation cache's folder too
    began = time.monotonic()
    cells = execute(path, parameters[path.stem], tmp_path)
    print(f"{path.stem}: {time.monotonic() - began:.0f} s")
    pictures, texts = EXPECTED[path.stem]
    assert all(has_picture(cells[name]) for name in pictures)
    for name, text in texts.items():
        assert text in printed(cells[name])
    if path.stem == "quickstart":
        shown = cells["report"].outputs[0]["data"]["text/html"]
        report = tmp_path / "runs" / "quickstart" / "report.html"
        assert html.escape(report.read_text(encoding="utf-8") if report.exists() else "no report.html") in shown
    if path.stem == "likelihoods":  # nearer with more cuts
        kl = [float(line.split("it) = ")[1].split()[0]) for line in printed(cells["surrogates"]).splitlines()]
        assert kl[0] > 0.2 > kl[1] > 0.1 and kl[3] == 0.0
