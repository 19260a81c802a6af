"""Checkpoints by Orbax: asynchronous, the last few and the best, restored onto whatever mesh is there now.

    <run>/checkpoints/<step>/   params, opt_state, record

Orbax writes a checkpoint under another name and renames it when it is complete, so a kill leaves no half of one. But a
bit that flips on disk afterwards would come back as a wrong number, unnoticed: so `record` holds a checksum of every
leaf, and one of itself. It also holds the seal of the run, with which the run's files are compared (`seal.py`). A state
that is not finite is never saved.
"""

import dataclasses
import functools
import json
import math
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from llm_jax import processes
from llm_jax import tree as trees
from llm_jax.log import Report
from llm_jax.runs import folder as run_folder
from llm_jax.runs import seal as seals
from llm_jax.runs.checksum import checksums, not_finite
from llm_jax.runs.damage import attempt, gist, hushed
from llm_jax.runs.seal import Seal
from llm_jax.train.step import TrainState

FOLDER = "checkpoints"
UNFINISHED = "*.orbax-checkpoint-tmp*"


class NotFinite(ValueError):
    """A state holds a NaN or an infinity, and is not saved."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a run must remember besides its train state, to resume as if nothing had happened.

    Attributes:
      step: optimizer steps done, and so the position in the data: a batch is a function of (seed, step).
      tokens: tokens read, padding left out.
      skipped: steps whose loss, gradient or update was not finite.
      skipped_in_a_row: consecutive skipped steps up to this one.
      heldout_loss: as measured at this step, None if it was not; what `fit` and `resume` return has the last measured.
      stopped: whether a signal or a callback ended the run before its last step; only set in what `fit` and `resume`
        return.
    """

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    heldout_loss: float | None = None
    stopped: bool = False


