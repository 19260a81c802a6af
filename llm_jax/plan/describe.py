"""What a config amounts to, before anything of it exists: every shape, parameters, FLOPs.

`describe` returns plain data, which a console of `rich` prints. It is arithmetic on the config, without JAX, and takes
no time for a model of any size. Tests hold it to the functions that train. The memory of a step is in `memory.py`.
"""

import dataclasses
import itertools
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.columns import Columns
from rich.console import Group
from rich.table import Table
from rich.text import Text

from llm_jax.config import plain
from llm_jax.keys import REQUIRED, keys, value_at
from llm_jax.model.config import TAPS, ModelConfig, is_own
from llm_jax.model.count import active_parameters, flops_per_token, parameter_counts
from llm_jax.model.pattern import kinds_of, locate
from llm_jax.train.config import RunConfig


@dataclasses.dataclass(frozen=True)
class Activation:
    """A named activation: its axes by letter, their sizes, what it is, and the layers of one `kind` that share it.

    `kind` and `layers` are empty outside of layers.
    """

    name: str
    letters: str
    shape: tuple[int, ...]
    dtype: str
    kind: str
    layers: tuple[int, ...]
    meaning: str


@dataclasses.dataclass(frozen=True)
class Description:
    """What `llm-jax show` prints.

    A token uses the `active_parameters`, not every expert. FLOPs are those of training; a forward pass alone takes a
    third of them.
    """

    sizes: dict[str, int]
    activations: list[Activation]
    parameters: dict[str, int]
    active_parameters: int
    flops_per_token: int
    tokens_per_step: int

    def __rich__(self) -> Group:
        """Show the walk through the shapes, then what they cost, on a `rich` console."""
        return _page(self)


