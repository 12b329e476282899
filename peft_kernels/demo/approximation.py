"""How near a method's attention weights come to those that full tuning gives: what MoIL is for.

After equally many steps from the same start, over all adapted weights,

    error = ‖W_method − W_tuned‖ / ‖W_tuned − W_0‖

It is 1 for weights that have not moved, and √2 for weights that moved as far in an unrelated direction.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_kernels.adapters import Adapter
from peft_kernels.adapters.checkpoint import save_tensors
from peft_kernels.adapters.config import AdapterConfig
from peft_kernels.adapters.targets import find_targets
from peft_kernels.demo.methods import ATTENTION, LORA, MOIL, Method
from peft_kernels.demo.models import Task
from peft_kernels.demo.scenes import Scenes
from peft_kernels.demo.training import Result
from peft_kernels.layers.adapted_linear import AdaptedLinear

POINTS = 6  # of a training, evenly spaced
_RANK = MOIL.options["rank"]
# Without dropout all draw the same batches. LoRA and its imitation have the same pairs, and other losses.
APPROXIMATION: tuple[Method, ...] = (
    ATTENTION,
    LORA.varied("LoRA", rank=_RANK, alpha=2.0 * _RANK, dropout=0.0),
    MOIL.varied("LoRA by imitation", approximation="lora"),
    MOIL,
)


@dataclass
class Watch:
    """A job's watch: it keeps full tuning's weights, and tells how far other methods' are from them.

    every: the training calls it after so many steps;  folder: where the weights are kept, one for each seed
    evaluated: the scenes to score;  start: the weights that training begins with, by the names of their layers
    """

    every: int
    folder: Path
    evaluated: Scenes
    start: dict[str, Tensor]

    @torch.no_grad()
    def __call__(self, step: int, method: Method, task: Task, model: nn.Module, adapter: Adapter) -> dict[str, float]:
        """step, error, and the mean score in percent. The model comes back in training mode, torch's numbers go on."""
        model.eval()
        with torch.random.fork_rng():
            scores = task.evaluate(model, self.evaluated).scores
        own = {name: _weight(model.get_submodule(name)) for name in self.start}  # of MoIL the student's
        model.train()
        path = self.folder / f"{step}.safetensors"
        if method.attention:
            save_tensors(path, own, {})
        tuned = {name: weight.to(own[name].device) for name, weight in load_file(path).items()}
        error = _distance(own, tuned) / _distance(tuned, self.start)
        return {"step": step, "error": error, "score": mean(scores.values())}


def start_of(model: nn.Module, preset: str) -> dict[str, Tensor]:
    return {m.name: m.linear.weight.detach() for m in find_targets(model, AdapterConfig(preset=preset))}


def _weight(layer: nn.Module) -> Tensor:
    return layer.updated_weight() if isinstance(layer, AdaptedLinear) else layer.weight


def _distance(these: dict[str, Tensor], those: dict[str, Tensor]) -> float:
    return sum((these[name] - those[name]).double().square().sum().item() for name in these) ** 0.5


def table(results: Sequence[Result]) -> str:
    """Markdown: a row for each method, error and score at each step that was watched, means over the seeds."""
    steps = [each["step"] for each in results[0].watched]
    rows = [["method", *(f"error, step {step}" for step in steps), *(f"score, step {step}" for step in steps)]]
    rows.append(["---"] + ["---:"] * (len(rows[0]) - 1))
    for method in dict.fromkeys(result.method for result in results):
        own = [result.watched for result in results if result.method == method]
        errors, scores = ([mean(at[key] for at in each) for each in zip(*own)] for key in ("error", "score"))
        rows.append([method, *(f"{error:.2f}" for error in errors), *(f"{score:.1f}" for score in scores)])
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)
