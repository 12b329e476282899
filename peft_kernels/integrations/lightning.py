"""MoIL in the Trainer of Lightning. LoRA and Aurora need nothing there: their gradients come from the backward."""

from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer

from peft_kernels.adapters import MoIL
from peft_kernels.integrations.callbacks import check_moil, check_trained


class MoILCallback(pl.Callback):
    """Takes `moil.step()` once in each update: `Trainer(…, callbacks=[MoILCallback(moil)])`.

    That is after Lightning has added up, unscaled and clipped the task's gradients, and before its optimizer's step.
    Lightning clips after its event `on_before_optimizer_step`, so the callback steps behind the module's
    `configure_gradient_clipping`, one of the user's own too: the imitation's gradients are no part of the norm and
    never clipped. An update that a GradScaler skips moves the teachers all the same. `moil_relative_error` is logged as
    often as Lightning logs (see `MoIL.last_relative_error`). Lightning's checkpoints hold live weights, teachers and
    the count of steps. DDP reads what it leaves out from the module, to which the callback hands the model's list.

    Raises TypeError for what is no MoIL. Fitting raises ValueError if the module or its optimizer is not of this MoIL,
    if it optimizes by hand, or if an update comes without a step or with one that was taken elsewhere.
    """

    def __init__(self, moil: MoIL):
        self.moil = check_moil(moil)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        names = {id(module): name for name, module in pl_module.named_modules()}
        if id(self.moil.model) not in names:
            raise ValueError(f"MoILCallback: {type(pl_module).__name__} does not hold the model that the MoIL is of")
        if stage == "fit" and not pl_module.automatic_optimization:
            raise ValueError("MoILCallback: the module optimizes by hand; call moil.step() before its optimizer's step")
        prefix = names[id(self.moil.model)]
        ignored = self.moil.model._ddp_params_and_buffers_to_ignore
        pl_module._ddp_params_and_buffers_to_ignore = [f"{prefix}.{name}" for name in ignored]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_trained(self.moil, trainer.optimizers)
        self._taken, self._before = self.moil.steps, self.moil.steps - trainer.global_step
        self._micro_batches, clip = 0, pl_module.configure_gradient_clipping

        def clip_and_step(optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
            clip(optimizer, *args, **kwargs)
            self._step(trainer, optimizer)

        pl_module.configure_gradient_clipping = clip_and_step

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        vars(pl_module).pop("configure_gradient_clipping", None)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._micro_batches += 1

    def _step(self, trainer: pl.Trainer, optimizer: Optimizer) -> None:
        if self.moil.steps != self._taken:
            raise ValueError("MoILCallback: moil.step() was called elsewhere; the callback does it alone")
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)  # Lightning leaves it to a fused optimizer's step
        self.moil.step(micro_batches=self._micro_batches)
        self._taken, self._micro_batches = self.moil.steps, 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.moil.steps - trainer.global_step != self._before:
            raise ValueError("MoILCallback: an update did not come by configure_gradient_clipping, and had no step")
        often = trainer.log_every_n_steps
        if often and self._micro_batches == 0 and trainer.global_step % often == 0:
            error = self.moil.last_relative_error
            if error is not None:
                pl_module.log("moil_relative_error", error)
