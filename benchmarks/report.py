"""One self-contained HTML page of a comparison, from results and pictures."""

import base64
import html
from pathlib import Path
from typing import Any

from benchmarks import summary

CAPTIONS = {
    "metrics": "Test metric of each task after the last step, best Δm first.",
    "ranks": "Mean rank of each strategy. The grey band is Nemenyi's critical difference from the "
    "best, with each task of each seed as a block; seeds share their data, so it is too narrow "
    "rather than too wide.",
    "plane": "The first two metrics against each other. Bars are one standard error. Grey crosses "
    "are single runs of the grid of random static weights: what fixed weights alone can reach.",
    "losses": "Training loss of each task, for the baselines and the best strategies.",
    "weights": "Each task's share of the weights during training, for the strategies that keep "
    "weights, baselines first, then the best. Others combine gradients without any.",
    "cosines": "Cosines of the tasks' gradients on the same training examples at every checkpoint; "
    "below 0 the tasks conflict. Baselines first, then the best strategies.",
}

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
caption { text-align: left; padding-bottom: .5rem; color: #444; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right;
         white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #333; vertical-align: bottom; }
tr.reference td, tr.reference th { background: #f2f2f2; }
tbody th { font-weight: 600; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; }
figcaption { color: #444; font-size: .92rem; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; }
.conclusion { border-left: 4px solid #0072B2; padding: .5rem 1rem; background: #f4f8fb;
              font-weight: 500; }
"""


def write(results: dict[str, Any], pictures: dict[str, Path], path: Path) -> None:
    """Writes the page to `path`; it loads nothing from elsewhere."""
    dataset, settings = results["dataset"], results["settings"]
    title = f"Multi-task strategies on {dataset['title']}"
    figures = "".join(_figure(name, picture) for name, picture in pictures.items())
    path.write_text(
        f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title><style>{STYLE}</style></head>
<body>
<h1>{html.escape(title)}</h1>
<p>{html.escape(dataset["source"])}; {dataset["num_train"]:,} training,
{dataset["num_validation"]:,} validation and {dataset["num_test"]:,} test examples. One trunk of
dense layers {_sizes(settings["hidden"])} for all tasks and a linear head for each, trained for
{settings["steps"]:,} steps of {settings["batch_size"]} examples with Adam, with
{settings["seeds"]} seeds.</p>
<p class="conclusion">{html.escape(summary.conclusion(results))}</p>
<h2>Results</h2>
<div class="scroll">{_table(results)}</div>
<h2>How to read it</h2>
<ul>
<li><strong>Δm</strong> is the mean relative change of the metrics against {_baseline(results)},
seed by seed, in percent: 100/K Σ ±(M<sub>k</sub> − B<sub>k</sub>)/|B<sub>k</sub>| (Maninis et al.,
2019). Positive is better.</li>
<li><strong>Δm vs equal</strong> and <strong>vs tuned</strong> are a strategy's Δm minus that of
equal weights and of tuned static weights, seed by seed. An arrow says that
the mean is more than two standard errors from 0, ↑ better or ↓ worse.</li>
<li><strong>Tuned weights</strong> never change: the best on the validation set of
{settings["candidates"]} random points of the simplex (Kurin et al., 2022; Xin et al., 2022).</li>
<li><strong>Learning rate</strong>: every line got its own from {_rates(settings)}, the one with the
best Δm on the validation set; it falls to 0 along a cosine. Otherwise every strategy has its
default options, but for what it must be told: DWA the length of an epoch, GradNorm to measure
gradients at the last shared layer, uncertainty the kind of each loss, and <code>weights</code>,
fixed by the user, to count {html.escape(dataset["tasks"][0])} three times as much as any other
task. Strategies that need several batches get the halves of one. The metric is that of the last
step.</li>
<li><strong>±</strong> is one standard error of the mean over seeds. A seed sets the initial weights
and the order of the data, the same for all strategies; it does not change the test examples, so
the error does not cover the choice of test set.</li>
<li><strong>Mean rank</strong> is that among all strategies, over tasks.
<strong>Hypervolume</strong> is the area between a run's two metrics and the worst of all runs.</li>
<li><strong>flops and time</strong> are those of a training step relative to the plain step,
<code>jax.grad</code> of the summed losses with the same optimizer: flops as the compiler counts
them (a loop inside a strategy's solver counts as one turn), time as a ratio of medians, with the
plain step run in between. Time depends on the machine.</li>
</ul>
<h2>Pictures</h2>
{figures}
<h2>Reproduce</h2>
<pre>{html.escape(results["command"])}</pre>
<div class="scroll"><table><tbody>{_versions(results)}</tbody></table></div>
</body></html>
""",
        encoding="utf-8",
    )


def _table(results: dict[str, Any]) -> str:
    header, *body = summary.cells(results)
    head = "".join(
        f'<th scope="col">{html.escape(cell).replace(chr(10), "<br>")}</th>' for cell in header
    )
    references = (summary.SINGLE_TASK, results["equal_weights"], results["tuned_weights"])
    lines = []
    for row, (first, *rest) in zip(summary.rows(results), body, strict=True):
        kind = "reference" if row.name in references else ""
        numbers = "".join(f"<td>{html.escape(cell)}</td>" for cell in rest)
        lines.append(f'<tr class="{kind}"><th scope="row">{html.escape(first)}</th>{numbers}</tr>')
    return (
        "<table><caption>Test metrics after the last step, best Δm first; the references are "
        f"shaded.</caption><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    )


def _figure(name: str, picture: Path) -> str:
    data = base64.b64encode(picture.read_bytes()).decode()
    caption = html.escape(CAPTIONS[name])
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>\n"
    )


def _versions(results: dict[str, Any]) -> str:
    return "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in results["versions"].items()
    )


def _baseline(results: dict[str, Any]) -> str:
    if not results["single_task"]:
        return "equal weights"
    return "single-task models of the same size (which have K times the parameters)"


def _rates(settings: dict[str, Any]) -> str:
    return ", ".join(f"{rate:g}" for rate in settings["learning_rates"])


def _sizes(hidden: list[int]) -> str:
    return " and ".join(map(str, hidden))
