"""HF's Trainer: MoIL by its callback, LoRA and Aurora as they are, end where the loop by hand ends, bit for bit."""

import pytest
import torch
from adapter_cases import wrap
from adapter_models import build
from torch import nn
from trainer_cases import BATCH, assert_same, copied, examples, loop, start
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_kernels import MoIL
from peft_kernels.integrations.transformers import MoILCallback


class InOrder(Trainer):
    """Takes its examples as they come."""

    def _get_train_sampler(self, *args):
        return None


def trainer_for(adapter, optimizer, folder, kind=InOrder, model=None, callbacks=None, **options):
    arguments = TrainingArguments(
        **{
            **{"output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True},
            **{"per_device_train_batch_size": BATCH, "num_train_epochs": 2, "lr_scheduler_type": "constant"},
            **{"max_grad_norm": 0.0, "save_strategy": "no", "logging_strategy": "no", **options},
        }
    )
    if callbacks is None:
        callbacks = [MoILCallback(adapter)] if isinstance(adapter, MoIL) else []
    adapter.model.accepts_loss_kwargs = False  # so that the Trainer averages: see docs/trainer.md
    return kind(
        model=adapter.model if model is None else model,
        args=arguments,
        train_dataset=examples(),
        eval_dataset=examples()[:2],
        callbacks=callbacks,
        optimizers=(optimizer, None),
    )


def trained(method, folder, moil_options=None, **options):
    adapter, optimizer = start(method, **(moil_options or {}))
    trainer_for(adapter, optimizer, folder, **options).train()
    return copied(adapter)


# ---- the same weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["moil", "lora", "aurora"])
def test_accumulation_and_clipping(method, tmp_path):
    """Five batches in an epoch: updates of 2, 2 and 1. The teacher moves once for each, as the authors' does."""
    own = {"ema_per": "micro_batch"} if method == "moil" else {}
    state = trained(method, tmp_path, own, gradient_accumulation_steps=2, max_grad_norm=0.5)
    assert_same(state, loop(*start(method, **own), accumulate=2, clip=0.5))


@pytest.mark.parametrize("method", ["moil", "lora"])
def test_bfloat16(method, tmp_path):
    state = trained(method, tmp_path, bf16=True, max_grad_norm=1.0)
    assert_same(state, loop(*start(method), autocast=torch.bfloat16, clip=1.0))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("method", ["moil", "lora", "aurora"])
def test_gradient_checkpointing(method, tmp_path):
    adapter, optimizer = start(method)
    calls = []
    next(iter(adapter.layers.values())).register_forward_hook(lambda *_: calls.append(1))
    trainer_for(adapter, optimizer, tmp_path, gradient_checkpointing=True).train()
    assert len(calls) == 2 * 10  # each of ten batches once more in the backward
    assert_same(copied(adapter), loop(*start(method)))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("method", ["moil", "lora", "aurora"])
def test_gradient_checkpointing_of_a_blip(method, tmp_path):
    """The Trainer's own argument makes its frozen text embeddings require gradients, which are added to in place."""
    states = []
    for checkpointing in (False, True):
        model, batch = build("blip_vqa")
        adapter = wrap(method, model, "blip_vqa")
        optimizer = torch.optim.AdamW(adapter.param_groups(1e-3, adapter_eps=1e-6))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.disable_input_require_grads()
        calls = []
        next(iter(adapter.layers.values())).register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer = trainer_for(adapter, optimizer, tmp_path)
        trainer.train_dataset = [{name: rows[i] for name, rows in batch.items()} for i in range(2)]
        trainer.train()
        assert len(calls) == (4 if checkpointing else 2)
        states.append(copied(adapter))
    if method == "aurora":  # what layers share is computed again in each region, and its gradient sums in another order
        for name, tensor in states[0].items():
            torch.testing.assert_close(states[1][name], tensor, rtol=1e-4, atol=1e-6)
    else:
        assert_same(*states)


class HalfOnACPU(InOrder):
    """fp16 with a GradScaler, as accelerate does it on a GPU; on a CPU it refuses."""

    unscales = True

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.state._mixed_precision, self.accelerator.native_amp = "fp16", True
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=4)

    def _get_grad_norm(self, model, grad_norm=None):
        return super()._get_grad_norm(model, grad_norm) if self.unscales or grad_norm is not None else None


class HalfOnACPUBefore5(HalfOnACPU):
    """Gradients that are not clipped stay scaled until the optimizer's step, as in transformers 4.57."""

    unscales = False