def describe(config: RunConfig) -> Description:
    """Return what follows from `config` without running it."""
    c, data = config.model, config.data
    sizes = dict(zip("BLS", (data.batch_size // config.accumulate, data.seq_len, data.seq_len), strict=True))
    sizes |= sizes_of(c)
    return Description(
        sizes=sizes,
        activations=list(activations(c, sizes)),
        parameters=parameter_counts(c),
        active_parameters=active_parameters(c),
        flops_per_token=flops_per_token(c, data.seq_len),
        tokens_per_step=data.batch_size * data.seq_len,
    )


def sizes_of(c: ModelConfig) -> dict[str, int]:
    """Return the sizes N D K G H F V, and E and C if there are experts and classes."""
    sizes = (c.n_layers, c.d_model, c.K, c.G, c.H, c.F, c.vocab_size)
    some = {"E": c.experts.number} if c.experts is not None else {}
    some |= {"C": c.n_classes} if c.n_classes is not None else {}
    return dict(zip("NDKGHFV", sizes, strict=True)) | some


def activations(c: ModelConfig, sizes: Mapping[str, int]) -> Iterator[Activation]:
    """Yield the tokens, and every tap in the order of the forward pass; those inside layers once per kind of layer."""
    inside = {name for name, path in TAPS.items() if path.startswith("layers/")}
    by_kind: dict[str, list[int]] = {}
    for layer, kind in enumerate(kinds_of(c)):
        by_kind.setdefault(kind, []).append(layer)
    outside: dict[str, list[int]] = {"": []}
    names = list(TAPS)
    stages = (
        (["tokens", *names[: names.index("resid_pre")]], outside),
        ([name for name in names if name in inside], by_kind),
        (names[names.index("resid_post") + 1 :], outside),
    )
    for stage, layers_of in stages:
        for kind, layers in layers_of.items():
            for name in stage:
                if kind and not locate(c, layers[0]).kind.has(name):
                    continue
                letters, meaning = activation_meanings(c, kind)[name]
                shape = tuple(sizes[letter] for letter in letters.split())
                yield Activation(name, letters, shape, DTYPES.get(name, c.dtype), kind, tuple(layers), meaning)


def activation_meanings(c: ModelConfig, kind: str = "") -> dict[str, tuple[str, str]]:
    """Return the letters of each activation in a layer of `kind`, and a line of words."""
    mixer = kind.partition("+")[0]
    recurrent, own = mixer in ("linear", "delta"), mixer.partition(":")[2] if is_own(mixer) else ""
    added = {"learned": ", plus that of its position", "sinusoidal": ", plus the waves of its position"}
    rotated, too = (", rotated by its position", ", rotated too") if c.positions == "rotary" else ("", "")
    if recurrent or mixer == "nope":
        rotated = too = ""
    normed_after = ", normed" if c.residual == "post" else ""
    normed_before = ", normed" if c.residual in ("sandwich", "output") else ""
    shared = f"; one for {c.G} query heads" if c.G > 1 else ""
    gate = ", times a second projection" if c.gated else ""
    head = "output" if c.head == "unembedding" else c.head
    scored = ("B L V", "the next token") if c.n_classes is None else ("B L C", "the classes, where a question ends")
    view = {"local": f"the last {c.attention.window} keys", "sparse": "the keys of its blocks"}.get(
        mixer, "the keys in view"
    )
    scale = "over the root of H" if c.attention.scale is None else f"times {c.attention.scale:.3g}"
    capped = "" if c.attention.softcap is None else f", squeezed below {c.attention.softcap:g}"
    sloped = ", less the distance by head" if c.positions == "alibi" else ""
    mixed = f"what {own} makes of the tokens so far" if own else "the heads joined, projected to the stream's width"
    seen = f"{c.experts.active} of {c.experts.number}" if c.experts else ""
    return {
        "tokens": ("B L", f"ids below {c.vocab_size}"),
        "embed": ("B L D", f"each id becomes its row of the embedding table{added.get(c.positions, '')}"),
        "resid_pre": ("B L D", "the residual stream, as it enters the layer"),
        "q": ("B L K G H", f"what each token looks for{rotated}"),
        "k": ("B S K H", f"what it is found by{too}{shared}"),
        "v": ("B S K H", f"what it contributes when found{shared}"),
        "attn_scores": ("B K G L S", f"every query times every key, {scale}{capped}{sloped}"),
        "pattern": ("B K G L S", f"softmax over {view}: each row sums to 1"),
        "z": (
            "B L K G H",
            "what each query finds in the state" if recurrent else "the values, averaged as the pattern says",
        ),
        "attn_out": ("B L D", f"{mixed}{normed_before}"),
        "resid_mid": ("B L D", f"the stream plus what {own or 'attention'} adds to it{normed_after}"),
        "mlp_pre": ("B L F", "each token by itself, projected to F features"),
        "mlp_post": ("B L F", f"{c.activation} of that{gate}"),
        "router": ("B L E", f"scores of the experts: a token goes to {seen}"),
        "mlp_out": ("B L D", f"projected back to the width of the stream{normed_before}"),
        "resid_post": ("B L D", f"the stream plus what the feed-forward adds to it{normed_after}"),
        "final": ("B L D", f"the stream at the end{'' if normed_after else ', normed'}"),
        "logits": (scored[0], f"scores for {scored[1]}, against the {head} table"),
    }


LETTERS = {
    "B": "rows",
    "L": "tokens a row",
    "S": "keys a query",
    "N": "layers",
    "D": "width of the stream",
    "K": "key/value heads",
    "G": "query heads for each",
    "H": "width of a head",
    "F": "features",
    "V": "vocabulary",
    "C": "classes",
    "E": "experts",
}
# What is not in the dtype of the computation.
DTYPES = {"tokens": "int32"} | dict.fromkeys(("attn_scores", "pattern", "router", "logits"), "float32")
WALKED = 3  # up to so many layers are shown one by one


def _page(d: Description) -> Group:
    legend = [Text.assemble((letter, "cyan"), f" {LETTERS[letter]} {n:,}") for letter, n in d.sizes.items()]
    compute = bare_table("", "right")
    compute.add_row("a token, forward", metric(d.flops_per_token / 3, "FLOP"))
    compute.add_row("a token, training", metric(d.flops_per_token, "FLOP"))
    compute.add_row(f"a step, {d.tokens_per_step:,} tokens", metric(d.flops_per_token * d.tokens_per_step, "FLOP"))
    total = sum(d.parameters.values())
    met = "" if d.active_parameters == total else f"; a token uses {d.active_parameters:,}"
    return Group(
        title("Shapes of a microbatch"),
        Columns(legend, padding=(0, 3)),
        Text(),
        walk(d),
        Text("attn_scores and pattern: whole only if a tap captures them, or L is short", style="dim"),
        title(f"Parameters: {total:,}{met}"),
        shares(d.parameters, "{:,}".format),
        title("Compute"),
        compute,
    )


def walk(d: Description) -> Table:
    """Return a line for each activation: name, letters, sizes, dtype, words."""
    table = bare_table("bold", "cyan", "", "dim")
    table.add_column(style="dim")
    several = len({a.kind for a in d.activations if a.kind}) > 1
    for (kind, layers), group in itertools.groupby(d.activations, lambda a: (a.kind, a.layers)):
        stage = list(group)
        each = d.sizes["N"] <= WALKED and not several
        titles = [f"layer {i}" for i in layers] if each else [f"layers {spans(layers)}, each{f': {kind}' * several}"]
        for title in titles if kind else [""]:
            if title:
                table.add_row(title)
            for a in stage:
                sizes = " ".join(map(str, a.shape))
                table.add_row("  " * bool(kind) + a.name, a.letters, sizes, a.dtype, a.meaning)
    return table


def spans(numbers: Sequence[int]) -> str:
    """Return ascending numbers as spans: `0..4, 6, 8..9`; a long list is shortened."""
    runs = [list(run) for _, run in itertools.groupby(numbers, lambda n, at=itertools.count(): n - next(at))]
    found = [str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs]
    return ", ".join(found if len(found) <= 4 else [*found[:3], f"... {found[-1]}"])


def shares(amounts: dict[str, int], shown: Callable[[int], str]) -> Table:
    """Return a line for each amount that is not 0, with its share of the sum, and the sum."""
    table, total = bare_table("", "right", "right"), sum(amounts.values())
    for name, amount in (amounts | {"in all": total}).items():
        if amount:
            table.add_row(name, shown(amount), f"{amount / total:.1%}")
    return table


def metric(n: int | float, unit: str) -> str:
    """Return a quantity in three digits and a prefix: `512 B`, `1.23 GB`, `236 PFLOP`."""
    mantissa, exponent = f"{n:.2e}".split("e")
    thousands = int(exponent) // 3
    return f"{float(mantissa) * 10 ** (int(exponent) % 3):.3g} {' kMGTPEZY'[thousands].strip()}{unit}"


def keys_table(config: RunConfig) -> Table:
    """Return a line for each key: as the command line takes it, its default if that differs, and its meaning."""
    table = bare_table("", "dim")
    table.add_column(ratio=1)
    table.expand = True
    table.add_row(Text("key=value", style="bold"), "default", Text("meaning", style="bold"))
    for key in keys(RunConfig):
        value = value_at(config, key)
        if key.group is not None:
            table.add_row()
            none = Text(f"{key.name}={plain(value)}", style="dim") if value is None else ""
            table.add_row(Text(key.name, style="bold") if value is not None else none, "", key.meaning, style="bold")
        elif value is REQUIRED:
            table.add_row(Text(f"{key.name}=", style="dim"), "", key.meaning)
        else:
            word = Text(quoted(f"{key.name}={plain(value)}"), style="dim" if key.default == value else "cyan")
            table.add_row(word, "" if key.default in (REQUIRED, value) else plain(key.default), key.meaning)
    return table


def keys_as_json(config: RunConfig) -> dict[str, dict[str, object]]:
    """Return for each key that is a value: the value, its default if it has one, and its meaning."""
    found = {}
    for key in keys(RunConfig):
        if key.group is None:
            both = {"value": value_at(config, key), "default": key.default}
            found[key.name] = {name: x for name, x in both.items() if x is not REQUIRED} | {"meaning": key.meaning}
    return found


def quoted(word: str) -> str:
    """Return `word` as a shell takes it, on one line."""
    if word.isprintable():
        return shlex.quote(word)
    return "$'" + word.encode("unicode_escape").decode().replace("'", "\\'") + "'"


def title(text: str) -> Text:
    """Return the heading of a table, after an empty line."""
    return Text(f"\n{text}", style="bold")


def bare_table(*styles: str) -> Table:
    """Return a table without lines; a column has a style, or is flush `right`."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for style in styles:
        if style == "right":
            table.add_column(justify="right", no_wrap=True)
        else:
            table.add_column(style=style, no_wrap=True)
    return table
