"""Checkpoints by Orbax: asynchronous, the last few and the best, restored onto whatever mesh is there now.

    <run>/checkpoints/<step>/   params, opt_state, record

Orbax writes a checkpoint under another name and renames it when it is whole, so a kill leaves no half of one. But a
bit that flips on disk afterwards comes back as a wrong number, unnoticed: therefore `record` keeps a checksum of
every leaf, and one of itself. It keeps the seal of the run too, against which the files beside it are held
(`seal.py`). A state that is not finite is never saved.
"""

import dataclasses
import functools
import gc
import json
import logging
import math
import re
import shutil
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from llm_jax import processes
from llm_jax import tree as trees
from llm_jax.runs import folder as run_folder
from llm_jax.runs import seal as seals
from llm_jax.runs.checksum import checksums, not_finite
from llm_jax.runs.seal import Seal
from llm_jax.train.step import TrainState

FOLDER = "checkpoints"
UNFINISHED = "*.orbax-checkpoint-tmp*"

Report = Callable[[str], object]
Read = TypeVar("Read")


class NotFinite(ValueError):
    """A state holds a NaN or an infinity, and is not saved."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a run must remember beside its train state, to go on as if nothing had happened.

    Attributes:
      step: optimizer steps done, and so the position in the data: a batch is a function of (seed, step).
      tokens: targets trained on.
      skipped: steps whose loss, gradient or update was not finite.
      skipped_in_a_row: how many of them end the run so far.
      heldout_loss: as measured at this step, None if it was not; what `fit` and `resume` return has the last that was
        measured.
      stopped: whether a signal ended the run before its last step; of what they return alone.
    """

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    heldout_loss: float | None = None
    stopped: bool = False