@pytest.mark.parametrize(
    ("method", "kind", "clip"),
    [
        *(("moil", kind, clip) for kind in (HalfOnACPU, HalfOnACPUBefore5) for clip in (0.0, 0.5)),
        ("lora", HalfOnACPU, 0.5),
    ],
)
def test_float16_with_a_scaler(method, kind, clip, tmp_path):
    """The scale doubles on the way: a power of two, it leaves no trace in float32."""
    adapter, optimizer = start(method)
    trainer = trainer_for(adapter, optimizer, tmp_path, kind, max_grad_norm=clip)
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() == 2.0**14
    assert_same(copied(adapter), loop(*start(method), autocast=torch.float16, clip=clip, scale=2.0**12))


def test_a_model_inside_the_user_s_own(tmp_path):
    class WithLoss(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = model

        def forward(self, **batch):
            return {"loss": self.inner(**batch).loss}

    moil, optimizer = start("moil")
    trainer_for(moil, optimizer, tmp_path, model=WithLoss(moil.model), remove_unused_columns=False).train()
    assert_same(copied(moil), loop(*start("moil")))


# ---- resumed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["moil", "lora", "aurora"])
def test_resumed_is_uninterrupted(method, tmp_path):
    """From the middle of the second epoch, with dropout, AdamW's moments and a falling learning rate."""
    options = {"save_strategy": "steps", "save_steps": 7, "lr_scheduler_type": "linear", "seed": 11}
    whole, optimizer = start(method, repeat=False)
    trainer_for(whole, optimizer, tmp_path, **options).train()
    adapter, optimizer = start(method, seed=9, repeat=False)  # other weights everywhere
    trainer_for(adapter, optimizer, tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert_same(copied(adapter), copied(whole))
    assert_same(dict(adapter.model.state_dict()), dict(whole.model.state_dict()))
    if method == "moil":
        assert adapter.steps == 10


# ---- the callback ---------------------------------------------------------------------------------------------------


def test_what_is_logged(tmp_path):
    seen = []

    class Later(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            seen.append(dict(logs))

    moil, optimizer = start("moil")
    callbacks = [MoILCallback(moil), Later()]
    options = {"logging_strategy": "steps", "logging_steps": 1, "eval_strategy": "epoch"}
    trainer = trainer_for(moil, optimizer, tmp_path, callbacks=callbacks, **options)
    trainer.train()
    for records in (trainer.state.log_history, seen):
        errors = [record.get("moil_relative_error") for record in records if "loss" in record]
        assert len(errors) == 10 and errors[0] is None and errors[-1] == moil.last_relative_error
        assert all(error > 0 for error in errors[1:])
        assert not any("moil_relative_error" in record for record in records if "loss" not in record)
    assert sum("eval_loss" in record for record in seen) == 2


def refused(match, folder, moil, optimizer, **options):
    with pytest.raises(ValueError, match=match):
        trainer_for(moil, optimizer, folder, **options).train()


def test_what_is_refused(tmp_path):
    moil, optimizer = start("moil")
    other, other_optimizer = start("moil")
    lora, lora_optimizer = start("lora")
    with pytest.raises(TypeError, match=r"^moil: expected a MoIL, as MoIL.wrap returns it, got LoRA"):
        MoILCallback(lora)
    with pytest.raises(TypeError, match=r"^moil: expected a MoIL, .* got ViltForQuestionAnswering"):
        MoILCallback(moil.model)
    callbacks = [MoILCallback(moil)]
    match = r"^MoILCallback: the Trainer's ViltForQuestionAnswering is not the model that the MoIL is of"
    for adapter, its in ((other, other_optimizer), (lora, lora_optimizer)):
        refused(match, tmp_path, adapter, its, callbacks=callbacks)
    early = torch.optim.AdamW(moil.parameters("head"))
    refused(r"does not train vilt\S+live_weight and \d+ others of the MoIL", tmp_path, moil, early)
    callbacks = [MoILCallback(moil), MoILCallback(moil)]
    refused(r"moil.step\(\) was called in this update already", tmp_path, moil, optimizer, callbacks=callbacks)
    assert moil.steps == 1


def test_an_update_without_its_event(tmp_path):
    class Own(InOrder):
        def _run_epoch(self, **kwargs):
            self.callback_handler.on_pre_optimizer_step = lambda args, state, control: control
            super()._run_epoch(**kwargs)

    moil, optimizer = start("moil")
    refused("an update without its event on_pre_optimizer_step", tmp_path, moil, optimizer, kind=Own)
    assert moil.steps == 0
