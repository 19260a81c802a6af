"""Rotary positions in a config.json: `rope_parameters`, and the older keys."""

from collections.abc import Mapping
from typing import Any

from llm_jax.compat.lenses import KINDS, Fields, Lens, Theirs, known
from llm_jax.model.config import ModelConfig
from llm_jax.ops.config import Rotary

ORIGINAL = "original_max_position_embeddings"  # before scaling

# Their name of a scaling -> ours, and its parameters besides theta.
Scalings = Mapping[str, tuple[str, dict[str, str]]]
SCALINGS: Scalings = {
    "default": ("none", {}),
    "linear": ("linear", {"factor": "factor"}),
    "llama3": (
        "llama3",
        {
            "factor": "factor",
            ORIGINAL: "original_len",
            "low_freq_factor": "low_turns",
            "high_freq_factor": "high_turns",
        },
    ),
    "yarn": (
        "yarn",
        {
            "factor": "factor",
            ORIGINAL: "original_len",
            "beta_slow": "low_turns",
            "beta_fast": "high_turns",
            "attention_factor": "amplitude",
        },
    ),
    "dynamic": ("dynamic", {"factor": "factor"}),
    "longrope": (
        "longrope",
        {
            "factor": "factor",
            ORIGINAL: "original_len",
            "short_factor": "short_factors",
            "long_factor": "long_factors",
            "attention_factor": "amplitude",
        },
    ),
}
# The only scaling of Phi-3, which has three names there.
PHI3_SCALINGS: Scalings = {
    "default": SCALINGS["default"],
    **dict.fromkeys(("longrope", "su", "yarn"), SCALINGS["longrope"]),
}

# The parameters that transformers requires, by our name of the scaling.
NEEDED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "dynamic": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}


def rope(
    theta: float = 1e4,
    fraction: float | None = None,
    old: tuple[str, ...] = ("rope_theta", ""),
    absent: Theirs | None = None,
    scalings: Scalings = SCALINGS,
    original: int | None = None,
    counted: bool = True,
) -> Lens:
    """Return the lens of `rope_parameters`, or of the older `rope_theta` and `rope_scaling`.

    Both ways raise `ValueError` for positions that the other side can't express.

    Args:
      theta: its default.
      fraction: its default, if the family has one.
      old: the names of theta and of the fraction outside of `rope_parameters`, then their synonyms.
      absent: the `rope_parameters` of a config that has none.
      scalings: those that transformers supports in this family.
      original: the default of `original_max_position_embeddings`, if the family reads that key only outside.
      counted: see `_scaling`.
    """

    def read(config: Theirs) -> Fields:
        outside = {"rope_theta": config.get(old[0], theta)}
        if fraction is not None:
            outside["partial_rotary_factor"] = config.get(old[1], fraction)
        inside = config.get("rope_scaling") or config.get("rope_parameters") or absent or {}
        parameters: dict[str, Any] = {**outside, **inside}
        for name, now in zip(old[2:], ("rope_theta", "partial_rotary_factor"), strict=False):
            if config.get(name, parameters[now]) != parameters[now]:
                raise ValueError(
                    f"config.json has {name}={config[name]}, but says {parameters[now]} elsewhere, and versions of "
                    "transformers differ in which they take; set both to what the model has"
                )
        if original is not None:
            config = {ORIGINAL: original, **config}
        return _rotary(parameters, config, fraction is not None, scalings)

    def write(c: ModelConfig) -> dict[str, Any]:
        partial = {} if fraction is None else {"partial_rotary_factor": c.rotary.fraction}
        names = zip(old, (c.rotary.theta, c.rotary.fraction) * 2, strict=False)
        before: dict[str, Any] = {name: value for name, value in names if name}
        if absent and c.rotary.scaling == "none":
            before["rope_scaling"] = {"type": "default", "rope_type": "default"}  # absence means another
        before |= _scaling(c.rotary, c.max_seq_len, scalings, counted=counted)
        return {"rope_parameters": _parameters(c.rotary, scalings) | partial} | before

    return Lens(("rope_parameters", "rope_scaling", ORIGINAL, *filter(None, old)), read, write)