class Checkpoints:
    """The checkpoints of one run folder. A context manager: leaving it waits for the last save.

    `read_only` promises to change nothing there, where another process may be training. `seal` is what is saved with
    every state, and held against what was saved with those that are read; by default the files in `folder` say it.
    """

    def __init__(
        self,
        folder: str | Path,
        keep: int = 2,
        *,
        read_only: bool = False,
        seal: Seal | None = None,
        say: Report = print,
    ) -> None:
        self.folder = (Path(folder) / FOLDER).absolute()
        if read_only and not self.folder.is_dir():
            raise ValueError(f"{folder} holds no checkpoints (there is no {self.folder}); name the folder of a run")
        self._keep, self._read_only, self._seal, self._say = keep, read_only, seal, say
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._reader = _lone_reader()
        self._heldout_losses = {step: self._heldout_loss(step) for step in processes.from_first(self.steps)}
        self._saving: int | None = None
        self._saved_in = ExitStack()  # keeps the folder open: some stores number anew what nobody holds
        self._moved: Callable[[], str | None] = lambda: None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        try:
            self.wait()
        except OSError:
            if error is None:  # else it came first, and says more
                raise
        finally:
            self._saved_in.close()
            self._orbax.close()
            self._reader.close()

    def steps(self) -> list[int]:
        """The steps of all finished checkpoints, newest first."""
        return sorted((int(path.name) for path in self.folder.glob("*") if path.name.isdecimal()), reverse=True)

    def newest(self) -> int | None:
        """The step of the newest checkpoint, by memory: the folder may be gone."""
        return max(self._heldout_losses.keys() - {self._saving}, default=None)

    def best(self) -> int | None:
        """The step with the least held-out loss; None where none was measured."""
        step = min(self._heldout_losses, key=self._heldout_losses.__getitem__, default=None)
        return None if step is None or self._heldout_losses[step] == math.inf else step

    def is_best(self, heldout_loss: float | None) -> bool:
        """Whether no checkpoint has so small a loss."""
        return _or_infinite(heldout_loss) < min(self._heldout_losses.values(), default=math.inf)

    def save(self, state: TrainState, progress: Progress) -> None:
        """Starts to save. Returns once the state is copied, so that its buffers may be donated to the next step.

        Raises `OSError` if this save can't begin, or the one before could not end, and `NotFinite`.
        """
        assert not self._read_only
        self.wait()
        items = _with_leaves({"params": state.params, "opt_state": state.opt_state})
        if bad := not_finite(items):
            raise NotFinite(f"{bad} is not finite after step {progress.step}, and such a state is not saved")
        self._check_room(items, progress.step)
        self.folder.mkdir(exist_ok=True)
        self._saving, self._moved = progress.step, self._saved_in.enter_context(run_folder.held(self.folder))
        sums = {path: int(number) for path, number in jax.device_get(checksums(items)).items()}
        leaves = {path: [*_form(leaf), sums[path]] for path, leaf in trees.leaves(items).items()}
        done = {name: value for name, value in dataclasses.asdict(progress).items() if name != "stopped"}
        record = {"progress": done, "leaves": leaves}
        record = _sealed(record if self._seal is None else record | {"seal": self._seal})
        arguments = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        with self._named_errors(progress.step):
            self._orbax.save(
                self.folder / str(progress.step),
                args=ocp.args.Composite(record=ocp.args.JsonSave(record), **arguments),
            )
        self._heldout_losses[progress.step] = _or_infinite(progress.heldout_loss)

    def finish(self) -> None:
        """Returns when the last save is whole. Raises `OSError` if it failed."""
        if self._saving is not None:
            with self._named_errors(self._saving):
                self._orbax.wait_until_finished()
            self._saving = None

    def wait(self) -> None:
        """Returns when the last save is whole and those it replaces are gone. Raises `OSError` if it failed."""
        if (step := self._saving) is None:
            return
        with self._saved_in.pop_all():
            self.finish()
            moved = self._moved()
        if moved is not None:  # what stands here now is not ours to clear
            if processes.is_first():
                self._say(f"{self.folder} is not where step {step} was saved: older checkpoints are not cleared")
            return
        # By what every process remembers, not by what it sees of the folder while the first one clears it.
        for step in set(sorted(self._heldout_losses, reverse=True)[self._keep :]) - {self.best()}:
            del self._heldout_losses[step]
            if processes.is_first():
                shutil.rmtree(self.folder / str(step))

    def restore(self, abstract: TrainState, report: Report) -> tuple[TrainState, Progress] | None:
        """The newest state that can be read, laid out as `abstract` says; None where no save was ever finished.

        One that can't be read is named, and set aside so that its step can be saved again; what an interrupted save
        left behind is named and removed. Raises `ValueError` if none can be read, or the newest is of another model.
        """
        assert not self._read_only
        processes.from_first(lambda: self._remove_unfinished(report))
        steps = processes.from_first(self.steps)
        if not steps:
            return None
        items = {"params": abstract.params, "opt_state": abstract.opt_state}
        step, found, progress = self._first_readable(steps, items, report)
        for damaged in steps[: steps.index(step)]:
            path = processes.from_first(lambda damaged=damaged: str(self._set_aside(damaged)))
            del self._heldout_losses[damaged]
            report(f"set aside {path}: delete it when you have seen enough")
        number = jax.device_put(jnp.asarray(progress.step, jnp.int32), abstract.step.sharding)
        return TrainState(step=number, **found), progress

    def sealed(self, step: int) -> Seal | None:
        """What was saved with the state of `step`; None where that was before there were seals."""
        return self._record(step).get("seal")

    def _remove_unfinished(self, report: Report) -> None:
        for path in sorted(self.folder.glob(UNFINISHED)):
            report(f"removed {path}: the save of step {path.name.partition('.')[0]} was interrupted")
            shutil.rmtree(path)

    def restore_params(self, abstract: PyTree, report: Report, which: str = "best") -> tuple[PyTree, int]:
        """The weights alone, and their step. `which` is `best` (by held-out loss), `last`, or a step.

        Where the best or the last can't be read, it is named, and the newest that can is taken. Raises `ValueError`
        where there is no such checkpoint, or none that can be read.
        """
        step, found, _ = self._first_readable(self.order(which), {"params": abstract}, report)
        return found["params"], step

    def order(self, which: str) -> list[int]:
        """Return the steps to try for `best`, `last` or a step. Raise `ValueError` where there is no such step."""
        steps = processes.from_first(self.steps)
        if which in ("best", "last"):
            return sorted(steps, key=lambda step: (which == "best" and step != self.best(), -step))
        if not (which.isascii() and which.isdecimal() and len(which) < 20):
            raise ValueError(f"no checkpoint is called {which!r}; use best, last, or a step out of {sorted(steps)}")
        if int(which) not in steps:
            raise ValueError(f"{self.folder} has no checkpoint of step {which}; use one of {sorted(steps)}")
        return [int(which)]

    def _first_readable(
        self, steps: Sequence[int], abstract: dict[str, PyTree], report: Report
    ) -> tuple[int, dict[str, PyTree], Progress]:
        """The first of `steps` that is whole: its step, its trees of the names in `abstract`, its progress.

        Each process reads its own part; one for which that fails speaks for all.
        """
        here = seals.seal_of_folder(self.folder.parent) if self._seal is None else self._seal
        for step in steps:
            record, damage = _attempt(functools.partial(self._record, step))
            refusal = None if record is None else self._refusal(step, record, here, abstract)
            found: dict[str, PyTree] | None = {}
            if damage is None and refusal is None:
                found, damage = _attempt(functools.partial(self._read, step, abstract))
            damage = next(filter(None, processes.from_all(damage)), None)
            if damage is None and record is not None and found is not None:
                if refusal is not None:
                    raise ValueError(refusal)
                damage = _changed(found, record["leaves"])
                if damage is None:
                    return step, found, Progress(**record["progress"])
            path = self.folder / str(step)
            report(f"passed over the checkpoint of step {step}, {path}: it is damaged ({damage})")
        raise ValueError(
            f"{self.folder} holds no checkpoint that can be read (tried {list(steps) or 'none'}); start a new run"
        )

    def _refusal(self, step: int, record: dict[str, Any], here: Seal | None, abstract: dict[str, PyTree]) -> str | None:
        """Why a checkpoint that is whole is not what is asked for; None where it is."""
        if here is not None and "seal" in record and (found := seals.changes(record["seal"], here)):
            return (
                f"{self.folder.parent} is no longer what its checkpoint of step {step} was made with: "
                f"{'; '.join(found[:3])}; put back what was there, or use the llm_jax that wrote it"
            )
        if misfit := _misfit(record["leaves"], abstract):
            weights_fit = misfit.startswith("opt_state/")
            new = f"start a new run with init_from={self.folder.parent}"
            way = new if weights_fit else "use the config that it was trained with"
            return f"the checkpoint of step {step} in {self.folder} is of another model or optimizer: {misfit}; {way}"
        return None

    def _read(self, step: int, abstract: dict[str, PyTree]) -> dict[str, PyTree]:
        """The trees of a checkpoint, this process's part of them."""
        wanted = _with_leaves(abstract)
        arguments = ocp.args.Composite(**{name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()})
        restored = self._reader.restore(self.folder / str(step), args=arguments)
        return abstract | {name: restored[name] for name in wanted}

    def _record(self, step: int) -> dict[str, Any]:
        arguments = ocp.args.Composite(record=ocp.args.JsonRestore())
        return _unsealed(self._reader.restore(self.folder / str(step), args=arguments).record)

    def _heldout_loss(self, step: int) -> float:
        record, _ = _attempt(functools.partial(self._record, step))  # if damaged never the best; a restore says so
        return math.inf if record is None else _or_infinite(record["progress"]["heldout_loss"])

    def _set_aside(self, step: int) -> Path:
        """Renames a damaged checkpoint, so that it neither takes a place among the kept nor blocks its step."""
        names = (self.folder / f"{step}.damaged{suffix}" for suffix in ["", *(f"-{n}" for n in range(2, 1000))])
        path = next(path for path in names if not path.exists())
        return (self.folder / str(step)).rename(path)

    def _check_room(self, items: dict[str, PyTree], step: int) -> None:
        """A disk that fills up on the way would take the metrics with it."""
        if not self.folder.parent.is_dir():
            raise FileNotFoundError(2, "there is no such folder; make it first", str(self.folder.parent))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(items))
        free = shutil.disk_usage(self.folder.parent).free
        if free < size:
            where = self.folder.parent
            raise OSError(
                f"the checkpoint of step {step} takes {size:,} bytes, but the disk of {where} has {free:,} left"
            )

    @contextmanager
    def _named_errors(self, step: int) -> Iterator[None]:
        try:
            with _hushed():
                yield
        except Exception as error:
            self._saving = None
            self._heldout_losses.pop(step, None)
            raise OSError(f"the checkpoint of step {step} could not be written ({_line(error)})") from error


