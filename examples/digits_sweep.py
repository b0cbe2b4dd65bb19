"""Which classifier reads handwritten digits best? A grid of 28 configurations, mapped over warm workers.

    python examples/digits_sweep.py            # twice: the second run finds environment and workers ready

The data are scikit-learn's 1,797 real scans of digits. scikit-learn is not installed here: ``dependencies=``
has the daemon build an environment for it, once.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from remoted_client import CpuLiveServerless, remote

OUTPUT = Path("demo-output")
SVC_GRID = [{"family": "svc", "x": c, "y": gamma} for c in (0.1, 1.0, 10.0, 100.0) for gamma in (0.0001, 0.0005, 0.001, 0.005)]
FOREST_GRID = [{"family": "forest", "x": trees, "y": depth} for trees in (10, 40, 100) for depth in (4, 8, 12, 16)]
LABELS = {"svc": ("C", "gamma"), "forest": ("trees", "depth")}

workers = CpuLiveServerless(name="digits_sweep", workersMax=2, idleTimeout=600)
packages = ["scikit-learn>=1.5", "matplotlib>=3.9"]
DIGITS: Any = None


def load_digits_once() -> Any:
    """Kept in the worker between calls: a module global stays warm."""
    global DIGITS
    if DIGITS is None:
        from sklearn.datasets import load_digits

        DIGITS = load_digits(return_X_y=True)
        print(f"loaded {len(DIGITS[0])} images")
    return DIGITS


@remote(resource_config=workers, dependencies=packages, timeout=600)
def evaluate(point: dict[str, Any]) -> dict[str, Any]:
    """Mean accuracy of one configuration over 5 folds."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import cross_val_score
    from sklearn.svm import SVC

    images, digits = load_digits_once()
    if point["family"] == "svc":
        model = SVC(C=point["x"], gamma=point["y"])
    else:
        model = RandomForestClassifier(n_estimators=point["x"], max_depth=point["y"], random_state=0)
    scores = cross_val_score(model, images, digits, cv=5)
    print(f"{point['family']:>6} {LABELS[point['family']][0]}={point['x']:<6g} {LABELS[point['family']][1]}={point['y']:<7g} accuracy {scores.mean():.4f}")
    return {**point, "accuracy": float(scores.mean()), "spread": float(scores.std())}


@remote(resource_config=workers, dependencies=packages)
def draw(results: list[dict[str, Any]]) -> bytes:
    """The accuracy grids of both families as a PNG."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for panel, family in zip(panels, LABELS, strict=True):
        points = [result for result in results if result["family"] == family]
        xs, ys = sorted({point["x"] for point in points}), sorted({point["y"] for point in points})
        found = {(point["x"], point["y"]): point["accuracy"] for point in points}
        grid = [[found[(x, y)] for x in xs] for y in ys]
        image = panel.imshow(grid, origin="lower", cmap="viridis", aspect="auto")
        panel.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
        panel.set_yticks(range(len(ys)), [f"{y:g}" for y in ys])
        panel.set(title=f"{family}: accuracy over 5 folds", xlabel=LABELS[family][0], ylabel=LABELS[family][1])
        middle = (max(map(max, grid)) + min(map(min, grid))) / 2
        for row, values in enumerate(grid):
            for column, value in enumerate(values):
                panel.text(column, row, f"{value:.3f}", ha="center", va="center", color="black" if value > middle else "white")
        figure.colorbar(image, ax=panel)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def sweep() -> tuple[list[dict[str, Any]], set[str]]:
    """Every configuration's result, and the workers that made them."""
    results, used = [], set()
    for job in evaluate.map(SVC_GRID + FOREST_GRID, progress=True):
        results.append(job.unwrap())
        used.add(job.worker_id)
    return results, used


def print_table(results: list[dict[str, Any]]) -> None:
    print("\n  family   first        second         accuracy")
    for result in sorted(results, key=lambda result: -result["accuracy"])[:8]:
        first, second = LABELS[result["family"]]
        print(f"  {result['family']:<8} {first}={result['x']:<8g} {second}={result['y']:<9g} {result['accuracy']:.4f} ± {result['spread']:.4f}")


def compare(seconds: float, used: set[str]) -> None:
    """What the warm environment and workers saved, measured against the run before."""
    record = OUTPUT / "last_run.json"
    before = json.loads(record.read_text(encoding="utf-8")) if record.exists() else None
    print(f"\n{len(SVC_GRID + FOREST_GRID)} configurations in {seconds:.1f} s on workers {', '.join(sorted(used))}")
    if before is not None:
        same = used & set(before["workers"])
        print(f"the run before took {before['seconds']:.1f} s: this one was {before['seconds'] / seconds:.2f} x as fast; the same workers: {', '.join(sorted(same)) or 'none'}")
    record.write_text(json.dumps({"seconds": seconds, "workers": sorted(used)}), encoding="utf-8")


def main() -> None:
    OUTPUT.mkdir(exist_ok=True)
    began = time.perf_counter()
    results, used = sweep()
    picture = draw(results).result().unwrap()
    seconds = time.perf_counter() - began
    (OUTPUT / "accuracy.png").write_bytes(picture)
    (OUTPUT / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    print_table(results)
    compare(seconds, used)
    print(f"the grid as a picture: {OUTPUT / 'accuracy.png'}")


if __name__ == "__main__":
    sys.exit(main())
