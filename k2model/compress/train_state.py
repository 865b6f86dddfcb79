"""What a training step leaves behind to go on from: tensors in safetensors, the rest in JSON. Nothing is pickled.

A state is there when state.json names it; the tensors it names were written before, under names of their own step.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from k2model.formats.export import write_tensors
from schemas.errors import SpecError

_CURVE = "curve.jsonl"


@dataclass(slots=True)
class Place:
    """How far a training step has come."""

    step: int = 0
    """Steps of the optimizer taken."""
    epoch: int = 0
    batch: int = 0
    """Batches of this epoch used."""
    tokens: int = 0
    """Tokens of prompts trained on."""
    seconds: float = 0.0
    best_step: int = -1
    """Where validation was best; -1 before the first."""
    best: dict[str, float] | None = None
    """What validation said there."""
    waited: int = 0
    """Validations since."""


class StateFolder:
    """The folder `checkpoint` of a step under way, and its curve."""

    def __init__(self, target: Path, made_of: Mapping[str, Any]) -> None:
        """Open or make it.

        Args:
            target: the step's folder.
            made_of: everything the weights depend on; a state of anything else is not gone on from.

        Raises: SpecError if `target` is finished, or holds the beginning of another step.
        """
        self.target, self.folder = target, target / "checkpoint"
        self._digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
        if (target / "config.json").exists() and not self.folder.exists():
            raise SpecError(f"{target} holds a finished checkpoint", remedy="give an empty folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._state = self._read()
        if self._state and self._state["digest"] != self._digest:
            raise SpecError(
                f"{target} holds the beginning of a step with another source, other data or other options",
                remedy="give an empty folder, or what that step was given",
            )
        self._keep_curve()

    @property
    def place(self) -> Place:
        """How far the step had come; its beginning if nothing was kept."""
        return Place(**self._state["place"]) if self._state else Place()

    def load(self, learned: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Put the kept weights into `learned` and the kept moments into `optimizer`."""
        if not self._state:
            return
        kept = load_file(self.folder / _tensors_of(self.place.step))
        load_weights(learned, {name: kept[f"weight.{name}"] for name in learned})
        for name, parameter in learned.items():
            optimizer.state[parameter] = {
                "step": torch.tensor(float(self.place.step), device=parameter.device),
                "exp_avg": kept[f"exp_avg.{name}"].to(parameter.device),
                "exp_avg_sq": kept[f"exp_avg_sq.{name}"].to(parameter.device),
            }

    def save(self, place: Place, learned: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Keep everything; what was kept before goes when this is there."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in learned.items():
            state = optimizer.state.get(parameter, {})
            tensors[f"weight.{name}"] = parameter
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}.{name}"] = state.get(moment, torch.zeros_like(parameter))
        write_tensors(self.folder / _tensors_of(place.step), tensors)
        self._state = {"digest": self._digest, "place": asdict(place)}
        part = self.folder / "state.json.part"
        with part.open("w", encoding="utf-8") as file:
            json.dump(self._state, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.folder / "state.json")
        needed = {_tensors_of(place.step), _best_of(place.best_step)}
        for path in self.folder.glob("*.safetensors"):
            if path.name not in needed:
                path.unlink()

    def save_best(self, place: Place, learned: Mapping[str, nn.Parameter]) -> None:
        """Keep the weights of `place`, the best so far; `save` makes it count."""
        write_tensors(self.folder / _best_of(place.best_step), learned)

    def load_best(self, place: Place, learned: Mapping[str, nn.Parameter]) -> None:
        """Put the best weights into `learned`."""
        load_weights(learned, load_file(self.folder / _best_of(place.best_step)))

    def log(self, line: Mapping[str, Any]) -> None:
        """Append a line to the curve."""
        with (self.target / _CURVE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def remove(self) -> None:
        """Remove the state: the step is finished."""
        # Renamed first: half a state would be taken for the beginning of a step.
        shutil.rmtree(self.folder.rename(self.folder.with_suffix(".done")))

    def _read(self) -> dict[str, Any]:
        path = self.folder / "state.json"
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return state

    def _keep_curve(self) -> None:
        """Leave out what was logged after the state was kept: those steps are taken again."""
        place = self.place
        lines = [line for line in read_curve(self.target) if line["step"] <= place.step] if self._state else []
        (self.target / _CURVE).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def read_curve(target: Path) -> list[dict[str, Any]]:
    """Return the lines of a step's curve; one that was cut short by a kill is left out."""
    path = target / _CURVE
    lines: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


@torch.no_grad()
def load_weights(learned: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> None:
    """Copy `weights` into the parameters `learned` of the same names."""
    for name, parameter in learned.items():
        parameter.copy_(weights[name])


def learned_parameters(modules: Sequence[tuple[str, nn.Module]]) -> dict[str, nn.Parameter]:
    """Return the parameters of `modules`, each with its prefix, that are not frozen."""
    return {
        f"{prefix}{name}": parameter
        for prefix, module in modules
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def _tensors_of(step: int) -> str:
    return f"state-{step:08d}.safetensors"


def _best_of(step: int) -> str:
    return f"best-{step:08d}.safetensors"
