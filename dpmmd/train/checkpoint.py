"""Checkpoints: one table says what is in them, when they are refused and where their values go."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from dpmmd.errors import first_line
from dpmmd.files import expanded
from dpmmd.generators import build
from dpmmd.recipe import GeneratorSection
from dpmmd.train.sampling import Mixture
from dpmmd.train.state import State, Task, Trained, take_over

CHECKPOINT = "last.pt"
_FORMAT = 1
# On the result, but for rounding; of precision, "bfloat16" is no other one's rounding.
WITHOUT_EFFECT = {
    "checkpoint_every",
    "log_every",
    "grid_every",
    "precision",
    "inject",
    "graph",
    "compile",
    "memory",
}


class CheckpointError(ValueError):
    """A checkpoint that is corrupt, or belongs to another release or other settings."""


def _load(module: nn.Module, state: Mapping[str, Any]) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            "checkpoint: its weights are not those of the generator given; pass the same "
            f"generator, or train in another folder. {' '.join(str(error).split())}"
        ) from None


@dataclass(frozen=True)
class _Field:
    """An entry of a checkpoint.

    Attributes:
        write: its value.
        read: takes a value over into a state.
        refuse: why a training cannot go on from a value, if it cannot.
    """

    write: Callable[[Task, State], Any]
    read: Callable[[State, Any], object] = lambda _state, _value: None
    refuse: Callable[[Task, Any], str | None] = lambda _task, _found: None


def _attribute(name: str, kind: Callable[[Any], Any] = lambda value: value) -> _Field:
    """An attribute of the state that is written as it is."""
    return _Field(
        lambda _, state: getattr(state, name),
        lambda state, value: setattr(state, name, kind(value)),
    )


def _fixed(own: Callable[[Task], Any], reason: Callable[[Any, Any], str]) -> _Field:
    """What must be the same to go on; ``reason`` says, of the value found and one's own, why."""
    return _Field(
        lambda task, _: own(task),
        refuse=lambda task, found: None if found == own(task) else reason(found, own(task)),
    )


def _other_settings(task: Task, found: Mapping[str, Any]) -> str | None:
    wanted = task.settings.model_dump(mode="json")
    free = WITHOUT_EFFECT - ({"checkpoint_every"} if task.selection else set())
    if "bfloat16" in (wanted["precision"], found.get("precision")):
        free = free - {"precision"}
    for key in sorted((set(wanted) | set(found)) - free):
        if wanted.get(key) != found.get(key):
            return (
                f"made with {key} = {found.get(key)!r}, now {wanted.get(key)!r}; "
                "continue with the same settings, or train in another folder."
            )
    return None


_FIELDS: dict[str, _Field] = {
    "step": _attribute("step", int),
    "seconds": _attribute("seconds", float),
    "processes": _fixed(
        lambda task: task.team.size,
        lambda found, now: (
            f"written by {found} process(es), now there are {now}; start as many, "
            "or pass elastic=True (--elastic) to go on with another number."
        ),
    ),
    "private": _Field(lambda task, _: task.release.metadata.private),
    "array_sha256": _fixed(
        lambda task: task.release.metadata.array_sha256,
        lambda *_: (
            "it belongs to another release; train in another folder, or remove the checkpoint."
        ),
    ),
    "num_classes": _Field(lambda task, _: task.num_classes),
    "class_names": _Field(lambda task, _: task.release.metadata.class_names),
    "modes": _fixed(
        lambda task: None if task.modes is None else asdict(task.modes),
        lambda *_: (
            "its labels are other rows than those of the release, whose modes another version "
            "of dpmmd merged; go on with that one, or train in another folder."
        ),
    ),
    "selection": _fixed(
        lambda task: task.selection,
        lambda found, _: (
            f"made with{'' if found else 'out'} a selection encoder; continue "
            "likewise, or train in another folder."
        ),
    ),
    "settings": _Field(
        lambda task, _: task.settings.model_dump(mode="json"), refuse=_other_settings
    ),
    "generator_settings": _fixed(
        lambda task: task.record,
        lambda found, now: (
            f"made with the generator {found}, now {now}; continue with the same, "
            "or train in another folder."
        ),
    ),
    "generator": _Field(
        lambda _, state: state.generator.state_dict(),
        lambda state, value: _load(state.generator, value),
    ),
    "averaged": _Field(
        lambda _, state: state.averaged.state_dict(),
        lambda state, value: _load(state.averaged, value),
    ),
    "best": _attribute("best"),
    "optimizer": _Field(
        lambda _, state: state.optimizer.state_dict(),
        lambda state, value: take_over(state.optimizer, value),
    ),
    "loss": _Field(
        lambda _, state: state.estimate(),
        lambda state, value: state.loss.load_state_dict(value, strict=False),
    ),
    "rng": _Field(
        lambda _, state: state.rng.get_state(),
        lambda state, value: state.rng.set_state(value),
    ),
    "global_rng": _attribute("global_rng"),
}
# What older checkpoints lack.
_ABSENT = {"processes": 1, "class_names": None, "modes": None}


