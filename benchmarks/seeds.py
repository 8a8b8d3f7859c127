"""Mean and 95% interval over seeds of finished runs: python benchmarks/seeds.py WORKDIR [WORKDIR ...], the runs of one task and preset.

The interval is that of Student's t over the runs; each run's own summary.json holds bootstrap intervals over its test problems.
"""

import json
import sys
from pathlib import Path

import numpy as np

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # two-sided, by number of runs
ROWS = {  # what is printed: field of the summary's comparison, unit
    "accuracy at the learned thresholds": ("accuracy", "%"),
    "NFE at the learned thresholds": ("nfe", ""),
    "accuracy of the base model at that NFE": ("base_accuracy_at_same_nfe", "%"),
    "gain in accuracy at that NFE": ("gain", "%"),
    "NFE that the trained model needs for the base model's accuracy there": ("nfe_for_base_accuracy", ""),
    "NFE saved at that accuracy": ("nfe_saving_at_base_accuracy", "%"),
}


def interval(values: list[float]) -> tuple[float, float]:
    """(mean, half width of the 95% interval) of 2 to 10 values."""
    values = np.asarray(values, float)
    return float(values.mean()), float(T_95[len(values)] * values.std(ddof=1) / len(values) ** 0.5)


def main(workdirs: list[str]) -> None:
    summaries = [json.loads((Path(workdir) / "summary.json").read_text(encoding="utf-8")) for workdir in workdirs]
    tasks = {summary["task"] for summary in summaries}
    if len(tasks) != 1 or len(summaries) not in T_95:
        sys.exit(f"give 2 to 10 finished runs of one task; got {len(summaries)} of {', '.join(sorted(tasks))}")
    print(f"{tasks.pop()}, seeds {', '.join(str(summary['seed']) for summary in summaries)}")
    for title, (field, unit) in ROWS.items():
        scale = 100 if unit else 1
        values = [scale * float(summary["comparison"][field]) for summary in summaries]
        mean, half = interval(values)
        print(f"{title:70s} {mean:7.2f}{unit} ± {half:.2f}   ({', '.join(f'{value:.2f}' for value in values)})")
    print(f"denoiser calls of RL {np.mean([summary['denoiser_calls'] for summary in summaries]):,.0f}")


if __name__ == "__main__":
    main(sys.argv[1:])
