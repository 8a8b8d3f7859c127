r"""MATH: competition problems with answers in LaTeX; trained on MATH's training problems, tested on MATH-500, read from published files.

Files: test.jsonl and train.jsonl (problem, solution, answer), or train.parquet (prompt, reward_model).
Right is the field's verdict: the last boxed expression, else the answer tag, is equivalent to the reference (`equivalence.equivalent`).
"""

import json
from collections.abc import Iterator

from absl import logging

from diffpo_jax.tasks.answers import LONGEST_ANSWER, answer_tag, demonstration, final_answer, last_boxed
from diffpo_jax.tasks.base import Problem, Task, check_split
from diffpo_jax.tasks.equivalence import equivalent, published_form
from diffpo_jax.tasks.files import check_text, find_file, read_rows

PROMPT = (
    "You are an expert in mathematics. Solve the problem step by step and put the final answer in \\boxed{}.\n"
    "Write your answer in this format:\n<reasoning>\nyour steps\n</reasoning>\n<answer>\n\\boxed{...}\n</answer>"
)


def read(folder: str, split: str, d1_faithful: bool) -> Iterator[Problem]:
    """The problems of a split; with a worked solution where the file has one. Rows without a reference answer are left out with a warning.

    Raises:
      FileNotFoundError, ValueError: no such file, a row that is none of the published formats, or math_verify is not installed.
    """
    try:
        import math_verify  # noqa: F401  the verdict needs it: better here than after the first rollout
    except ImportError:
        raise ValueError("task math500 needs the package math-verify: pip install math-verify") from None
    name = "test" if check_split(split) else "train"
    path = find_file(folder, [f"{name}.jsonl", f"{name}.parquet"])
    unanswered = 0
    for problem, solution, answer in (_read_parquet if path.endswith(".parquet") else _read_json_lines)(path):
        if not answer.strip():
            unanswered += 1
            continue
        response = demonstration(solution.strip(), f"\\boxed{{{answer}}}") if solution else ""
        yield Problem(f"{PROMPT}\n\n{problem.strip()}", response, json.dumps({"answer": answer}))
    if unanswered:
        logging.warning("%s: %d problems have no reference answer and are left out", path, unanswered)


def _read_json_lines(path: str) -> Iterator[tuple[str, str, str]]:
    for number, row in enumerate(read_rows(path, ["problem", "solution", "answer"]), 1):
        problem, solution, answer = row["problem"], row["solution"] or "", row["answer"]
        answer = "" if answer is None else str(answer) if isinstance(answer, int | float) else answer
        for name, text in (("problem", problem), ("solution", solution), ("answer", answer)):
            check_text(text, f"{path}, row {number}: {name}")
        yield problem, solution, answer


def _read_parquet(path: str) -> Iterator[tuple[str, str, str]]:
    for number, row in enumerate(read_rows(path, ["prompt", "reward_model"]), 1):
        where = f"{path}, row {number}"
        try:
            problem, answer = row["prompt"][-1]["content"], row["reward_model"]["ground_truth"] or ""
        except (KeyError, TypeError, IndexError):
            raise ValueError(f"{where}: expected prompt[].content and reward_model.ground_truth") from None
        check_text(problem, f"{where}: prompt[].content")
        check_text(answer, f"{where}: reward_model.ground_truth")
        yield problem, "", answer


extract = final_answer  # what is judged


def reward(answer: str, response: str) -> float:
    """1 if the final answer is equivalent to the reference, else 0."""
    found = final_answer(response)
    return float(found is not None and equivalent(json.loads(answer)["answer"], found))


def components(answer: str, response: str) -> dict[str, float]:
    r"""The published parts: correct 2.0; format 0.5 for an answer tag and 0.5 for a box in it, of which 0.25 also without one.

    Corrected against the released code: it looks for "\boxed" with the backslash unescaped, which no response holds, so that a box earned
    nothing; its comparison of normalised texts misses equivalent answers.
    """
    content = answer_tag(response)
    boxed = "\\boxed" in (response if content is None else content)
    return {"correct": 2.0 * reward(answer, response), "format": 0.5 * (content is not None) + (0.5 if boxed else 0.25)}


def _released_equal(answer: str, text: str | None) -> bool:
    return text is not None and published_form(text[:LONGEST_ANSWER]) == published_form(json.loads(answer)["answer"])


def released_reward(answer: str, response: str) -> float:
    """The verdict of the released d1 evaluation: equal after the published normalisation."""
    return float(_released_equal(answer, final_answer(response)))


def released_components(answer: str, response: str) -> dict[str, float]:
    """The training reward of the released d1 code, with what `components` corrects."""
    boxed = last_boxed(response)
    tagged = "<answer>" in response
    right = _released_equal(answer, response if boxed is None else boxed)
    return {"correct": 2.0 * right, "format": 0.5 * tagged + 0.25}


TASK = Task("math500", "", reward, components, read=read, extract=extract)
D1_TASK = Task("math500", "", released_reward, released_components, read=read, extract=extract)