def _with_leaves(items: dict[str, PyTree]) -> dict[str, PyTree]:
    """Those of `items` that hold any array, as Orbax can save: weights may come alone, and plain SGD has no state."""
    return {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}


def _changed(found: dict[str, PyTree], leaves: dict[str, list[Any]]) -> str | None:
    """The first leaf that is not what was saved, or is not finite; None where all are well."""
    for path, number in jax.device_get(checksums(found)).items():
        if int(number) != leaves[path][-1]:
            return f"{path} is not what was saved"
    bad = not_finite(found)
    return bad and f"{bad} is not finite"


def _lone_reader() -> ocp.Checkpointer:
    """Reads this process's part and waits for no other: one that meets damage would leave the rest in a barrier."""
    here = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"reader_{here}"
    )
    handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(multiprocessing_options=options))
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def _form(leaf: Any) -> list[Any]:
    return [str(leaf.dtype), list(leaf.shape)]


def _misfit(saved: dict[str, list[Any]], abstract: dict[str, PyTree]) -> str | None:
    """The first leaf that stands in only one of the two or has another shape; None where all is well."""
    saved = {path: form for path, (*form, _) in saved.items() if path.partition("/")[0] in abstract}
    wanted = {path: _form(leaf) for path, leaf in trees.leaves(abstract).items()}
    for path in sorted(saved | wanted, key=lambda path: not path.startswith("params/")):
        if saved.get(path) != wanted.get(path):
            there, here = (" ".join(map(str, forms.get(path, ["absent"]))) for forms in (saved, wanted))
            return f"{path} is {there} there, {here} here"
    return None


