"""What a compiled program holds in memory at once, read from the order of its instructions."""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping

from llm_jax.plan import hlo

MODULES = (
    "cast|embed|attention_norm|feedforward_norm|attention|feedforward|experts|final_norm|head|loss|optimizer|layers"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Buffer:
    """An array in memory: its shape, and the scope of what made it."""

    array: str
    scope: str

    @property
    def bytes(self) -> int:
        return 0 if re.search(r"S\([1-9]\)", self.array) else hlo.array_bytes(self.array)


def live(module: hlo.Module) -> Counter[str]:
    """Temporary bytes at the moment when they are most, by the scope that made them: an estimate.

    Read from the schedule: an array lives from the instruction that makes it to the last that reads it. What a program
    is given, and the results that take its place, are not temporary. A loop changes what it carries in place, and a
    fusion what dies in it and is shaped as its result. What has no scope of its own, as the zeros that a loop begins
    with, is called by what the loop puts in its place. Gaps between arrays are left out.
    """
    return _live(module, module.entry)


def _live(module: hlo.Module, computation: str) -> Counter[str]:
    body = module.computations[computation]
    values: dict[str, list[Buffer]] = {}
    last: dict[Buffer, int] = {}
    made: list[list[Buffer]] = []
    scopes: dict[Buffer, str] = {}
    for i, x in enumerate(body):
        values[x.name] = _buffers(x, module.by_name[computation], values)
        taken = x.opcode == "get-tuple-element"  # which reads no more than it gives
        read = [] if taken else [buffer for name in x.operands for buffer in values.get(name, [])]
        made.append([buffer for buffer in values[x.name] if buffer not in last])
        if x.opcode == "while":
            ends = zip(values[x.name], _ends(module, x.calls["body"]), strict=False)
            scopes = {buffer: scope for buffer, scope in ends if scope} | scopes
        last.update(dict.fromkeys([*values[x.name], *read], i))
    last.update(dict.fromkeys(values[module.root(computation).name], len(body)))
    kept = {buffer for x in body if x.opcode in ("parameter", "constant") or x.root for buffer in values[x.name]}

    now: dict[Buffer, None] = {}
    peak: Counter[str] = Counter()
    for i, x in enumerate(body):
        dying = {buffer.array: buffer for name in x.operands for buffer in values.get(name, []) if last[buffer] == i}
        for buffer in made[i]:
            if x.opcode != "dot" and (replaced := dying.pop(buffer.array, None)) is not None:
                now.pop(replaced, None)
            if buffer not in kept:
                now[buffer] = None
        inside = max(
            (_live(module, name) for name in x.calls.values() if x.opcode in ("while", "conditional", "call")),
            key=lambda found: found.total(),
            default=Counter[str](),
        )
        if sum(buffer.bytes for buffer in now) + inside.total() > peak.total():
            peak = inside.copy()
            for buffer in now:
                peak[buffer.scope if "/" in buffer.scope else scopes.get(buffer) or buffer.scope] += buffer.bytes
        for buffer in [buffer for buffer in now if last[buffer] <= i]:
            del now[buffer]
    return peak


def _ends(module: hlo.Module, body: str) -> list[str]:
    """The scope of each array that a loop carries, at the end of its body."""
    ends = [module.by_name[body][name] for name in module.root(body).operands]
    return [_scope(x) for x in ends for _ in hlo.arrays(x.shape)]


def _scope(x: hlo.Instruction) -> str:
    return x.attribute(r'op_name="([^"]*)"') or ""


def _buffers(
    x: hlo.Instruction, named: Mapping[str, hlo.Instruction], values: Mapping[str, list[Buffer]]
) -> list[Buffer]:
    """Where the arrays of what `x` gives are: those of its operands, or new ones."""
    given = [buffer for name in x.operands for buffer in values.get(name, [])]
    if x.opcode in ("bitcast", "tuple", "opt-barrier", "while"):  # they rename what others have made
        return given
    if x.opcode == "get-tuple-element":
        sizes = [len(hlo.arrays(element)) for element in hlo.tuple_elements(named[x.operands[0]].shape)]
        index = int(x.attribute(r"index=(\d+)") or 0)
        return given[sum(sizes[:index]) : sum(sizes[: index + 1])]
    scope = _scope(x)
    shared = given if x.opcode.endswith(("-start", "-done")) else []
    found = []
    for array in hlo.arrays(x.shape):
        same = next((buffer for buffer in shared if buffer.array == array), None)
        if same is not None:
            shared.remove(same)
        found.append(same or Buffer(array, scope))
    return found


def by_module(scopes: Mapping[str, int]) -> Counter[str]:
    """Bytes by place of the model and direction, where `scopes` have the names that the compiler keeps."""
    found: Counter[str] = Counter()
    for scope, amount in scopes.items():
        again, back = "rematted_computation" in scope, "transpose(" in scope
        words = re.findall(rf"\b({MODULES})\b", scope.replace("_out_norm", "_norm"))
        name = words[-1] if words else "cast" if scope.startswith("state.params") else "unnamed"
        found[f"{name}{', computed again' if again else ', backward' if back else ''}"] += amount
    return found
