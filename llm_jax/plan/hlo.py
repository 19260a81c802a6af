"""Read the text of a compiled program: what it sends, and how long it takes. `liveness.py` reads what it holds.

The text is that of `jit(...).lower(...).compile().as_text()`, on any platform: the instructions of each computation in
the order in which they run. Reading it needs no JAX.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

# What one of n devices sends, as a multiple of its operand: for the algorithms that send least, which are rings.
SENT = {
    "all-gather": lambda n: n - 1,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,  # at most: if all of it is used
    "collective-permute": lambda n: 1,
    "collective-broadcast": lambda n: 1,
}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`%name = shape opcode(operands), attributes`; the operand of a constant is its text."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def attribute(self, pattern: str) -> str | None:
        """Return what the group of `pattern` matches in the attributes, or None."""
        found = re.search(pattern, self.attributes)
        return found and found[1]

    @property
    def calls(self) -> dict[str, str]:
        """The computations that it runs, by their roles."""
        if branches := self.attribute(r"branch_computations=\{([^}]*)\}"):
            return {str(i): name.strip(" %") for i, name in enumerate(branches.split(","))}
        roles = "calls|body|condition|true_computation|false_computation" + "|to_apply" * (self.opcode == "call")
        return dict(re.findall(rf"\b({roles})=%?([\w.\-]+)", self.attributes))


@dataclasses.dataclass(frozen=True)
class Module:
    """The computations of a program by name, and the name of the one that runs."""

    computations: Mapping[str, Sequence[Instruction]]
    entry: str

    @functools.cached_property
    def by_name(self) -> dict[str, dict[str, Instruction]]:
        """The instructions of each computation by name."""
        return {name: {x.name: x for x in body} for name, body in self.computations.items()}

    def root(self, computation: str) -> Instruction:
        """Return the instruction whose value is the result of `computation`."""
        return next(x for x in self.computations[computation] if x.root)


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange of arrays between devices.

    Attributes:
      kind: one of the keys of `SENT`.
      axes: the mesh axes of its groups, such as `data+fsdp`; empty if no axes form such groups.
      devices: how many there are in a group.
      sent: bytes that a device sends, each time.
      count: times per step; None in a loop whose length is known only at run time.
      overlapped: whether the program computes meanwhile.
      scope: its scope in the source, as in `op_name`.
    """

    kind: str
    axes: str
    devices: int
    sent: float
    count: int | None
    overlapped: bool
    scope: str


def parse(text: str) -> Module:
    """Return the program in `text`. Raise `ValueError` if there is none."""
    computations: dict[str, list[Instruction]] = {}
    entry, body = None, None
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            body = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif body is not None and (found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)):
            shape, rest = _shape(line[found.end() :])
            opcode, _, rest = rest.partition("(")
            inside, attributes = _closed("(" + rest)
            names = re.findall(r"%([\w.\-]+)", inside) or [inside[1:-1]]
            body.append(Instruction(found[2], shape, opcode, tuple(names), attributes, bool(found[1])))
    if entry is None:
        raise ValueError(f"no program: expected the text of a compiled module, got {text[:60]!r}")
    return Module(computations, entry)


def _shape(text: str) -> tuple[str, str]:
    """Return the shape that `text` begins with, and the rest."""
    if text.startswith("("):
        shape, rest = _closed(text)
        return shape, rest.lstrip()
    shape, _, rest = text.partition(" ")
    return shape, rest


def _closed(text: str) -> tuple[str, str]:
    """Return `text` up to the parenthesis that closes its first one, and the rest. Raise `ValueError` if none does."""
    depth = 0
    for at in re.finditer(r"[()]", text):
        depth += 1 if at[0] == "(" else -1
        if depth == 0:
            return text[: at.end()], text[at.end() :]
    raise ValueError(f"a parenthesis is not closed in {text[:60]!r}")


