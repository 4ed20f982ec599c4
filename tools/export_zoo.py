"""Train networks as PyTorch exports them, hold each gradient against PyTorch's, and write docs/EXPORTS.md.

    python tools/export_zoo.py [NETWORK ...] [--exporter dynamo] [--missing] [--jobs 2] [--write]

A row takes seconds, all of them an hour or so.  Rows are kept in docs/exports.json as they come; those that are not
named stay, and ``--missing`` leaves out the ones that are right there.  ``--write`` alone of all options with no row to
do writes the page anew.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DATA, PAGE = ROOT / "docs" / "exports.json", ROOT / "docs" / "EXPORTS.md"
EXPORTERS = ("torchscript", "dynamo", "torchscript-dynamic", "dynamo-dynamic", "dynamo-raw")
COLUMNS = (
    "family", "network", "exporter", "opset", "vertices", "K", "identities", "parameters", "float64", "float32",
    "PyTorch's float32", "status",
)  # fmt: skip


def main() -> int:
    """Examine, print and write.  1 if a row is neither right nor the exporter's own failure."""
    from tests.networks import NETWORKS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--exporter", choices=EXPORTERS, help="this one alone")
    parser.add_argument("--missing", action="store_true", help="only what is not right already")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--write", action="store_true", help="write the page")
    given = parser.parse_args()
    unknown = set(given.networks) - set(NETWORKS)
    if unknown:
        parser.error(f"no network {', '.join(sorted(unknown))}; there are {', '.join(NETWORKS)}")
    rows = read()
    chosen = [k for k in cases() if (not given.networks or k[0] in given.networks) and given.exporter in (None, k[1])]
    if given.networks and given.exporter:
        chosen = [(n, given.exporter) for n in given.networks]
    if given.missing:
        chosen = [k for k in chosen if k not in rows or not settled(rows[k]["status"])]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(given.jobs, spawn, max_tasks_per_child=60) as pool:
        waiting = {pool.submit(examine, *k): k for k in chosen}
        for done in concurrent.futures.as_completed(waiting):
            key = waiting[done]
            try:
                rows[key] = done.result()
            except concurrent.futures.process.BrokenProcessPool:
                rows.setdefault(key, {"network": key[0], "exporter": key[1], "status": "crash: the process ended"})
            print(*key, rows[key]["status"], flush=True)
            save(rows)
    if given.write:
        PAGE.write_text(page(rows), encoding="utf-8")
    return 0 if all(settled(rows[k]["status"]) for k in chosen) else 1


def cases() -> list[tuple[str, str]]:
    """(network, exporter): both exporters for each, one of each family with symbolic sizes and one as traced.

    Families take turns, so that a run that is cut off has seen all of them.
    """
    from tests.networks import NETWORKS

    families: dict[str, list[str]] = {}
    for name, network in NETWORKS.items():
        families.setdefault(network.kind, []).append(name)
    turns = [(k, name) for names in families.values() for k, name in enumerate(names)]
    turns.sort(key=lambda turn: turn[0])
    made = [(name, exporter) for _, name in turns for exporter in EXPORTERS[:2]]
    return made + [(names[0], exporter) for names in families.values() for exporter in EXPORTERS[2:]]


def examine(network: str, exporter: str) -> dict[str, Any]:
    """One row, in a process of its own."""
    import torch

    from tests.export_zoo import examine as run

    torch.set_num_threads(1)
    return dataclasses.asdict(run(network, exporter))


def settled(status: str) -> bool:
    """Whether a row needs nothing more of zilc."""
    return status == "right" or status.startswith("exporter:")


def read() -> dict[tuple[str, str], dict[str, Any]]:
    if not DATA.exists():
        return {}
    return {(r["network"], r["exporter"]): r for r in json.loads(DATA.read_text(encoding="utf-8"))["rows"]}


def save(rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "onnx", "onnxscript")}
    kept = [rows[k] for k in sorted(rows)]
    lines = ",\n".join(json.dumps(r) for r in kept)
    DATA.write_text(f'{{"versions": {json.dumps(versions)}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")


def page(rows: dict[tuple[str, str], dict[str, Any]]) -> str:
    raise NotImplementedError


if __name__ == "__main__":
    sys.exit(main())
