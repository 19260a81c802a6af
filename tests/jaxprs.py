"""Reading the program that JAX traced: every equation, those of inner programs included."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


def equations(function: Callable, *inputs: Any) -> list[tuple[int, JaxprEqn]]:
    """Every equation of `function(*inputs)`, with how often it runs: a scan's body counts by its length."""
    return list(_walk(jax.make_jaxpr(function)(*inputs).jaxpr, 1))


def product_flops(program: list[tuple[int, JaxprEqn]]) -> int:
    """Two for each multiply-add of the matrix products."""
    total = 0
    for times, equation in program:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += times * 2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
    return total


def _walk(jaxpr: Jaxpr, times: int) -> Iterator[tuple[int, JaxprEqn]]:
    for equation in jaxpr.eqns:
        yield times, equation
        repeated = times * equation.params["length"] if equation.primitive.name == "scan" else times
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program):
            if _is_program(inner):
                yield from _walk(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner, repeated)


def _is_program(value: Any) -> bool:
    return isinstance(value, Jaxpr | ClosedJaxpr)