def arrays(shape: str) -> list[str]:
    """Return the arrays of a shape, those of a tuple in order, each like `bf16[8,128]{1,0:T(8,128)}`."""
    return re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?", shape)


def tuple_elements(shape: str) -> list[str]:
    """Return the shapes of the elements of a tuple, which may be tuples."""
    depth, found = 0, [""]
    for piece in re.split(r"([()\[\]{},])", shape[1:-1]):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(piece, 0)
        if piece == "," and depth == 0:
            found.append("")
        else:
            found[-1] += piece
    return found


def array_bytes(array: str) -> int:
    """Return the bytes of an array, without the padding of its tiles."""
    kind, sizes = re.findall(r"(\w+)\[([\d,]*)\]", array)[0]
    named = re.search(r"\d+", kind)
    bits = int(named[0]) if named else 8 * (kind == "pred")  # a token has none
    return math.prod(int(size) for size in sizes.split(",") if size) * bits // 8


@dataclasses.dataclass(frozen=True)
class Visit:
    """An instruction of a running program: how often it runs per step, if that is known, and in which fusion."""

    instruction: Instruction
    computation: str
    times: int | None
    fusion: str | None


def executed(module: Module) -> Iterator[Visit]:
    """Iterate over every instruction that runs, in order of its first run; of branches, those of the longest."""

    def walk(computation: str, times: int | None, fusion: str | None) -> Iterator[Visit]:
        for x in module.computations[computation]:
            yield Visit(x, computation, times, fusion)
            calls = x.calls
            if x.opcode == "while":
                again = trips(module, computation, x)
                yield from walk(calls["body"], None if times is None or again is None else times * again, fusion)
            elif x.opcode == "conditional":
                yield from walk(max(calls.values(), key=lambda name: len(module.computations[name])), times, fusion)
            elif x.opcode in ("fusion", "call", "async-start"):
                for name in calls.values():
                    yield from walk(name, times, name if x.opcode == "fusion" and fusion is None else fusion)

    return walk(module.entry, 1, None)


def trips(module: Module, computation: str, loop: Instruction) -> int | None:
    """Return how often the body of a `while` runs: as the compiler says, or by the comparison and step of its counter.

    None if that is known only at run time, as for the further rounds of `ops/exchange.py`, which are rarely needed.
    """
    if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"\}'):
        return int(known)
    condition, body = loop.calls["condition"], loop.calls["body"]
    start, end = module.by_name[computation].get(loop.operands[0]), module.root(body)
    compared = module.root(condition)
    if start is None or start.opcode != "tuple" or end.opcode != "tuple" or compared.opcode != "compare":
        return None

    def index(x: Instruction) -> int:
        return int(x.attribute(r"index=(\d+)") or 0)

    def number(where: str, name: str) -> int | None:
        """Return the constant `name` in the condition, the body or, carried unchanged, before the loop."""
        x = module.by_name[where].get(name)
        if x is None or x.opcode == "constant":
            return int(x.operands[0]) if x and re.fullmatch(r"-?\d+", x.operands[0]) else None
        if x.opcode in ("copy", "bitcast", "convert"):
            return number(where, x.operands[0])
        if x.opcode == "get-tuple-element" and where in (condition, body):
            after = module.by_name[body][end.operands[index(x)]]
            unchanged = after.opcode == "get-tuple-element" and index(after) == index(x)
            return number(computation, start.operands[index(x)]) if unchanged else None
        return None

    def step(name: str) -> int:
        x = module.by_name[body][name]
        if x.opcode in ("copy", "bitcast"):
            return step(x.operands[0])
        if x.opcode not in ("add", "subtract"):
            return 0
        left, right = x.operands
        added = number(body, right)
        if x.opcode == "subtract":
            return step(left) - (added or 0)
        return added + step(left) if added is not None else (number(body, left) or 0) + step(right)

    def raised(name: str) -> int:
        """Return by how much a round changes what the condition compares."""
        x = module.by_name[condition].get(name)
        return step(end.operands[index(x)]) if x is not None and x.opcode == "get-tuple-element" else 0

    (left, right), direction = compared.operands, compared.attribute(r"direction=(\w+)") or ""
    if not raised(left):
        left, right, direction = right, left, direction.translate(str.maketrans("LG", "GL"))
    if not raised(left):
        return None
    first = number(computation, start.operands[index(module.by_name[condition][left])])
    last = number(condition, right)
    return None if first is None or last is None else rounds(first, last, raised(left), direction)


