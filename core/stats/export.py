"""Statistics as a table for pandas, Polars or DuckDB."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from softprune.files import replaced_after
from softprune.stats.errors import StatisticsError
from softprune.stats.file import Statistics
from softprune.stats.header import FORMAT, KINDS, PHASES
from softprune.stats.layout import SPECS


def table(statistics: Statistics) -> pa.Table:
    """Long form: one row for each layer, expert, tag and phase.

    Quantities that are told apart by phase stand in rows with phase "prefill" and "decode"; those that are not stand in rows
    whose phase is null; a quantity is null in the other rows. So every column adds up to its tensor. Of the EAFT grid, the sums
    over its cells are given, one column a kind. What is not by expert (co-activation, confidence, the plane) is left out.
    """
    header, tensors = statistics.header, statistics.tensors
    phased = {name: tensors[name] for name in tensors if SPECS[name].axes == ("tag", "phase", "layer", "expert")}
    plain = {name: tensors[name] for name in tensors if SPECS[name].axes == ("tag", "layer", "expert")}
    for name in ("eaft.grid_count", "eaft.grid_gate_norm"):
        if name in tensors:
            cells = tensors[name].sum((-2, -1))
            plain |= {f"{name}_{kind}": cells[:, k] for k, kind in enumerate(KINDS)}
    phases: list[str | None] = [*(PHASES if phased else ()), *([None] if plain else [])]
    size = (len(header.tags), len(phases), header.model.num_layers, header.model.num_experts)
    tag, phase, layer, expert = (axis.ravel() for axis in np.indices(size, np.int32))
    columns: dict[str, Any] = {
        "layer": layer,
        "expert": expert,
        "tag": pa.DictionaryArray.from_arrays(tag, header.tags),
        "phase": pa.DictionaryArray.from_arrays(pa.array(phase, mask=np.array([name is None for name in phases])[phase]), list(PHASES)),
    }
    for quantities, rows in ((phased, slice(0, len(PHASES))), (plain, slice(len(phases) - 1, len(phases)))):
        for name, values in quantities.items():
            wide, missing = np.zeros(size, values.dtype), np.ones(size, bool)
            wide[:, rows] = values if values.ndim == len(size) else values[:, None]
            missing[:, rows] = False
            columns[name.replace(".", "_")] = pa.array(wide.ravel(), mask=missing.ravel())
    return pa.table(columns).replace_schema_metadata({FORMAT: header.dump()})


def export(statistics: Statistics, path: Path) -> int:
    """Write the table as Parquet (zstd), the header as JSON in its schema's metadata.

    Returns:
        Number of rows.

    Raises:
        StatisticsError: the file cannot be written.
    """
    rows = table(statistics)
    try:
        with replaced_after(path) as temporary:
            pq.write_table(rows, temporary, compression="zstd")
    except OSError as error:
        raise StatisticsError(str(path), "", error.strerror or str(error), "a place that can be written") from None
    return int(rows.num_rows)