class Checkpoints:
    """The checkpoints of one run folder. A context manager: leaving it waits for the last save.

    `read_only` promises to change nothing there, where another process may be training. `seal` is saved with every
    state, and compared with the one saved with a state that is read; by default it is made from the files in `folder`.
    Raise `ValueError` for a read-only folder without checkpoints.
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
        self._saved_in = ExitStack()  # keeps the folder open: some file systems renumber what nobody holds
        self._moved: Callable[[], str | None] = lambda: None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        try:
            self.wait()
        except OSError:
            if error is None:  # otherwise the first error says more
                raise
        finally:
            self._saved_in.close()
            self._orbax.close()
            self._reader.close()

    def steps(self) -> list[int]:
        """Return the steps of all finished checkpoints, newest first."""
        return sorted((int(path.name) for path in self.folder.glob("*") if path.name.isdecimal()), reverse=True)

    def newest(self) -> int | None:
        """Return the step of the newest checkpoint, from memory: the folder may be gone."""
        return max(self._heldout_losses.keys() - {self._saving}, default=None)

    def best(self) -> int | None:
        """Return the step with the lowest held-out loss; None where none was measured."""
        step = min(self._heldout_losses, key=self._heldout_losses.__getitem__, default=None)
        return None if step is None or self._heldout_losses[step] == math.inf else step

    def is_best(self, heldout_loss: float | None) -> bool:
        """Return whether no checkpoint has so low a loss."""
        return _or_infinite(heldout_loss) < min(self._heldout_losses.values(), default=math.inf)

    def save(self, state: TrainState, progress: Progress) -> None:
        """Start to save. Return once the state is copied, so that its buffers may be donated to the next step.

        Raise `OSError` if this save can't begin or the one before failed, `NotFinite` for a state with NaN or infinity.
        """
        assert not self._read_only
        self.wait()
        items = _with_leaves({"params": state.params, "opt_state": state.opt_state})
        if bad := not_finite(_surely_finite(items, self._seal)):
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
        """Wait until the last save is complete. Raise `OSError` if it failed."""
        if self._saving is not None:
            with self._named_errors(self._saving):
                self._orbax.wait_until_finished()
            self._saving = None

    def wait(self) -> None:
        """Wait until the last save is complete and those it replaces are deleted. Raise `OSError` if it failed."""
        if (step := self._saving) is None:
            return
        with self._saved_in.pop_all():
            self.finish()
            moved = self._moved()
        if moved is not None:  # what is here now is not ours to delete
            if processes.is_first():
                self._say(f"{self.folder} is not where step {step} was saved: older checkpoints are not deleted")
            return
        # From every process's memory, not from the folder, which the first process is changing.
        for step in set(sorted(self._heldout_losses, reverse=True)[self._keep :]) - {self.best()}:
            del self._heldout_losses[step]
            if processes.is_first():
                shutil.rmtree(self.folder / str(step))

    def restore(self, abstract: TrainState, report: Report) -> tuple[TrainState, Progress] | None:
        """Return the newest state that can be read, sharded like `abstract`; None where no save was ever finished.

        One that can't be read is reported, and set aside so that its step can be saved again; remains of an interrupted
        save are reported and removed. Raise `ValueError` if none can be read, or the newest is of another model.
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
        """Return the seal saved with the state of `step`; None where that was before there were seals."""
        return self._record(step).get("seal")

    def _remove_unfinished(self, report: Report) -> None:
        for path in sorted(self.folder.glob(UNFINISHED)):
            report(f"removed {path}: the save of step {path.name.partition('.')[0]} was interrupted")
            shutil.rmtree(path)

    def restore_params(self, abstract: PyTree, report: Report, which: str = "best") -> tuple[PyTree, int]:
        """Return the weights alone, and their step. `which` is `best` (by held-out loss), `last`, or a step.

        Where the best or the last can't be read, that is reported, and the newest that can is used. Raise `ValueError`
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
        """Return the first of `steps` that is intact: its step, its trees named in `abstract`, its progress.

        Each process reads its own shards; if that fails for one, it fails for all. Raise `ValueError` if none is
        intact, or the first intact one is of another run or model.
        """
        here = seals.seal_of_folder(self.folder.parent) if self._seal is None else self._seal
        for step in steps:
            record, damage = attempt(functools.partial(self._record, step))
            refusal = None if record is None else self._refusal(step, record, here, abstract)
            found: dict[str, PyTree] | None = {}
            if damage is None and refusal is None:
                found, damage = attempt(functools.partial(self._read, step, abstract))
            damage = next(filter(None, processes.from_all(damage)), None)
            if damage is None and record is not None and found is not None:
                if refusal is not None:
                    raise ValueError(refusal)
                damage = _changed(found, record["leaves"], record.get("seal"))
                if damage is None:
                    return step, found, Progress(**record["progress"])
            path = self.folder / str(step)
            report(f"passed over the checkpoint of step {step}, {path}: it is damaged ({damage})")
        raise ValueError(
            f"{self.folder} holds no checkpoint that can be read (tried {list(steps) or 'none'}); start a new run"
        )

    def _refusal(self, step: int, record: dict[str, Any], here: Seal | None, abstract: dict[str, PyTree]) -> str | None:
        """Say why an intact checkpoint is not the one wanted; None where it is."""
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
        """Return the trees of a checkpoint, with this process's shards."""
        wanted = _with_leaves(abstract)
        arguments = ocp.args.Composite(**{name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()})
        restored = self._reader.restore(self.folder / str(step), args=arguments)
        return abstract | {name: restored[name] for name in wanted}

    def _record(self, step: int) -> dict[str, Any]:
        arguments = ocp.args.Composite(record=ocp.args.JsonRestore())
        return _unsealed(self._reader.restore(self.folder / str(step), args=arguments).record)

    def _heldout_loss(self, step: int) -> float:
        record, _ = attempt(
            functools.partial(self._record, step)
        )  # a damaged one is never the best; a restore reports it
        return math.inf if record is None else _or_infinite(record["progress"]["heldout_loss"])

    def _set_aside(self, step: int) -> Path:
        """Rename a damaged checkpoint, so that it neither counts among the kept ones nor blocks its step."""
        names = (self.folder / f"{step}.damaged{suffix}" for suffix in ["", *(f"-{n}" for n in range(2, 1000))])
        path = next(path for path in names if not path.exists())
        return (self.folder / str(step)).rename(path)

    def _check_room(self, items: dict[str, PyTree], step: int) -> None:
        """Raise `OSError` where the disk has no room: one that fills up during a save would lose metrics too."""
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
            with hushed():
                yield
        except Exception as error:
            self._saving = None
            self._heldout_losses.pop(step, None)
            raise OSError(f"the checkpoint of step {step} could not be written ({gist(error)})") from error


def _with_leaves(items: dict[str, PyTree]) -> dict[str, PyTree]:
    """Return those of `items` that hold an array, as Orbax requires: plain SGD has no state."""
    return {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}


def _surely_finite(items: dict[str, PyTree], seal: Seal | None) -> dict[str, PyTree]:
    """Return those of `items` that may hold no infinity: the state of an optimizer of the user's own may."""
    own = "optimizer" in (seal or {}).get("code", {})
    return {name: tree for name, tree in items.items() if not (own and name == "opt_state")}


def _changed(found: dict[str, PyTree], leaves: dict[str, list[Any]], seal: Seal | None) -> str | None:
    """Name the first leaf that is not what was saved, or is not finite; None where all are intact."""
    for path, number in jax.device_get(checksums(found)).items():
        if int(number) != leaves[path][-1]:
            return f"{path} is not what was saved"
    bad = not_finite(_surely_finite(found, seal))
    return bad and f"{bad} is not finite"


def _lone_reader() -> ocp.Checkpointer:
    """Return a reader that waits for no other process: one that met damage would leave the rest in a barrier."""
    here = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"reader_{here}"
    )
    handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(multiprocessing_options=options))
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def _form(leaf: Any) -> list[Any]:
    return [str(leaf.dtype), list(leaf.shape)]


def _misfit(saved: dict[str, list[Any]], abstract: dict[str, PyTree]) -> str | None:
    """Name the first leaf that only one of the two has, or with another shape; None where all fit."""
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


def _or_infinite(loss: float | None) -> float:
    return math.inf if loss is None or math.isnan(loss) else loss