def rounds(first: int, last: int, step: int, direction: str) -> int | None:
    """Count `first`, `first + step`, ... up to one for which `direction` (LT, LE, GT, GE, NE) to `last` is false."""
    toward = step < 0 if direction in ("GT", "GE") else step > 0 if direction in ("LT", "LE") else step != 0
    if not toward or direction == "EQ":
        return None
    whole, left = divmod(last - first, step)
    if direction == "NE":
        return whole if whole >= 0 and not left else None
    return max(0, whole + (left != 0 or direction in ("LE", "GE")))


def collectives(module: Module, mesh: Mapping[str, int]) -> list[Collective]:
    """Return what a step sends over `mesh`, whose axes and sizes are in the order of its devices.

    Raise `ValueError` for a collective that is not in `SENT`.
    """
    found, seen = [], set()
    for visit in executed(module):
        x, kind = visit.instruction, visit.instruction.opcode.removesuffix("-start")
        if kind == "send":  # to another slice of a TPU
            kind = (x.attribute(r'_xla_megascale_transfer_type="(\w+)"') or "").lower().replace("_", "-")
        if kind not in SENT:
            if re.match(r"(all|ragged|reduce-scatter|collective)-", kind) and not kind.endswith("-done"):
                raise ValueError(f"unknown collective {kind}; give it a row in hlo.SENT")
            continue
        channel, scope = x.attribute(r"channel_id=(\d+)"), x.attribute(r'op_name="([^"]*)"') or ""
        if kind == "all-reduce" and "all-reduce-scatter" in (visit.fusion or ""):
            kind = "reduce-scatter"  # a device keeps its shard of the sum
        elif visit.fusion is not None and channel is not None:
            # Each fusion of an asynchronous chain shows its collective again. Those of a `shard_map` share a channel.
            if (channel, kind, scope) in seen:
                continue
            seen.add((channel, kind, scope))
        group = _pairs(x) if kind == "collective-permute" else _groups(x, math.prod(mesh.values()))
        devices = len(mesh) and math.prod(mesh.values()) if group is None else len(group[0])
        given = x.operands[:1] if kind == "ragged-all-to-all" else x.operands  # after it, where and how much
        put_in = sum(array_bytes(a) for name in given for a in arrays(module.by_name[visit.computation][name].shape))
        found.append(
            Collective(
                kind=kind,
                axes=axes_of(group or [list(range(devices))], mesh, permuted=kind == "collective-permute"),
                devices=devices,
                sent=float(SENT[kind](devices) * put_in),
                count=visit.times,
                overlapped=_overlapped(module, visit),
                scope=scope,
            )
        )
    return [one for one in found if one.sent]


def _pairs(x: Instruction) -> list[list[int]] | None:
    pairs = x.attribute(r"source_target_pairs=\{(\{[\d,{}\s]*\})\}")
    return [[int(i) for i in pair.split(",")] for pair in re.findall(r"\{([\d,\s]+)\}", pairs)] if pairs else None


