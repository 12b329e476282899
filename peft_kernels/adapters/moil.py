"""MoIL (TPAMI 2025, doi 10.1109/TPAMI.2024.3435790): attention trains freely, and low-rank adapters imitate it.

docs/method.md, section 3 has the formulas, the authors' code (github.com/luogen1996/MoIL) the released initialisation.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peft_kernels.adapters.base import Adapter, Parts
from peft_kernels.adapters.config import AdapterConfig, check_count, check_number
from peft_kernels.adapters.targets import Match, find_targets
from peft_kernels.checks import check_choice, check_flag, check_scale
from peft_kernels.imitation import ImitationGroup, imitation_step
from peft_kernels.layers.imitation_linear import INITS, MODES, ImitationLinear, LinearTransform, SharedState
from peft_kernels.layers.weight_read import ImitationWeight
from peft_kernels.ops.weight_distance import REDUCTIONS

TEACHERS = ("ema", "live")
EMA_PER = ("optimizer_step", "micro_batch")
APPROXIMATIONS = ("hybrid", "lora", "transform")


@dataclass(frozen=True, kw_only=True)
class MoILConfig(AdapterConfig):
    """rank, transform_rank: of each projection's pair, and of each layer's transform
    approximation: "hybrid" | "lora" (pairs alone) | "transform" (transforms alone)
    ffn: the preset's feed-forward layers, too;  init: of the transforms, "default" (the identity) | "released"
    decay: of teacher ← decay · teacher + (1 − decay) · live; the authors' 0.9996 needs thousands of steps
    teacher: "ema" | "live": imitate the live weights themselves
    ema_per: "optimizer_step" | "micro_batch" (the authors'): with accumulation the teacher moves, and is imitated, once
        for every micro-batch, and the losses are averaged; a step then costs as many passes over the weights
    interval: teachers and adapters move at every n-th step
    reduction: "mean" | "sum" | "relative" (with Adam: huge gradients at first);  loss_weight: of the imitation loss
    and what every `AdapterConfig` has; adapters are float32 whatever the model's dtype (float64 for a float64 model)
    """

    rank: int = 96
    transform_rank: int = 96
    approximation: str = "hybrid"
    ffn: bool = False
    init: str = "default"
    decay: float = 0.9996
    teacher: str = "ema"
    ema_per: str = "optimizer_step"
    interval: int = 1
    reduction: str = "mean"
    loss_weight: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        check_count(self.rank)
        check_count(self.transform_rank, "transform_rank")
        check_count(self.interval, "interval")
        check_choice("approximation", self.approximation, APPROXIMATIONS)
        check_flag("ffn", self.ffn)
        check_choice("init", self.init, INITS)
        check_number(self.decay, "decay", 0, 1)
        check_choice("teacher", self.teacher, TEACHERS)
        check_choice("ema_per", self.ema_per, EMA_PER)
        check_choice("reduction", self.reduction, REDUCTIONS)
        check_number(self.loss_weight, "loss_weight", 0)
        if self.adapter_dtype not in (None, "float32"):
            raise ValueError(f"adapter_dtype: MoIL's adapters are float32, got {self.adapter_dtype!r}")


class MoIL(Adapter):
    """Live attention weights, their teacher, and the adapters that are kept. See `Adapter` for what all methods do.

        model.train(); loss.backward(); moil.step(); optimizer.step()       optimizer over moil.param_groups(lr=…)

    Training runs on the live weights, evaluation on the student, which is what `merge` and every file keep; after
    `from_pretrained` live weights and teachers start from it. A training that is resumed takes `state_dict`.
    No autograd reaches the adapters: `step` writes their gradients. Under DDP they are left out of its reduction (by
    the name list that DDP reads when it wraps the model itself) and broadcast from rank 0 with the first step.
    """

    method = "moil"
    config_class = MoILConfig
    training_state = (*(f".{name}" for name in ImitationLinear.TRAINING_STATE), "moil.steps")

    def __init__(self, model: nn.Module, config: MoILConfig, parts: Parts):
        super().__init__(model, config, parts)
        self._state: SharedState = self.modules["moil"]
        self._groups: list[ImitationGroup] = []
        self._grouped: list | None = None
        self._errors: Tensor | None = None
        self._synchronized = False
        owned = [name for name, _ in self.named_parameters("adapter")]
        teachers = [f"{name}.{key}" for name, layer in self.layers.items() for key in dict(layer.named_buffers())]
        ignored = getattr(self.model, "_ddp_params_and_buffers_to_ignore", None)
        self._ignored_before = ignored
        self.model._ddp_params_and_buffers_to_ignore = [*(ignored or ()), *owned, *teachers, "moil.steps"]

    def remove(self) -> nn.Module:
        super().remove()
        self._groups, self._errors = [], None
        if self._ignored_before is None:
            del self.model._ddp_params_and_buffers_to_ignore
        else:
            self.model._ddp_params_and_buffers_to_ignore = self._ignored_before
        return self.model

    @classmethod
    def find(cls, model: nn.Module, config: MoILConfig) -> list[Match]:
        return find_targets(model, config, ffn=config.ffn)

    @classmethod
    def build(
        cls,
        model: nn.Module,
        config: MoILConfig,
        matches: Sequence[Match],
        device: torch.device | str | None = None,
    ) -> Parts:
        if hasattr(model, "moil"):
            raise ValueError("model: has an attribute 'moil' already, the name of what this adapter adds")
        owners: dict[int, str] = {}
        for match in matches:
            for kind, parameter in match.linear.named_parameters():
                other = owners.setdefault(id(parameter), match.name)
                if other != match.name:
                    raise ValueError(f"targets: {match.name} and {other} share their {kind}, and would train apart")
        transforms: dict[object, LinearTransform] = {}
        layers = {}
        for match in matches:
            weight, target = match.linear.weight, match.target
            shares = match.siblings if target.placement == "input" else match.name  # outputs are each layer's own
            if config.approximation != "lora" and shares not in transforms:
                transforms[shares] = LinearTransform(
                    weight.shape[1] if target.placement == "input" else weight.shape[0],
                    config.transform_rank,
                    bias=match.linear.bias is not None,
                    init=config.init,
                    dtype=torch.promote_types(weight.dtype, torch.float32),
                    device=device or weight.device,
                )
            layers[match.name] = (ImitationWeight if target.reads_weight else ImitationLinear)(
                match.linear,
                None if config.approximation == "transform" else config.rank,
                transforms.get(shares),
                placement=target.placement,
                projections=target.projections,
                backend=config.backend,
                freeze=False,
                device=device,
            )
        return Parts(layers, {"moil": SharedState(list(transforms.values()))})

    @classmethod
    def _filled(cls, *args) -> "MoIL":
        moil = super()._filled(*args)
        for layer in moil.layers.values():
            layer.restart_from_student()
        return moil

    def merge(self, keep_on: torch.device | str | None = None) -> None:
        self._warn_of_idle_student("merge")
        super().merge(keep_on)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        self._warn_of_idle_student("save_pretrained")
        super().save_pretrained(folder)

    def export_lora(self, folder: str | os.PathLike) -> None:
        self._warn_of_idle_student("export_lora")
        super().export_lora(folder)

    def _warn_of_idle_student(self, action: str) -> None:
        """Trained without `step`, what is kept is what came: no error, which at a script's end would lose the rest."""
        layers = [each for each in self.layers.values() if not each.base_weight.is_meta]
        if self.steps == 0 and any(not torch.equal(each.live_weight, each.teacher_weight) for each in layers):
            warnings.warn(
                f"{action}: live weights were trained, but step() was never called: the student, which is kept, has "
                "learned nothing of it",
                stacklevel=3,
            )

    # ---- the imitation ----------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """How many times `step` was called."""
        return int(self._state.steps)

    @torch.no_grad()
    def step(self, loss_scale: float | Tensor = 1.0, micro_batches: int = 1) -> Tensor | None:
        """After the task's backward and before the optimizer's step: teachers, loss, and the adapters' gradients.

        loss_scale: what the task's loss was multiplied by before its backward, as a GradScaler does: 0-d or a number
        micro_batches: how many backward passes this optimizer step adds up: with ema_per="micro_batch" as many moves
        returns the imitation loss (with as many moves, its mean), a 0-d tensor that was not waited for; None where
        nothing is done: at the first step,
        when live weights are still where they started, and between two intervals
        Raises ValueError where no live weight has a gradient, as after a backward in evaluation mode, and, as `merge`
        does, where weights are sharded, quantised or offloaded. Warns, once, of layers that the model has lost.
        """
        config, count = self.config, self.steps
        check_count(micro_batches, "micro_batches")
        self._check_on("step")
        groups = self.groups()
        lives = [layer.live_weight for layer in self.layers.values()]
        check_scale(loss_scale, lives[0], "loss_scale")
        if self.merged:
            raise ValueError("step: the model is merged; unmerge it first")
        if all(live.grad is None for live in lives):
            evaluated = not any(layer.training for layer in self.layers.values())
            seen = "the model is in evaluation mode, which runs the student: " if evaluated else ""
            how = "call it after backward, with the model in training"
            raise ValueError(f"step: no live weight has a gradient; {seen}{how}")
        if any(parent._modules.get(attribute) is not self.layers[name] for name, parent, attribute, _ in self._places):
            self._warn_of_lost("step", stacklevel=4)  # behind no_grad
        if not self._synchronized:
            self.synchronize()
        self._state.steps += 1
        if count == 0 or count % config.interval:
            return None
        follows = config.teacher == "ema"
        moves = micro_batches if follows and config.ema_per == "micro_batch" else 1
        losses = []
        for _ in range(moves):
            loss, self._errors = imitation_step(
                groups,
                decay=config.decay if follows else 0.0,
                reduction=config.reduction,
                loss_scale=loss_scale * config.loss_weight / moves,
                backend=config.backend,
                return_errors=True,
            )
            losses.append(loss)
        return sum(losses) * (config.loss_weight / moves)

    @property
    def last_relative_error(self) -> float | None:
        """Σ ‖Ŵ − W̄‖² / Σ ‖Ŵ − W0‖² over all projections at the last step: 1 for a student that has not moved, 0 for one
        that is its teacher, moved or not; the second sum at least 1e-12 Σ ‖W0‖². Waits for the device. None before the
        second step: the first finds live weights where they started, and moves nothing."""
        if self._errors is None:
            return None
        pairs = [(teacher, base) for group in self._groups for teacher, base in zip(group.teacher, group.weight0)]
        moved = torch.stack([teacher.dist(base) for teacher, base in pairs]).square()
        bases = torch.stack([base.norm() for _, base in pairs]).square()
        squared = self._errors * torch.maximum(moved, 1e-12 * bases)  # of each error the denominator
        return squared.sum().item() / max(moved.sum().item(), 1e-12 * bases.sum().item(), 1e-300)

    def relative_errors(self) -> dict[str, float]:
        """The same for each projection, by name; fused ones have a number behind it."""
        values = [] if self._errors is None else self._errors.tolist()
        return dict(zip(self._projection_names(), values))

    def synchronize(self) -> None:
        """Give every process of torch.distributed rank 0's adapters and teachers; the first `step` does it."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            owned = [p.detach() for p in self.parameters("adapter")]
            for layer in self.layers.values():
                owned += [t for t in (layer.teacher_weight, layer.teacher_bias) if t is not None]
            for tensor in owned:
                dist.broadcast(tensor, src=0)
        self._synchronized = True

    def groups(self) -> list[ImitationGroup]:
        """The layers as `imitation_step` takes them; made anew when a tensor has moved or a base has changed."""
        owners = (*self.layers.values(), self._state)
        tensors = [t for owner in owners for t in (*owner.parameters(), *owner.buffers())]
        identity = [(id(t), t.data_ptr()) for t in tensors]
        # A half-precision base is held in float32, which does not see the base change
        identity += [layer._changes() for layer in self.layers.values()]
        if identity != self._grouped:
            self._check_tensors("step", "take DistributedDataParallel")
            self._groups = [_group(layers) for layers in self._siblings()]
            self._grouped = identity
        return self._groups

    def _siblings(self) -> list[list[ImitationLinear]]:
        """Layers that share a transform, or stand alone; without biases apart from those with."""
        groups: dict[object, list[ImitationLinear]] = {}
        for layer in self.layers.values():
            groups.setdefault(id(layer if layer.transform is None else layer.transform), []).append(layer)
        return list(groups.values())

    def _projection_names(self) -> list[str]:
        names = {id(layer): name for name, layer in self.layers.items()}
        return [
            names[id(layer)] + (f".{m}" if layer.projections > 1 else "")
            for layers in self._siblings()
            for layer in layers
            for m in range(layer.projections)
        ]

    # ---- evaluation -------------------------------------------------------------------------------------------------

    @contextmanager
    def evaluate(self, mode: str = "student") -> Iterator[nn.Module]:
        """Inside, forwards run on the "student", the "live" weights or the "teacher", whatever the model's mode."""
        check_choice("mode", mode, MODES)
        before = {name: layer.mode for name, layer in self.layers.items()}
        try:
            for layer in self.layers.values():
                layer.mode = mode
            yield self.model
        finally:
            for name, layer in self.layers.items():
                layer.mode = before.get(name)


def _group(layers: Sequence[ImitationLinear]) -> ImitationGroup:
    wide = layers[0].live_weight.dtype  # what all are in; the bases may be narrower

    def parts(name: str) -> list[Tensor]:
        return [part for each in layers for part in getattr(each, name).detach().to(wide).chunk(each.projections)]

    has_bias = layers[0].base_bias is not None
    paired = layers[0].rank is not None
    transform = layers[0].transform
    return ImitationGroup(
        live=parts("live_weight"),
        teacher=parts("teacher_weight"),
        weight0=[weight.contiguous() for weight in parts("base_weight")],
        live_bias=parts("live_bias") if has_bias else None,
        teacher_bias=parts("teacher_bias") if has_bias else None,
        bias0=parts("base_bias") if has_bias else None,
        down=[down for each in layers for down in each.down] if paired else None,
        up=[up for each in layers for up in each.up] if paired else None,
        transform=None if transform is None else transform.tensors(),
        placement=layers[0].placement,
    )
