"""Configs survive JSON and the command line; every mistake gets one line that says what to do."""

import dataclasses
import inspect
import json
import math
import re
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import llm_jax as lj
from llm_jax.config import check_ranges, checked, from_dict, nearest, override, plain, replace, to_dict
from llm_jax.keys import keys


@dataclasses.dataclass(frozen=True)
class Engine:
    power: int = 1
    rate: float = 0.5
    fuel: Literal["coal", "oil"] = "coal"


@dataclasses.dataclass(frozen=True)
class Train:
    wagons: int
    engine: Engine = Engine()
    spare: Engine | None = None
    name: str = ""
    express: bool = False
    limit: int | None = None
    speed: float | None = None
    stops: tuple[str, ...] = ()
    gauges: tuple[int, ...] = (1435,)

    def __post_init__(self) -> None:
        if self.limit is not None and self.wagons > self.limit:
            raise ValueError(f"wagons={self.wagons} exceeds limit={self.limit}")


# On the command line the word none is None, and a comma ends an item of a tuple.
words = st.text(st.characters(exclude_characters=",", codec="utf-8")).filter(lambda text: text != "none")
numbers = st.floats(allow_nan=False, allow_infinity=False)
engines = st.builds(Engine, st.integers(), numbers, st.sampled_from(["coal", "oil"]))
trains = st.builds(
    Train,
    wagons=st.integers(),
    engine=engines,
    spare=st.none() | engines,
    name=words,
    express=st.booleans(),
    speed=st.none() | numbers,
    stops=st.lists(words).map(tuple),
    gauges=st.lists(st.integers()).map(tuple),
)


@given(trains)
def test_a_config_survives_json(config: Train):
    assert from_dict(Train, json.loads(json.dumps(to_dict(config)))) == config


def assignments(config: Any, prefix: str = "") -> list[str]:
    """`config` as a user would type it."""
    lines = []
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            lines += assignments(value, f"{key}.")
        elif isinstance(value, tuple):
            lines.append(f"{key}=" + "".join(f"{item}," for item in value))
        else:
            lines.append(f"{key}={'none' if value is None else value}")
    return lines


@given(trains)
def test_a_config_survives_the_command_line(config: Train):
    assert override(Train(wagons=0), assignments(config)) == config


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("wagons=1e6", {"wagons": 1_000_000}),
        ("wagons=-3", {"wagons": -3}),
        ("speed=3", {"speed": 3.0}),
        ("speed=none", {"speed": None}),
        ("express=True", {"express": True}),
        ("name=a=b", {"name": "a=b"}),
        ("stops=", {"stops": ()}),
        ("stops=Ulm", {"stops": ("Ulm",)}),
        ("stops=Ulm,Bern", {"stops": ("Ulm", "Bern")}),
        ("stops=,", {"stops": ("",)}),
        ("gauges=1000,1435", {"gauges": (1000, 1435)}),
        ("engine.fuel=oil", {"engine": Engine(fuel="oil")}),
        ("spare.power=2", {"spare": Engine(power=2)}),
    ],
)
def test_text_becomes_a_value_of_the_annotated_type(assignment: str, expected: dict[str, Any]):
    assert override(Train(wagons=1), [assignment]) == dataclasses.replace(Train(wagons=1), **expected)


ERRORS = {
    "wagon=3": "unknown config key 'wagon'; did you mean wagons=3?",
    "engine.fule=oil": "unknown config key 'engine.fule'; did you mean engine.fuel=oil?",
    "spare.pwer=2": "unknown config key 'spare.pwer'; did you mean spare.power=2?",
    "engine.zzz=1": "unknown config key 'engine.zzz'; known: engine.power, engine.rate, engine.fuel",
    "wagons=three": "wagons takes a whole number, got 'three'",
    "wagons=1.5": "wagons takes a whole number, got '1.5'",
    "wagons=1e400": "wagons takes a whole number, got '1e400'",
    "wagons=²": "wagons takes a whole number, got '²'",
    "wagons=none": "wagons takes a whole number, got 'none'",
    "limit=few": "limit takes a whole number or none, got 'few'",
    "speed=fast": "speed takes a number or none, got 'fast'",
    "engine.rate=nan": "engine.rate takes a number, got 'nan'",
    "express=yes": "express takes true or false, got 'yes'",
    "engine.fuel=peat": "engine.fuel takes one of coal, oil, got 'peat'",
    "gauges=1000,wide": "gauges takes a whole number, got 'wide'",
    "engine=big": "engine takes a group of values (set one of engine.power, engine.rate, engine.fuel), got 'big'",
    "wagons.first=1": "wagons takes a whole number, got a group of values (first)",
    "wagons": "expected key=value, got 'wagons'; for example model.n_layers=8",
    "=3": "expected key=value, got '=3'; for example model.n_layers=8",
    "zzz=3": "unknown config key 'zzz'; llm-jax show CONFIG --config lists all that there are",
    "engine.=3": "unknown config key 'engine.'; known: engine.power, engine.rate, engine.fuel",
    "Power=2": "unknown config key 'Power'; did you mean engine.power=2, or spare.power=2?",
    "wagons=": "wagons takes a whole number, got ''",
    "wagons=1_000": "wagons takes a whole number, got '1_000'; write 1000",
    "wagons=١٢": "wagons takes a whole number, got '١٢'; write 12",
    "wagons = 3": "'wagons = 3' has blanks; write wagons=3",
    "wagons= 3": "wagons takes a whole number, got ' 3'; write 3",
    "engine.rate=1_0.5": "engine.rate takes a number, got '1_0.5'; write 10.5",
    "engine.rate=0x10": "engine.rate takes a number, got '0x10'",
    "wagons=" + "9" * 5000: f"wagons takes a whole number, got '{'9' * 89}...{'9' * 89}'",
    "gauges=" + "1," * 10_001: "gauges takes at most 10,000 values, got 10,001",
    ".".join("a" * 9999) + "=1": f"unknown config key '{'a.' * 44}a...",
}


