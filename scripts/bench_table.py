"""Write docs/performance.md from benchmarks/results.jsonl: the last run of each row, wins and losses alike.

python scripts/bench_table.py
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from bench import RESULTS, ROOT

PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- written by scripts/bench_table.py -->", "<!-- until here -->"


def latest(records: Iterable[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Return each row with its run: of rows alike, measured with the same JAX on the same machine, the last."""
    found = {}
    for record in records:
        for row in record["rows"]:
            where = record["benchmark"], row["what"], row["quantity"], record["versions"].get("jax"), record["machine"]
            found[where] = record, row
    return list(found.values())


def number(value: float) -> str:
    """Return three digits, or all of a whole number."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def line(record: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """Return a row of the table."""
    medians, ours = row["medians"], row["ours"]
    others = "; ".join(f"{side} {number(value)}" for side, value in medians.items() if side != ours) or "-"
    mine = number(medians[ours]) if ours in medians else "-"
    ratio = "{:.2f} ({:.2f} to {:.2f})".format(row["ratio"], *row["spread"]) if "ratio" in row else "-"
    cells = row["what"], row["quantity"], mine, others, ratio, row["goal"] or "-", record["versions"].get("jax", "-")
    return f"| {' | '.join(cells)} | {record['commit']} |"


def table(records: Iterable[Mapping[str, Any]]) -> str:
    """Return a section for each benchmark, with the command that gave it."""
    sections: dict[str, list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    for record, row in latest(records):
        sections.setdefault(record["benchmark"], []).append((record, row))
    lines = []
    for name, rows in sections.items():
        commands = dict.fromkeys(f"`{record['command']}`" for record, _ in rows)
        machines = dict.fromkeys(f"{record['machine']}, {record['date']}" for record, _ in rows)
        lines += ["", f"## {name}", "", f"{', '.join(commands)} ({'; '.join(machines)})", ""]
        lines += ["| what | in | ours | others | ours to the best peer | goal | JAX | commit |", f"|{'---|' * 8}"]
        lines += [line(*pair) for pair in rows]
        lines += notes(rows)
    return "\n".join(lines).strip()


def notes(rows: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[str]:
    """Return what rows say of each side beside its speed: share of the peak, memory."""
    found = []
    for record, row in rows:
        for side, of in row.get("sides", {}).items():
            said = ", ".join(f"{share(name, value)}" for name, value in of.items())
            found.append(f"- {row['what']}, JAX {record['versions'].get('jax', '-')}, {side}: {said}")
    return ["", *found] if found else []


def share(name: str, value: float) -> str:
    """Return a number with what it is."""
    return f"{value:.0%} of the matmul peak" if name == "share" else f"{value:.3g} {name}"


def main() -> None:
    records = [json.loads(text) for text in RESULTS.read_text(encoding="utf-8").splitlines()]
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{table(records)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