def rope_by_type(theta: float, local_theta: float | None = None, old: str = "") -> Lens:
    """Return the lens of Gemma 3 and OLMo 3: local layers have no scaling, and their own theta if `old` names it.

    Both ways raise `ValueError` for positions that the other side can't express.
    """

    def read(config: Theirs) -> Fields:
        given = config.get("rope_parameters") or {}
        for name in given:
            known("rope_parameters for", KINDS, name)
        if local_theta is None and not given and config.get("rope_theta", theta) != theta:
            raise ValueError(
                f"config.json has rope_theta={config['rope_theta']} outside of rope_parameters, which transformers "
                f"takes for full attention alone, and {theta} for the rest; say both in rope_parameters"
            )
        full = {"rope_theta": config.get("rope_theta", theta)} | (given.get("full_attention") or {})
        near_theta = config.get(old, local_theta or full["rope_theta"])
        local = {"rope_theta": near_theta} | (given.get("sliding_attention") or {})
        near = _rotary(local, config)
        if near["rotary.scaling"] != "none":
            raise ValueError(
                f"config.json scales the positions of sliding_attention by {near['rotary.scaling']}; known: default"
            )
        scaled = full | (config.get("rope_scaling") or {})
        return _rotary(scaled, config) | {"rotary.local_theta": near["rotary.theta"]}

    def write(c: ModelConfig) -> dict[str, Any]:
        if not old and c.rotary.local.theta != c.rotary.theta:
            raise ValueError(
                f"model.rotary.local_theta={c.rotary.local.theta} is not model.rotary.theta={c.rotary.theta}, as in "
                "such a family for transformers 4, which has one for all layers"
            )
        local = {"rope_type": "default", "rope_theta": c.rotary.local.theta}
        now = {"rope_parameters": {"full_attention": _parameters(c.rotary), "sliding_attention": local}}
        before = {"rope_theta": c.rotary.theta} | ({old: c.rotary.local.theta} if old else {})
        return now | before | _scaling(c.rotary, c.max_seq_len, SCALINGS, counted=False)

    return Lens(("rope_parameters", "rope_scaling", ORIGINAL, "rope_theta", *filter(None, [old])), read, write)


def _rotary(parameters: Theirs, config: Theirs, partial: bool = False, scalings: Scalings = SCALINGS) -> Fields:
    name = parameters.get("rope_type", parameters.get("type", "default"))
    scaling, fields = known("rope_type", scalings, name)
    given, longest = {key: value for key, value in parameters.items() if value is not None}, {}
    if ORIGINAL in fields:  # the key outside has priority; by default it is the maximum length
        given[ORIGINAL] = config.get(ORIGINAL) or given.get(ORIGINAL) or config["max_position_embeddings"]
    null = scaling == "yarn" and "factor" in parameters  # null means the ratio of both lengths
    if (null or scaling == "longrope") and "factor" not in given:
        given["factor"] = config["max_position_embeddings"] / given[ORIGINAL]
    if scaling == "dynamic":  # their maximum is the trained length: the scaling is for what exceeds it
        trained = config["max_position_embeddings"]
        longest = {"rotary.original_len": trained, "max_seq_len": round(trained * given.get("factor", 1))}
    if lacking := [key for key in ("rope_theta", *NEEDED.get(scaling, ())) if key not in given]:
        what = "null" if lacking[0] in parameters else "none"
        raise ValueError(f"config.json has rope_type={name} and {what} for {lacking[0]}; set what the model has")
    names = {"rope_theta": "theta", **fields} | ({"partial_rotary_factor": "fraction"} if partial else {})
    strange = given.keys() - names.keys() - {"rope_type", "type"}
    if strange:
        raise ValueError(f"rope_type={name} comes with {', '.join(sorted(strange))}; known: {', '.join(names)}")
    ours = {f"rotary.{names[key]}": given[key] for key in given if key in names}
    return {"rotary.scaling": scaling} | ours | longest


def _scaling(rotary: Rotary, longest: int, scalings: Scalings, *, counted: bool) -> dict[str, Any]:
    """Return `rope_scaling`, for readers without `rope_parameters`, with both names of its kind; {} without one.

    `counted`: the family is as old as `linear`, and its old readers accept exactly two keys. Two kinds depend on the
    length of a text: `dynamic` on `max_position_embeddings`, `longrope` on a key outside, whose ratio to the maximum is
    its factor. Raise `ValueError` for another factor; Phi-3, whose readers accept exactly three keys, is then
    written without `type`, so that they refuse it.
    """
    scaled = {name: value for name, value in _parameters(rotary, scalings).items() if name != "rope_theta"}
    kind = scaled.pop("rope_type")
    both = {"rope_scaling": {"type": kind, "rope_type": kind} | scaled}
    if kind == "default":
        return {}
    if kind == "linear" and counted:
        return {"rope_scaling": {"type": kind} | scaled}
    if kind == "dynamic":
        return both | {"max_position_embeddings": rotary.original_len}
    if kind != "longrope":
        return both
    assert rotary.original_len is not None
    outside, follows = {ORIGINAL: rotary.original_len}, rotary.factor == longest / rotary.original_len
    if scalings is PHI3_SCALINGS and follows and rotary.amplitude is None:
        lists = {name: scaled[name] for name in ("short_factor", "long_factor")}
        return {"rope_scaling": {"type": kind} | lists} | outside
    if scalings is PHI3_SCALINGS:
        return {"rope_scaling": {"rope_type": kind} | scaled} | outside
    if not follows:
        raise ValueError(
            f"model.rotary.factor={rotary.factor} is not model.max_seq_len={longest} / model.rotary.original_len="
            f"{rotary.original_len}, which transformers 4 takes for it"
        )
    return both | outside


def _parameters(rotary: Rotary, scalings: Scalings = SCALINGS) -> dict[str, Any]:
    name, fields = next(
        ((name, fields) for name, (ours, fields) in scalings.items() if ours == rotary.scaling), ("default", {})
    )
    values = {theirs: getattr(rotary, ours) for theirs, ours in fields.items()}
    return {"rope_type": name, "rope_theta": rotary.theta} | {k: v for k, v in values.items() if v is not None}
