"""One self-contained HTML page of a comparison, from results and pictures."""

import base64
import html
from pathlib import Path
from typing import Any

from mtl_optax.compare import _store as store, _summary as summary

CAPTIONS = {
    "gains": "Δm of each strategy minus that of equal weights, seed by seed, with its 95 % "
    "interval. Filled: told apart from equal weights, after Holm's correction.",
    "metrics": "Test metric of each task at the best validation checkpoint, best Δm first.",
    "plane": "The first two metrics against each other, with 95 % intervals. Grey crosses are "
    "static weights at each learning rate: what fixed weights alone can reach.",
    "losses": "Training loss of each task, for the baselines and the best strategies.",
    "norms": "Norms of the tasks' gradients at every checkpoint. Baselines first, then the best.",
    "cosines": "Cosines of the tasks' gradients on the same training examples at every checkpoint; "
    "below 0 the tasks conflict. Baselines first, then the best strategies.",
    "weights": "Each task's share of the weights during training, for the strategies that keep "
    "weights, baselines first, then the best. Others combine gradients without any.",
}

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 84rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
p, li, figcaption { max-width: 46rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .86rem; }
caption { text-align: left; padding-bottom: .5rem; color: #444; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: right;
         white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #333; vertical-align: bottom; }
tr.reference td, tr.reference th { background: #f2f2f2; }
tbody th { font-weight: 600; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; }
figcaption { color: #444; font-size: .92rem; }
pre { background: #f5f5f5; padding: .8rem; white-space: pre-wrap; }
@media (max-width: 80rem) {  /* a narrow screen: a line of the table becomes a card */
  .results thead { display: none; }
  .results tr { display: block; border-bottom: 2px solid #333; padding: .4rem 0; }
  .results th, .results td { display: flex; justify-content: space-between; border: 0;
                             white-space: normal; }
  .results td:empty { display: none; }
  .results td::before { content: attr(data-label); color: #444; padding-right: 1rem; }
}
.conclusion { border-left: 4px solid #0072B2; padding: .5rem 1rem; background: #f4f8fb;
              font-size: 1.1rem; font-weight: 500; }
"""


def write(results: dict[str, Any], pictures: dict[str, bytes], path: Path) -> None:
    """Writes the page to `path`; it loads nothing from elsewhere."""
    store.write(path, page(results, pictures).encode("utf-8"))


def page(results: dict[str, Any], pictures: dict[str, bytes]) -> str:
    """The page, with its pictures inside."""
    problem, settings = results["problem"], results["settings"]
    title = f"Multi-task strategies on {problem['title']}"
    figures = "".join(_figure(name, picture) for name, picture in pictures.items())
    beside = "".join(f"<p>{html.escape(note)}</p>" for note in summary.notes(results))
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title><style>{STYLE}</style></head>
<body>
<h1>{html.escape(title)}</h1>
<p class="conclusion">{html.escape(summary.answer(results))}</p>
{beside}
<h2>Why</h2>
{_why(results["diagnosis"])}
<h2>Results</h2>
{table(results)}
<p>{html.escape(_about(problem))} Trained for {settings["steps"]:,} steps with
{settings["seeds"]:d} seeds.</p>
<h2>How to read it</h2>
<ul>
<li><strong>Δm</strong> is the mean relative change of the metrics against {_baseline(results)},
seed by seed, in percent: 100/K Σ ±(M<sub>k</sub> − B<sub>k</sub>)/|B<sub>k</sub>| (Maninis et al.,
2019), divided by no less than a tenth of the mean over the seeds. Positive is better.
<strong>best</strong> is at the checkpoint that is best on the validation set, as are the metrics;
<strong>at end</strong> is after the last step.</li>
<li><strong>Δm vs equal</strong> and <strong>vs tuned</strong> are a strategy's Δm minus that of
equal weights and of tuned static weights, seed by seed. An arrow says that the difference is told
apart from 0 at 5 %, ↑ better or ↓ worse: Student's t over the seeds, paired, with Holm's correction
over all differences of the table.</li>
<li><strong>±</strong> is half the 95 % interval of the mean by Student's t over seeds, not
corrected for the number of strategies. A seed sets the initial parameters and the order of the
data, the same for all strategies; it does not change the test examples, so the interval does not
cover the choice of a test set.</li>
<li><strong>Tuned weights</strong> never change: the best on the validation set of equal weights,
one over the initial losses, and random points, half of them times the inverse initial losses (Kurin
et al., 2022; Xin et al., 2022). On the validation set they are never worse than equal weights.</li>
<li><strong>Trials</strong>: every line got its own learning rate from {_rates(settings)}, the
best on the validation set{_tuning(settings)}; tuned weights had at least as many trials as any
strategy.</li>
<li><strong>Mean rank</strong> is that among all strategies, over metrics.
<strong>Hypervolume</strong> is the area between a run's two metrics and the worst of all runs.</li>
<li><strong>flops and time</strong> are those of a training step relative to the plain step,
<code>jax.grad</code> of the summed losses with the same optimizer: flops as the compiler counts
them (a loop inside a strategy's solver counts as one turn), time as a ratio of medians, shown only
where two runs of the plain step agree within 5 % and as many models were trained side by
side.</li>
</ul>
<h2>Pictures</h2>
{figures}
<h2>Reproduce</h2>
{_command(results)}
<table><tbody>{_versions(results)}</tbody></table>
</body></html>
"""


def table(results: dict[str, Any]) -> str:
    """The table of results in HTML; on a narrow screen each line becomes a card."""
    header, *body = zip(*[cells for _, cells in summary.columns(results)], strict=True)
    head = "".join(
        f'<th scope="col">{html.escape(cell).replace(chr(10), "<br>")}</th>' for cell in header
    )
    labels = [html.escape(cell.replace("\n", " ")) for cell in header]
    lines = []
    for row, (first, *rest) in zip(summary.rows(results), body, strict=True):
        kind = "reference" if row.kind in ("reference", "baseline") else ""
        numbers = "".join(
            f'<td data-label="{label}">{html.escape(cell)}</td>'
            for label, cell in zip(labels[1:], rest, strict=True)
        )
        lines.append(f'<tr class="{kind}"><th scope="row">{html.escape(first)}</th>{numbers}</tr>')
    return (
        '<table class="results"><caption>Test metrics, best Δm first; the references are shaded.'
        f"</caption><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    )


def _why(diagnosis: dict[str, Any]) -> str:
    reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in diagnosis["reasons"])
    return (
        f"<p>Under equal weights: {html.escape(diagnosis['says'])} "
        f"{html.escape(diagnosis['advice'])}</p><ul>{reasons}</ul>"
    )


def _about(problem: dict[str, Any]) -> str:
    counts = [
        f"{problem[f'num_{split}']:,} {name} examples"
        for split, name in (("train", "training"), ("validation", "validation"), ("test", "test"))
        if problem[f"num_{split}"] is not None
    ]
    source = [problem["source"]] * bool(problem["source"])
    return f"{'; '.join([*source, ', '.join(counts)])}. {problem['num_parameters']:,} parameters."


def _figure(name: str, picture: bytes) -> str:
    data = base64.b64encode(picture).decode()
    caption = html.escape(CAPTIONS[name])
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>\n"
    )


def _command(results: dict[str, Any]) -> str:
    command = results.get("command")
    return f"<pre>{html.escape(str(command))}</pre>" if command else ""


def _versions(results: dict[str, Any]) -> str:
    return "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in results["versions"].items()
    )


def _baseline(results: dict[str, Any]) -> str:
    if not results["single_task"]:
        return "equal weights"
    return "the same model trained on one task alone (K models have K times the parameters)"


def _rates(settings: dict[str, Any]) -> str:
    return ", ".join(f"{rate:g}" for rate in settings["learning_rates"])


def _tuning(settings: dict[str, Any]) -> str:
    return " (and options from a small grid)" if settings["tune"] else "; options were not tuned"
