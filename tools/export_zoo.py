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
import os
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.export_zoo import EXPORTERS, cases  # noqa: E402
from tests.export_zoo import examine as run  # noqa: E402
from tests.networks import NETWORKS  # noqa: E402

DATA, PAGE = ROOT / "docs" / "exports.json", ROOT / "docs" / "EXPORTS.md"
COLUMNS = (
    "network", "exporter", "opset", "vertices", "K", "identities", "parameters", "float64", "float32",
    "PyTorch's float32", "status",
)  # fmt: skip
HEAD = """# Networks as PyTorch exports them

Small networks of every family, each parameter and statistic random, by `torch.onnx.export` with its defaults:
`torchscript` and `dynamo`; `-dynamic` with symbolic sizes; `-raw` with `optimize=False`, which keeps the traced names.

- **float64**: the largest error of a trained tensor's gradient against PyTorch running the exported file itself, with
  the tensors the exporter made of the parameters (BatchNormalization folded, equal constants merged). At most 1e-12,
  and Z-IL and backpropagation agree bit by bit.
- **float32**: the largest error against the original module in float64, of the parameters whose numbers are all found
  in the file; beside it PyTorch's own float32 error, where that is less than half of it the larger of that and of
  PyTorch's error on the exported file (folding makes other products). At most twice that, plus 2 ulp times the root
  of K.
- *Error*: the norm of the difference relative to the gradient's, or to 1e-6 of the network's largest gradient.
- *exporter: ...*: PyTorch's exporter fails, or writes a file that does not run or computes something else.

Made by `python tools/export_zoo.py --write` (`make zoo`); the rows lie in `docs/exports.json`.

"""


#: Rows that one process examines.
PER_PROCESS = 30


def main() -> int:
    """Examine, print and write.  1 if a row is neither right nor the exporter's own failure."""
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
    # Processes grow with what they have compiled.  Pools follow each other, as max_tasks_per_child deadlocks a pool of
    # few processes: its last one leaves, and nothing starts the next.
    size = PER_PROCESS * given.jobs
    for part in (chosen[k : k + size] for k in range(0, len(chosen), size)):
        with concurrent.futures.ProcessPoolExecutor(given.jobs, spawn, quiet) as pool:
            waiting = {pool.submit(examine, *k): k for k in part}
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


def examine(network: str, exporter: str) -> dict[str, Any]:
    """One row, in a process of its own."""
    torch.set_num_threads(1)
    return dataclasses.asdict(run(network, exporter))


def quiet() -> None:
    """A failing exporter prints the whole graph, past Python's own streams."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


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
    """The page: what was run, what came out, a table a family."""
    versions = json.loads(DATA.read_text(encoding="utf-8"))["versions"]
    order = {k: n for n, k in enumerate(cases())}
    known = [rows[k] for k in sorted(rows, key=lambda k: (k not in order, k[0], EXPORTERS.index(k[1])))]
    made = [r for r in known if not r["status"].startswith("exporter:")]
    right = [r for r in made if r["status"] == "right"]
    names = {r["network"] for r in right}
    lines = [
        HEAD,
        f"{len(known)} exports of {len({r['network'] for r in known})} networks: {len(right)} right, of {len(names)}"
        f" networks; {len(made) - len(right)} not right; {len(known) - len(made)} that PyTorch's exporter itself fails"
        " at.",
        "",
        "Versions: " + ", ".join(f"{n} {v}" for n, v in versions.items()) + ".",
    ]
    if right:
        worst = max(right, key=lambda r: r["exact"])
        lines += ["", f"The largest float64 error is {worst['exact']:.1e} ({worst['network']}, {worst['exporter']})."]
    families = {r["kind"]: None for r in sorted(known, key=lambda r: list(NETWORKS).index(r["network"]))}
    for family in families:
        lines += ["", f"## {family.capitalize()}", "", "| " + " | ".join(COLUMNS) + " |", "| --- " * len(COLUMNS) + "|"]
        lines += [_line(r) for r in known if r["kind"] == family]
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any]) -> str:
    failed = row["status"].startswith("exporter:")
    counts = [row[k] for k in ("vertices", "levels", "identities", "parameters")]
    numbers = [f"{x:.1e}" if x is not None else "" for x in (row["exact"], row["single"], row["theirs"])]
    status = re.sub(r"(/[\w.-]+){3,}/", "", row["status"]).replace("|", "\\|")
    cells = [row["network"], row["exporter"], row["opset"] or "", *([""] * 4 if failed else counts), *numbers, status]
    return "| " + " | ".join(str(c) for c in cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
