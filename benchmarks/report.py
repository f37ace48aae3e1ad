"""One self-contained HTML page of a comparison, from results and pictures."""

import base64
import html
from pathlib import Path
from typing import Any

from benchmarks import summary

CAPTIONS = {
    "accuracy": "Test metric of each task after the last step; bars are one standard error.",
    "plane": "The first two tasks against each other; up and to the right is better on both. "
    "Bars are one standard error.",
    "weights": "Each task's share of the weights during training, for the strategies that keep "
    "weights. Strategies that are missing here combine gradients without any, or have none that "
    "change.",
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
<p>{html.escape(dataset["source"])}; {dataset["num_train"]:,} training and {dataset["num_test"]:,}
test images. One trunk of dense layers {_sizes(settings["hidden"])} for all tasks and a linear head
for each, trained for {settings["steps"]:,} steps of {settings["batch_size"]} examples with Adam
(learning rate {settings["learning_rate"]:g}, falling to 0 along a cosine), with
{settings["seeds"]} seeds.</p>
<p class="conclusion">{html.escape(summary.conclusion(results))}</p>
<h2>Results</h2>
<div class="scroll">{_table(results)}</div>
<h2>How to read it</h2>
<ul>
<li><strong>Δm</strong> is the mean relative change of the tasks' metrics against single-task models
of the same size, seed by seed, in percent: 100/K Σ (M<sub>k</sub> − B<sub>k</sub>)/B<sub>k</sub>
(Maninis et al., 2019). Positive is better than training each task alone, with K times the
parameters.</li>
<li><strong>Δm vs equal weights</strong> is a strategy's Δm minus that of equal weights, seed by
seed. It says <em>better</em> or <em>worse</em> where the mean is more than two standard errors from
0.</li>
<li><strong>±</strong> is one standard error of the mean over seeds. A seed sets the initial weights
and the order of the data, the same for all strategies; it does not change the test images, so the
error does not cover the choice of test set.</li>
<li><strong>flops and time</strong> are those of a training step relative to the plain step,
<code>jax.grad</code> of the summed losses with the same optimizer: flops as the compiler counts
them (a loop inside a strategy's solver counts as one turn), time as the median of
{len(results["checkpoint_steps"])} rounds in which all strategies took turns. Time depends on the
machine.</li>
<li>Adam divides out a constant scale, so one learning rate is fair to strategies that return a
sum, a mean or a unit vector. It follows a changing scale with a lag: where the sum of the weights
grows in training (uncertainty) its steps are a little longer, where it shrinks (DTP, whose weights
fall as accuracy rises) they are shorter, and part of a difference may come from that.</li>
<li>The default learning rate was chosen for equal weights and single-task models. Every strategy
has its default options, but for what it must be told: DWA the length of an epoch, GradNorm to
measure gradients at the last shared layer, uncertainty the kind of each loss, and
<code>weights</code>, fixed by the user, to count {html.escape(sorted(dataset["tasks"])[0])} three
times as much as any other task. The metric is that of the last step.</li>
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
    lines = []
    for row, (first, *rest) in zip(summary.rows(results), body, strict=True):
        kind = "reference" if row.name in (summary.SINGLE_TASK, results["equal_weights"]) else ""
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
    seconds = results["seconds"]
    lines = {
        **results["versions"],
        "time": f"{seconds['compile']:.0f} s compiling, {seconds['train']:.0f} s training",
    }
    return "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in lines.items()
    )


def _sizes(hidden: list[int]) -> str:
    return " and ".join(map(str, hidden))