def _groups(x: Instruction, devices: int) -> list[list[int]] | None:
    """Return the groups of devices, in any of the three notations, or a device of each slice; None: all devices."""
    if slices := x.attribute(r'_xla_megascale_target="\{([\d,:]+)\}'):
        ids = [int(i) for i in re.findall(r"\d+", slices)]
        number = ids[-1] - ids[0] + 1 if ":" in slices else len(ids)
        return [list(range(0, devices, devices // number))]
    if listed := x.attribute(r"replica_groups=\{(\{[\d,{}\s]*\})\}"):
        return [[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,\s]+)\}", listed)]
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", x.attributes):
        sizes = [int(size) for size in found[3].split(",")]
        order = [int(axis) for axis in found[4].split(",")] if found[4] else list(range(len(sizes)))
        ids, each = _transposed(sizes, order), int(found[2])
        return [ids[i : i + each] for i in range(0, len(ids), each)]
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", x.attributes):
        named = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        chosen = re.findall(r"'(\w+)'", found[3])
        names = list(named)
        order = [names.index(name) for name in names if name not in chosen] + [names.index(name) for name in chosen]
        indices, each = _transposed(list(named.values()), order), math.prod(named[name] for name in chosen)
        ids = list(range(len(indices)))  # the device at each index
        if laid := re.search(r"\[([\d,]+)\]T\(([\d,]+)\)", found[2]):
            ids = _transposed(*([int(n) for n in numbers.split(",")] for numbers in laid.groups()))
        return [[ids[index] for index in indices[i : i + each]] for i in range(0, len(indices), each)]
    return None


def _transposed(sizes: Sequence[int], order: Sequence[int]) -> list[int]:
    """Return `arange(prod(sizes)).reshape(sizes).transpose(order).ravel()`."""
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    indices = itertools.product(*(range(sizes[axis]) for axis in order))
    return [sum(i * strides[axis] for i, axis in zip(index, order, strict=True)) for index in indices]


def axes_of(groups: Sequence[Sequence[int]], mesh: Mapping[str, int], *, permuted: bool = False) -> str:
    """Return the axes of `mesh` along which devices of a group (of a permutation: any pair) differ, joined by `+`."""
    sizes = list(mesh.values())

    def index(device: int) -> tuple[int, ...]:
        return tuple(device // math.prod(sizes[i + 1 :]) % size for i, size in enumerate(sizes))

    moving = [
        name
        for i, name in enumerate(mesh)
        if any(len({index(device)[i] for device in group}) > 1 for group in (groups if permuted else groups[:1]))
    ]
    whole = permuted or math.prod(mesh[name] for name in moving) == len(groups[0])
    return "+".join(moving) if whole else ""


def _overlapped(module: Module, visit: Visit) -> bool:
    """Return whether anything is computed between the start of a collective and its end."""
    if visit.fusion is not None:
        return "all-reduce-scatter" not in visit.fusion
    if not visit.instruction.opcode.endswith(("-start", "send")):
        return False
    after = itertools.dropwhile(lambda x: x is not visit.instruction, module.computations[visit.computation])
    between = itertools.takewhile(lambda x: visit.instruction.name not in x.operands, itertools.islice(after, 1, None))
    return any(x.opcode in ("fusion", "dot", "convolution", "custom-call", "while", "call") for x in between)


def cycles(module: Module) -> int:
    """Return the cycles that the compiler for TPU expects of a step; 0 if it says none.

    Kernels, and loops whose length is known only at run time, do not count.
    """
    return sum(
        (visit.times or 0) * int(found)
        for visit in executed(module)
        if visit.fusion is None and (found := visit.instruction.attribute(r'"estimated_cycles":"(\d+)"'))
    )


def totals(found: Sequence[Collective]) -> dict[tuple[str, str], tuple[int, float]]:
    """Return how often a step runs each kind of collective along each axis, and the bytes that a device sends."""
    sums: dict[tuple[str, str], tuple[int, float]] = {}
    for one in found:
        if one.count is None:
            continue
        times, sent = sums.get((one.kind, one.axes), (0, 0.0))
        sums[one.kind, one.axes] = (times + one.count, sent + one.count * one.sent)
    return dict(sorted(sums.items()))
