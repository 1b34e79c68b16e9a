"""A single evaluation's section: its metrics by pack and block length, and its planes."""

from __future__ import annotations

from softprune.evaluate.evaluation import Evaluation
from softprune.evaluate.served import mask_name
from softprune.report.numbers import fixed, kept, number, percent, plural, short
from softprune.report.page import Section, Summary, render
from softprune.report.planes import P_LABELS, Landscape, landscapes, marginals
from softprune.report.table import Cell, Table


def landscape(of: Evaluation, key: tuple[str, int], title: str, thresholds: tuple[float, float]) -> Landscape:
    """The plane of one pack at one block length, with thresholds of confident conflict."""
    plane = of.plane
    return Landscape(title, of.cells[key].counts, plane.x_edges, plane.y_edges, P_LABELS[plane.scale], thresholds=thresholds)


def evaluation_section(of: Evaluation, name: str, id_: str) -> tuple[Summary, Section]:
    """The section of an evaluation that is compared with nothing."""
    first = next(iter(of.cells.values()))
    sentence = (
        f"{of.label}: PPL {number(first.metrics['ppl'])} on {first.pack}@{first.seq_len}, {first.tokens:,} completion tokens; "
        f"{plural(len(of.cells), 'row')} in all. Nothing was judged: a gate needs a base beside it (--base)."
    )
    shown = []
    for key, cell in of.cells.items():
        land = landscape(of, key, f"{cell.pack}@{cell.seq_len}", (cell.metrics["x_thr"], cell.metrics["h_thr"]))
        shown.append((land.title, landscapes([land]) + marginals([land])))
    body = render("evaluation.html", facts=_facts(of), table=metrics_table(of), shown=shown)
    return Summary("", sentence), Section(id_, f"Evaluation: {name}", body)


def metrics_table(of: Evaluation) -> Table:
    """Metrics by pack and block length."""
    columns = (
        "pack @ block length", "completion tokens", "PPL", "mean NLL, nats", "mean p", "mean H", "confident conflicts, own thresholds",
        "threshold of p", "threshold of H",
    )  # fmt: skip
    rows = []
    for cell in of.cells.values():
        found = cell.metrics
        rows.append([
            Cell(f"{cell.pack}@{cell.seq_len}"), Cell(f"{cell.tokens:,}"), Cell(number(found["ppl"])), Cell(fixed(found["mean_nll"])),
            Cell(fixed(found["mean_prob"])), Cell(fixed(found["mean_entropy"])), Cell(percent(found["cc_rate"], 3)),
            Cell(fixed(of.plane.p_of(found["x_thr"]))), Cell(fixed(found["h_thr"])),
        ])  # fmt: skip
    return Table("By pack and block length", columns, rows)


def _facts(of: Evaluation) -> list[tuple[str, str]]:
    own, meta = of.own, of.meta
    known = own.get("fingerprint") is not None
    engine = " ".join(str(part) for part in (meta.get("engine"), meta.get("vllm_version") or meta.get("sglang_version")) if part)
    return [
        ("Model", of.label),
        ("Weights' fingerprint", short(own.get("fingerprint") or "unknown", 19)),
        ("Mask", short(mask_name(own.get("mask"), own.get("fingerprint")), 19)),
        ("Experts kept a layer", kept(own.get("num_kept")) if known else "unknown"),
        ("Experts per token", str(meta.get("top_k", "–"))),
        ("Engine", engine or "–"),
        ("Blocks of each pack", f"{meta['num_blocks']}, form {own.get('block_form', 'L')}"),
        ("H", f"of the {meta['entropy_topk']} likeliest tokens, normalised"),
        ("Tokenizer", short(own.get("tokenizer_sha256"))),
        ("Date", str(own.get("date") or meta.get("run_id") or "–")),
    ]
