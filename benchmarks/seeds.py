"""Mean and 95% interval over seeds of finished runs: python benchmarks/seeds.py WORKDIR [WORKDIR ...], the runs of one task and preset.

The interval is that of Student's t over the runs; each run's own summary.json holds bootstrap intervals over its test problems.
"""

import json
import sys
from pathlib import Path

import numpy as np

from diffpo_jax import pareto

ROWS = {  # what is printed: field of the summary's comparison, unit
    "accuracy at the learned thresholds": ("accuracy", "%"),
    "NFE at the learned thresholds": ("nfe", ""),
    "accuracy of the base model at that NFE": ("base_accuracy_at_same_nfe", "%"),
    "gain in accuracy at that NFE": ("gain", "%"),
    "NFE that the trained model needs for the base model's accuracy there": ("nfe_for_base_accuracy", ""),
    "NFE saved at that accuracy": ("nfe_saving_at_base_accuracy", "%"),
}


def main(workdirs: list[str]) -> None:
    summaries = [json.loads((Path(workdir) / "summary.json").read_text(encoding="utf-8")) for workdir in workdirs]
    tasks = {summary["task"] for summary in summaries}
    if len(tasks) != 1 or len(summaries) < 2:
        sys.exit(f"give at least 2 finished runs of one task; got {len(summaries)} of {', '.join(sorted(tasks))}")
    print(f"{tasks.pop()}, seeds {', '.join(str(summary['seed']) for summary in summaries)}")
    for title, (field, unit) in ROWS.items():
        scale = 100 if unit else 1
        values = [scale * float(summary["comparison"][field]) for summary in summaries]
        mean, half = pareto.t_interval(values)
        print(f"{title:70s} {mean:7.2f}{unit} ± {half:.2f}   ({', '.join(f'{value:.2f}' for value in values)})")
    print(f"denoiser calls of RL {np.mean([summary['denoiser_calls'] for summary in summaries]):,.0f}")


if __name__ == "__main__":
    main(sys.argv[1:])
