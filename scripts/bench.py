"""What all benchmarks share: a process for each side, rounds in turn, ratios by round, one JSON object at the end.

A side is a class with `__init__(setting)`, which compiles and warms up, and `measure() -> {quantity: number}`. The
script of a benchmark runs itself again for each side, in a process of its own: in one they would share a heap and
cores, and a peer may need another Python (`--peer-python`).

    bench = Bench("train", sides={"llm_jax": Ours, "eager": Eager}, peers=("eager",))
    rows = bench.rounds("shakespeare_char", number=8)    # {side: {quantity: [number of each round]}}
    bench.finish([row("shakespeare_char", rows, "tokens/s", goal=1.4)])
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results.jsonl"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "numpy", "grain", "ray")

Rounds = dict[str, dict[str, list[float]]]  # side: quantity: the number of each round


class Bench:
    """A benchmark: its arguments, its sides, and where its results go.

    `sides` maps a name to a class or function whose result has `measure()`; those in `peers` run in `--peer-python`.
    Raise `SystemExit` in the process of a side, once that has measured all that it was asked for.
    """

    def __init__(self, name: str, about: str, sides: Mapping[str, Callable[[str], Any]], peers: Sequence[str] = ()):
        self.name, self.sides, self.peers = name, sides, peers
        self.versions: dict[str, dict[str, str]] = {}
        self.parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.parser.add_argument("--rounds", type=int, default=8, help="in each, every side is measured once")
        self.parser.add_argument("--peer-python", default=sys.executable, help="the Python that has the peers")
        self.parser.add_argument("--apart", action="store_true", help="one side in memory at a time")
        self.parser.add_argument("--dry", action="store_true", help="append nothing to benchmarks/results.jsonl")
        self.parser.add_argument("--side", nargs=2, metavar=("SIDE", "SETTING"), help=argparse.SUPPRESS)

    def arguments(self) -> argparse.Namespace:
        """Return what the command line says. In the process of a side, serve it and exit."""
        self.given = self.parser.parse_args()
        if self.given.side is not None:
            serve(self.sides[self.given.side[0]], self.given.side[1])
            raise SystemExit(0)
        return self.given

    def rounds(self, setting: str, names: Sequence[str] | None = None, number: int | None = None) -> Rounds:
        """Return what each side measures in each round, in turn; with `--apart`, side after side.

        A side whose package is missing, or which fails, is left out with a line that says why.
        """
        names, times = list(names or self.sides), self.given.rounds if number is None else number
        found: Rounds = {}
        for group in [[name] for name in names] if self.given.apart else [names]:
            running = {name: self._start(name, setting) for name in group}
            for one in range(times):
                for name, side in list(running.items()):
                    begun, numbers = time.perf_counter(), side.ask()
                    if numbers is None:
                        print(f"{name}: left out; {side.reason()}", file=sys.stderr)
                        del running[name]
                        found.pop(name, None)
                        continue
                    took = f"{time.perf_counter() - begun:.1f} s"
                    print(f"{setting}: round {one + 1} of {times}, {name}: {took}", file=sys.stderr, flush=True)
                    for quantity, value in numbers.items():
                        found.setdefault(name, {}).setdefault(quantity, []).append(value)
            for side in running.values():
                side.close()
        return found

    def _start(self, name: str, setting: str) -> "Side":
        python = self.given.peer_python if name in self.peers else sys.executable
        begun, side = time.perf_counter(), Side([python, sys.argv[0], "--side", name, setting])
        self.versions[name] = side.versions
        print(f"{setting}: {name} is ready after {time.perf_counter() - begun:.1f} s", file=sys.stderr, flush=True)
        return side

    def finish(self, rows: Sequence[Mapping[str, Any]], **facts: Any) -> None:
        """Print the JSON object of this run, with `rows` made by `row`, and append it to the results."""
        peers = {name: found for name in self.peers if (found := self.versions.get(name))}
        record = {"benchmark": self.name, **about_this_run(), "peers": peers, **facts, "rows": list(rows)}
        if not self.given.dry:
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        print(json.dumps(record))


class Side:
    """A side in a process of its own: a line on its standard input asks it to measure, a line comes back."""

    def __init__(self, command: Sequence[str]):
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        self.versions: dict[str, str] = self._read() or {}

    def _read(self) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        return None

    def ask(self) -> dict[str, float] | None:
        """Return the next measurement; None if the process is gone."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("measure\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        return self._read()

    def reason(self) -> str:
        """Return the last line that a process wrote before it ended."""
        _, said = self._process.communicate()
        return (said.strip().splitlines() or [f"it ended with status {self._process.returncode}"])[-1]

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def serve(begin: Callable[[str], Any], setting: str) -> None:
    """Measure whenever a line comes in, until there are no more."""
    side = begin(setting)
    print(json.dumps(versions()), flush=True)
    for _ in sys.stdin:
        print(json.dumps(side.measure()), flush=True)


def row(
    what: str,
    rounds: Rounds,
    quantity: str,
    *,
    ours: str = "llm_jax",
    goal: str = "",
    lower: bool = False,
    peers: Sequence[str] | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """Return one row of the table: the median of each side, and the ratio of ours to the best peer, round by round.

    Above 1 is better, whether more is better or (`lower`) less. `facts` are added as they are.
    """
    medians = {side: statistics.median(of[quantity]) for side, of in rounds.items() if quantity in of}
    others = [side for side in (medians if peers is None else peers) if side != ours and side in medians]
    found = {
        "what": what,
        "quantity": quantity,
        "goal": goal,
        "lower": lower,
        "ours": ours,
        "medians": medians,
        **facts,
    }
    if not others or ours not in medians:
        return found
    best = (min if lower else max)(others, key=medians.__getitem__)
    pairs = zip(rounds[ours][quantity], rounds[best][quantity], strict=True)
    ratios = sorted(b / a if lower else a / b for a, b in pairs)
    return found | {"peer": best, "ratio": statistics.median(ratios), "spread": [ratios[0], ratios[-1]]}


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as a table for people."""
    for one in rows:
        print(f"{one['what']}  ({one['quantity']})")
        for side, value in one["medians"].items():
            print(f"    {side:24}{value:14,.4g}")
        if "ratio" in one:
            low, high = one["spread"]
            goal = f"; goal {one['goal']}" if one["goal"] else ""
            print(f"    {one['ratio']:.2f} x the best peer, {one['peer']} (rounds {low:.2f} to {high:.2f}{goal})")


def versions() -> dict[str, str]:
    """Return the versions of Python and of what is installed beside it."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def about_this_run() -> dict[str, Any]:
    """Return when, where, from which commit and by which command this runs."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return {
        "command": " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *map(shown, sys.argv[1:])]),
        "date": datetime.date.today().isoformat(),
        "commit": commit + "+" * bool(changed),
        "machine": machine(),
        "versions": versions(),
    }


def shown(argument: str) -> str:
    """Return an argument as others may type it: a path of this machine by its last name."""
    return Path(argument).name if argument.startswith("/") else argument


def machine() -> str:
    """Return what a reader may know of this machine: cores, processor, memory."""
    model = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        lines = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0] if lines else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores, {model}, {memory:.0f} GiB"
