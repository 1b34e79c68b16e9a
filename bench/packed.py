"""Many raw documents of one kind of server as one small file to commit, and back.

What the documents of a server share (engine, flags, GPU, model) is there once. Left out are the records of single requests ("streams"):
the figures of every pass are made of them, and stay.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

FORMAT, VERSION = "softprune.gpu-matrix", 1
HEAD = ("engine", "model", "server_flags", "gpu")
LEFT_OUT = "streams, the records of single requests"


def packed(documents: Iterable[Mapping[str, Any]], what: str, compared: list[dict[str, Any]]) -> dict[str, Any]:
    """One document of many.

    Args:
        documents: raw documents with the fields of `HEAD`, of `bench decode` or `bench max-batch`.
        what: said of them.
        compared: ratios made of them, in the form that `softprune.bench.report_rows` reads.
    """
    servers: dict[str, Any] = {}
    rows = []
    for document in documents:
        head = {name: document[name] for name in HEAD}
        key = next((known for known, other in servers.items() if other == head), f"server {len(servers) + 1}")
        servers[key] = head
        rest = copy.deepcopy({name: value for name, value in document.items() if name not in HEAD})
        for result in [*rest.get("results", []), rest.get("result")]:
            for repeat in (result or {}).get("repeats", []):
                repeat.pop("streams", None)
        rows.append({"server": key, **rest})
    return {
        "format": FORMAT, "version": VERSION, "what": what, "left_out": LEFT_OUT, "servers": servers, "documents": rows,
        "compared": compared,
    }  # fmt: skip


def unpacked(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The raw documents again, without what was left out."""
    return [{**document["servers"][row["server"]], **{k: v for k, v in row.items() if k != "server"}} for row in document["documents"]]