@pytest.mark.parametrize(("assignment", "message"), ERRORS.items())
def test_a_mistake_on_the_command_line_is_named_in_one_line(assignment: str, message: str):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        override(Train(wagons=1), [assignment])


@pytest.mark.parametrize("pair", [("engine=1", "engine.power=2"), ("engine.power=2", "engine=1")])
def test_a_key_cannot_be_a_value_and_a_group(pair: tuple[str, str]):
    with pytest.raises(ValueError, match="engine is set both as a value and as a group of values; keep one"):
        override(Train(wagons=1), list(pair))


def test_a_group_below_a_value_is_named_too():
    with pytest.raises(ValueError, match="engine is set both as a value and as a group"):
        override(Train(wagons=1), ["engine=1", "engine.power.more=2"])


def test_json_of_a_wrong_type_is_refused():
    for values in ({"wagons": True}, {"wagons": None}, {"wagons": [1]}, {"wagons": 1, "express": 1}):
        with pytest.raises(ValueError, match="takes"):
            from_dict(Train, values)
    with pytest.raises(ValueError, match="express takes true or false, got 'ja'"):
        checked(Train(wagons=1, express="ja"))


def test_json_without_a_required_key_names_it():
    with pytest.raises(ValueError, match="config key 'wagons' is missing; it has no default"):
        from_dict(Train, {})


def test_whole_numbers_keep_every_digit():
    for number in (2**63 + 1, -(2**63) - 1, 10**400):
        assert from_dict(Train, {"wagons": number}).wagons == number
        assert override(Train(wagons=0), [f"wagons={number}"]).wagons == number
    with pytest.raises(ValueError, match="speed takes a number"):
        from_dict(Train, {"wagons": 1, "speed": 10**400})


def test_overrides_take_effect_together_and_none_is_lost():
    config = Train(wagons=5, limit=6)
    assert override(config, ["wagons=9", "limit=10", "wagons=9"]) == Train(wagons=9, limit=10)
    with pytest.raises(ValueError, match="wagons is set twice, to '9' and to '8'; keep one of them"):
        override(config, ["wagons=9", "limit=10", "wagons=8"])
    with pytest.raises(ValueError, match="wagons=9 exceeds limit=6"):
        override(config, ["wagons=9"])