def save(folder: Path, task: Task, state: State) -> None:
    """Writes a checkpoint, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {name: field.write(task, state) for name, field in _FIELDS.items()}
    temporary = folder / f".{CHECKPOINT}.tmp"
    torch.save({"format": _FORMAT, **content}, temporary)
    temporary.replace(folder / CHECKPOINT)


def restore(content: Mapping[str, Any], task: Task, state: State, *, elastic: bool = False) -> None:
    """Takes a checkpoint's content over into a state.

    Args:
        elastic: whether another number of processes may have written it.

    Raises:
        CheckpointError: it is one of another task; the state is as it was.
    """
    content = {**_ABSENT, **content}
    for name, field in _FIELDS.items():
        why = None if elastic and name == "processes" else field.refuse(task, content[name])
        if why is not None:
            raise CheckpointError(f"checkpoint: {why}")
    for name, field in _FIELDS.items():
        field.read(state, content[name])


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, nothing executed.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: truncated, corrupt or of another format.
    """
    path = expanded(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; make one with `dpmmd train`.")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"{damaged} does not match its checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a parser of damaged bytes may raise anything
        raise CheckpointError(
            f"{path}: not a readable checkpoint ({first_line(error)}); remove it to "
            "start training again from the release, which costs no privacy."
        ) from None
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path}: not a checkpoint of this version of dpmmd; use the version that wrote it, "
            "or remove it to start training again, which costs no privacy."
        )
    return state


def load_generator(path: str | Path, generator: nn.Module | None = None) -> Trained:
    """The trained generator of a checkpoint, ready to sample.

    Args:
        path: a checkpoint, or a run folder that holds one.
        generator: an untrained instance, for a generator of your own.

    Raises:
        FileNotFoundError: no such checkpoint.
        CheckpointError: it is corrupt, or its weights are not those of ``generator``.
    """
    path = expanded(path)
    if path.is_dir():
        path = path / "checkpoints" / CHECKPOINT
    state = {**_ABSENT, **load_checkpoint(path)}
    modes = None if (rows := state["modes"]) is None else Mixture(**rows)
    if generator is None:
        record = state["generator_settings"]
        if set(record) != set(GeneratorSection.model_fields):
            raise CheckpointError(
                f"{path}: holds a generator of your own ({record.get('name')}); "
                "pass an instance as generator=..."
            )
        look = GeneratorSection(**record)
        labels = state["num_classes"] if modes is None else len(modes.classes)
        generator = build(**look.arguments(), num_classes=labels)
    averaged = AveragedModel(generator, use_buffers=True)
    kept = state["best"] or {"step": state["step"], "averaged": state["averaged"]}
    _load(averaged, kept["averaged"])
    return Trained(
        averaged.module.eval(),
        state["num_classes"],
        bool(state["private"]),
        int(state["step"]),
        float(state["seconds"]),
        int(kept["step"]),
        None if (names := state["class_names"]) is None else tuple(names),
        modes=modes,
    )
