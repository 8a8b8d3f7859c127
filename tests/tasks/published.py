"""Shared by the tests of the published tasks: where their data lie, and texts that break careless verifiers."""

import json
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"  # beside the project's root


def needs(folder: str) -> str:
    """The folder of published data; skips the test where it is absent."""
    path = DATA / folder
    if not path.is_dir():
        pytest.skip(f"no published data in {path}")
    return str(path)


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def in_tags(answer: str) -> str:
    return f"<reasoning>\nSo it is.\n</reasoning>\n<answer>\n{answer}\n</answer>"


ADVERSARIAL = (
    "",
    "\x00",
    "9" * 10**5,
    "-" * 10**5,
    "1," * 50_000,
    "<answer>" * 12_000,
    "</answer>" * 12_000,
    "<answer></answer>" * 6_000,
    "<reasoning>" + "</reasoning><answer>" * 5_000,
    "<reasoning>" * 9_000,
    "<reasoning>" + "</reasoning>" + " " * 10**5,
    "\n</answer>\n" * 10_000,
    "\\boxed{" * 14_000,
    "\\boxed{" * 14_000 + "}" * 14_000,
    "\\boxed " * 14_000,
    "\\boxed{}" * 12_000,
    "\\boxed{" + "(" * 10**5 + "}",
    "\\boxed{" + "{" * 40_000 + "17" + "}" * 40_000 + "}",
    "\\boxed{" + "\\frac{" * 160 + "1" + "}{2}" * 160 + "}",
    "\\boxed{" + "\\sqrt" * 190 + "}",
    "\\boxed{" + "\\frac1" * 160 + "}",
    "\\boxed{" + "\\text{" * 160 + "}" * 160 + "}",
    "\\boxed{" + "9" * 999 + "}",
    "\\boxed{" + "1/" * 450 + "1}",
    "\\boxed{\\frac{1}{0}}",
    "\\boxed{1/0}",
    "\\boxed{9^{9^{9^9}}}",
    "\\boxed{9^{9^9}}",
    "\\boxed{((9^{99})^{99})^{99}}",
    "\\boxed{9^99999999}",
    "\\boxed{(a+b+c+d+e+f)^{99}}",
    "\\boxed{10^9!}",
    "\\boxed{9!!!!!!}",
    "\\boxed{\\sum_{k=1}^{10^9} k}",
    "\\boxed{\\int_0^1 x^{x^x} dx}",
    "\\boxed{\\binom{10^9}{5}}",
    "\\boxed{" + "x," * 300 + "x}",
    "\\boxed{9**9**9**9}",
    "<answer>9**9**9**9</answer>",
    "<answer>(9**9)**(9**9)</answer>",
    "<answer>__import__('os').system('true')</answer>",
    "<answer>[x for x in range(10**10)]</answer>",
    "<answer>factorial(10**9)</answer>",
    "<answer>" + "[" * 4000 + "</answer>",
    "<answer>" + "-" * 900 + "1</answer>",
    "<answer>" + "(" * 450 + "1" + ")" * 450 + "</answer>",
    "\u0130<answer>\u0661\u0667</answer>\\boxed{\uff11\uff17}",
    "\\boxed{\u00b2}",
    "<answer>" + "$" * 10**5 + "</answer>",
    "<answer>" + "~\\," * 300 + "</answer>",
)