def test_values_by_path_take_effect_together_and_so_do_assignments():
    config = replace(Train(wagons=3, limit=5), wagons=8, limit=9, **{"engine.rate": 2, "spare.fuel": "oil"})
    assert config == Train(wagons=8, limit=9, engine=Engine(rate=2.0), spare=Engine(fuel="oil"))
    assert replace(config, spare=None, engine=Engine(7)) == Train(wagons=8, limit=9, engine=Engine(7))
    both = override(Train(wagons=3, limit=5), ["wagons=8", "engine.power=2"], limit=9, engine=Engine(rate=0.25))
    assert both == Train(wagons=8, limit=9, engine=Engine(power=2, rate=0.25))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wagons": "8"}, "wagons takes a whole number, got '8'"),
        ({"limit": "none"}, "limit takes a whole number or none, got 'none'"),
        ({"stops": "a,b"}, "stops takes values of type text separated by commas, got 'a,b'"),
        ({"engine.rate": True}, "engine.rate takes a number, got True"),
        ({"engine.fuel": "gas"}, "engine.fuel takes one of coal, oil, got 'gas'"),
        ({"engine.pwer": 2}, "unknown config key 'engine.pwer'; did you mean engine.power=2?"),
        ({"engine": 2}, "engine takes a group of values"),
        ({"wagons": 9, "limit": 8}, "wagons=9 exceeds limit=8"),
    ],
)
def test_a_value_of_another_type_or_path_is_refused_and_text_is_no_number(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(Train(wagons=1), **changes)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: lj.ModelConfig("320", 64, 2, 4, 128), "model.vocab_size takes a whole number, got '320'"),
        (lambda: lj.ModelConfig(320.0, 64, 2, 4, 128), "model.vocab_size takes a whole number, got 320.0"),
        (lambda: lj.ModelConfig(320, 64, 2, 4, 128, tied=1), "model.tied takes true or false, got 1"),
        (lambda: lj.ModelConfig(np.int64(3), 64, 2, 4, 8), "a whole number, got np.int64(3); give int(...) of it"),
        (lambda: lj.ModelConfig(320, 64, 2, 4, 128, layers=["global"]), "give a tuple: ('global',)"),
        (lambda: lj.ModelConfig(320, 64, 2, 4, 128, layers="global"), "give a tuple: ('global',)"),
        (lambda: lj.AttentionConfig(window=4.5), "model.attention.window takes a whole number or none, got 4.5"),
        (lambda: lj.Sparse(block="8"), "model.attention.sparse.block takes a whole number, got '8'"),
        (lambda: lj.Experts(number=None), "model.experts.number takes a whole number, got None"),
        (lambda: lj.Rotary(theta="1e4"), "model.rotary.theta takes a number, got '1e4'"),
        (lambda: lj.DataConfig(uri=3), "data.uri takes text, got 3"),
        (lambda: lj.TaskConfig("clasify"), "got 'clasify'; did you mean data.task.kind=classify?"),
        (lambda: lj.OptimizerConfig(learning_rate="1e-3"), "optimizer.learning_rate takes a number, got '1e-3'"),
        (lambda: lj.LossConfig(chunk=True), "loss.chunk takes a whole number or none, got True"),
        (lambda: lj.MeshConfig(data="8"), "mesh.data takes a whole number, got '8'"),
        (lambda: lj.PipelineConfig(chunks="2"), "pipeline.chunks takes a whole number, got '2'"),
        (lambda: lj.RunConfig(model=lj.DataConfig()), "give a ModelConfig(...)"),
    ],
)
def test_a_field_of_another_type_is_refused_when_a_config_is_made(make: Callable[[], Any], says: str):
    with pytest.raises(ValueError, match=re.escape(says)):
        make()


def test_every_config_class_checks_the_types_of_its_fields():
    groups = {key.group for key in keys(lj.RunConfig)} - {None}
    for cls in (*groups, lj.RunConfig):
        assert "check_types(self, " in inspect.getsource(cls.__post_init__), cls


def test_a_whole_number_is_a_float_too():
    assert lj.OptimizerConfig(learning_rate=1, clip=np.float64(2)) == lj.OptimizerConfig(learning_rate=1.0, clip=2.0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"wagons": 2**31}, "wagons=2147483648 is more than int32 can count; use at most 2147483647"),
        ({"wagons": -(2**31)}, "wagons=-2147483648 is more than"),
        ({"gauges": (1, 10**5000)}, "gauges=a number of thousands of digits is more"),
        ({"speed": 1e39}, r"speed=1e\+39 is no float32; use 0, or a size from"),
        ({"engine": Engine(rate=1e-50)}, "engine.rate=1e-50 is no float32"),
    ],
)
def test_a_number_that_arrays_cannot_take_is_refused(change: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=f"^{says}"):
        check_ranges(dataclasses.replace(Train(wagons=1), **change), "")


def test_a_number_that_arrays_can_take_is_not_refused():
    check_ranges(Train(wagons=2**31 - 1, speed=-3e38, engine=Engine(rate=0.0), gauges=(1, -5)), "")


def test_checking_gives_floats_where_a_recipe_wrote_whole_numbers():
    speed = checked(Train(wagons=1, speed=3)).speed
    assert isinstance(speed, float)
    assert math.isclose(speed, 3)


def test_the_nearest_name_is_offered_and_otherwise_all_names():
    assert nearest("d_modle", ["n_heads", "d_model"]) == "did you mean 'd_model'?"
    assert nearest("q", ["n_heads", "d_model"]) == "known: d_model, n_heads"


def test_what_is_shown_of_a_value_is_what_the_command_line_takes():
    shown = [plain(x) for x in (None, True, 0.5, "text", (1, 2), ["a", None])]
    assert shown == ["none", "true", "0.5", "text", "1,2", "a,none"]