def _sealed(content: dict[str, Any]) -> dict[str, Any]:
    return {"content": content, "crc32": zlib.crc32(json.dumps(content).encode())}


def _unsealed(sealed: dict[str, Any]) -> dict[str, Any]:
    if zlib.crc32(json.dumps(sealed["content"]).encode()) != sealed["crc32"]:
        raise ValueError("its record is not what was saved")
    return sealed["content"]


@contextmanager
def _hushed() -> Iterator[None]:
    """Where a file is damaged, Orbax abandons its other reads; each would print a traceback of its own as it ends."""
    hooks, level = (sys.unraisablehook, sys.excepthook), logging.root.manager.disable
    sys.unraisablehook = sys.excepthook = lambda *_: None
    logging.disable()
    try:
        yield
    except Exception as error:
        error.__traceback__ = error.__context__ = error.__cause__ = None  # these hold the abandoned reads
        with warnings.catch_warnings(action="ignore"):
            gc.collect()
            time.sleep(0.2)
        raise
    finally:
        sys.unraisablehook, sys.excepthook = hooks
        logging.disable(level)


def _attempt(read: Callable[[], Read]) -> tuple[Read | None, str | None]:
    """Return what `read` gives, or else a line on how the bytes that it read are damaged."""
    try:
        with _hushed():
            return read(), None
    except Exception as error:
        if not _is_damage(error):
            raise
        return None, _line(error)


def _is_damage(error: Exception) -> bool:
    """Whether the bytes that were read are to blame, which may raise anything, and not memory or permissions."""
    elsewhere = re.search("RESOURCE_EXHAUSTED|PERMISSION_DENIED", str(error))
    return not (elsewhere or isinstance(error, MemoryError | PermissionError))


def _or_infinite(loss: float | None) -> float:
    return math.inf if loss is None or math.isnan(loss) else loss


def _line(error: Exception) -> str:
    """The gist of an error on one line: in the system's own words, where it was the system that failed."""
    line = " ".join(str(error).split()) or type(error).__name__
    system = re.search(r"([\w ]+) \[os_error_code", line)
    return system[1].strip() if system else re.split("[.:] ", line)[0]
