"""MoIL in the Trainer of transformers. LoRA and Aurora need nothing there: their gradients come from the backward."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_kernels.adapters import MoIL
from peft_kernels.integrations.callbacks import check_moil, check_trained


class MoILCallback(TrainerCallback):
    """Takes `moil.step()` once in each update: `Trainer(model, …, callbacks=[MoILCallback(moil)])`.

    That is after the Trainer has added up, unscaled and clipped the task's gradients, and before its optimizer's step:
    the imitation's gradients are no part of the norm and never clipped. An update that a GradScaler skips moves the
    teachers all the same. What the Trainer logs of the training has `moil_relative_error` besides (see
    `MoIL.last_relative_error`); callbacks that come later in its list see it. The Trainer's own checkpoints hold live
    weights, teachers and the count of steps, so that `resume_from_checkpoint` goes on where it was.

    Raises TypeError for what is no MoIL. Training raises ValueError if the Trainer's model or optimizer is not of this
    MoIL, if an update comes without a step, or with one that was taken elsewhere.
    """

    def __init__(self, moil: MoIL):
        self.moil = check_moil(moil)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Any,
        **kwargs: Any,
    ) -> None:
        if all(module is not self.moil.model for module in model.modules()):
            raise ValueError(f"MoILCallback: the Trainer's {type(model).__name__} is not the model that the MoIL is of")
        check_trained(self.moil, [optimizer])

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._before, self._micro_batches = self.moil.steps, 1

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._micro_batches += 1

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any, **kwargs: Any
    ) -> None:
        if self.moil.steps != self._before:
            raise ValueError("MoILCallback: moil.step() was called in this update already; the callback does it alone")
        _unscale(optimizer)
        self.moil.step(micro_batches=self._micro_batches)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self.moil.steps == self._before:
            raise ValueError("MoILCallback: the Trainer took an update without its event on_pre_optimizer_step")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **kwargs: Any
    ) -> None:
        error = self.moil.last_relative_error if "loss" in logs else None
        if error is not None:
            for record in (logs, state.log_history[-1]):  # the Trainer has stored a copy already
                record["moil_relative_error"] = error


def _unscale(optimizer: Any) -> None:
    """Bring the task's gradients out of a GradScaler's scale, so that the imitation's, which are in none, fit them.

    transformers 5 always has, by taking their norm; 4.57 only if it clips.
    """
    scaler = getattr(optimizer, "scaler", None)  # of accelerate's wrapper
    if scaler is None:
        return
    try:
        scaler.unscale_(optimizer.optimizer)
    except RuntimeError as error:
        if "already been called" not in str(error):
            raise
