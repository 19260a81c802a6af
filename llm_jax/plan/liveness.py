"""What a compiled program holds in memory at the same time, read from the order of its instructions."""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping

from llm_jax.plan import hlo

MODULES = (
    "cast|embed|attention_norm|feedforward_norm|attention|mixer|feedforward|experts|final_norm|head|loss|optimizer|"
    "layers"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Buffer:
    """An array in memory: its shape, and the scope of the instruction that made it."""

    array: str
    scope: str

    @property
    def bytes(self) -> int:
        """Its size; 0 if it is not in the device's main memory."""
        return 0 if re.search(r"S\([1-9]\)", self.array) else hlo.array_bytes(self.array)


def live(module: hlo.Module) -> Counter[str]:
    """Estimate the temporary bytes at their peak, by the scope that made them.

    An array lives from the instruction that makes it to the last one that reads it. The arguments of a program, and the
    results that replace them, are not temporary. A loop updates its carry in place; a fusion overwrites an operand of
    the shape of its result that nothing reads later. An array without a scope of its own, such as the zeros that a
    loop starts with, gets the scope of what replaces it in the loop. Gaps between arrays are not counted.
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
        taken = x.opcode == "get-tuple-element"  # which reads only what it returns
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
    """Return the scope of each array in the carry of a loop, at the end of its body."""
    ends = [module.by_name[body][name] for name in module.root(body).operands]
    return [_scope(x) for x in ends for _ in hlo.arrays(x.shape)]


def _scope(x: hlo.Instruction) -> str:
    return x.attribute(r'op_name="([^"]*)"') or ""


def _buffers(
    x: hlo.Instruction, named: Mapping[str, hlo.Instruction], values: Mapping[str, list[Buffer]]
) -> list[Buffer]:
    """Return the buffers of the result of `x`: those of its operands, or new ones."""
    given = [buffer for name in x.operands for buffer in values.get(name, [])]
    if x.opcode in ("bitcast", "tuple", "opt-barrier", "while"):  # they rename the arrays of others
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
    """Return the bytes by module of the model and direction; `scopes` are names as the compiler keeps them."""
    found: Counter[str] = Counter()
    for scope, amount in scopes.items():
        again, back = "rematted_computation" in scope, "transpose(" in scope
        words = re.findall(rf"\b({MODULES})\b", scope.replace("_out_norm", "_norm"))
        name = words[-1] if words else "cast" if scope.startswith("state.params") else "unnamed"
        found[f"{name}{', computed again' if again else ', backward' if back else ''}"] += amount
    return found
