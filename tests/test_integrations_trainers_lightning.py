"""Lightning's Trainer: MoIL by its callback, LoRA as it is, end where the loop by hand ends, bit for bit."""

import pytest
import torch
from trainer_cases import BATCH, assert_same, copied, examples, loop, start

from peft_kernels import MoIL

pl = pytest.importorskip("lightning.pytorch")
MoILCallback = pytest.importorskip("peft_kernels.integrations.lightning").MoILCallback
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]


class Module(pl.LightningModule):
    def __init__(self, adapter, optimizer):
        super().__init__()
        self.model, self.optimizer = adapter.model, (optimizer,)

    def training_step(self, batch, index):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return self.optimizer[0]

    def train_dataloader(self):
        return torch.utils.data.DataLoader(examples(), BATCH)


def trainer_for(adapter, folder, callbacks=None, **options):
    if callbacks is None:
        callbacks = [MoILCallback(adapter)] if isinstance(adapter, MoIL) else []
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    quiet |= {"enable_checkpointing": False, "default_root_dir": str(folder), "accelerator": "cpu", "devices": 1}
    return pl.Trainer(**{**quiet, "max_epochs": 2, "callbacks": callbacks, **options})


@pytest.mark.parametrize(
    ("method", "options", "by_hand"),
    [
        ("moil", {"gradient_clip_val": 0.5}, {"clip": 0.5}),
        ("moil", {"precision": "bf16-mixed"}, {"autocast": torch.bfloat16}),
        ("lora", {"gradient_clip_val": 0.5}, {"clip": 0.5}),
    ],
)
def test_the_same_weights(method, options, by_hand, tmp_path):
    states = []
    for _ in range(2):
        adapter, _ = start(method)
        # In the model's order: Lightning adds up the norm in the optimizer's
        optimizer = torch.optim.AdamW([p for p in adapter.model.parameters() if p.requires_grad], 1e-2)
        if states:
            states.append(loop(adapter, optimizer, **by_hand))
            continue
        module = Module(adapter, optimizer)
        trainer_for(adapter, tmp_path, **options).fit(module)
        assert "configure_gradient_clipping" not in vars(module)
        states.append(copied(adapter))
    assert_same(*states)


@pytest.mark.parametrize("fused", [False, True])
def test_float16_with_a_scaler(fused, tmp_path):
    """A fused optimizer unscales in its own step, and Lightning leaves it to it."""
    states = []
    for trained_by in ("lightning", "hand"):
        moil, _ = start("moil")
        optimizer = torch.optim.AdamW(moil.param_groups(1e-2, adapter_eps=1e-12), fused=fused)
        if trained_by == "hand":
            states.append(loop(moil, optimizer, autocast=torch.float16, scale=2.0**12))
            continue
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=4)
        plugin = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)
        trainer_for(moil, tmp_path, plugins=[plugin]).fit(Module(moil, optimizer))
        assert scaler.get_scale() == 2.0**14
        states.append(copied(moil))
    assert_same(*states)


def test_accumulation(tmp_path):
    """The teacher moves once for each micro-batch; Lightning divides the lone last one by two as well."""
    moil, optimizer = start("moil", ema_per="micro_batch")
    trainer_for(moil, tmp_path, accumulate_grad_batches=2, limit_train_batches=4).fit(Module(moil, optimizer))
    assert_same(copied(moil), loop(*start("moil", ema_per="micro_batch"), accumulate=2, count=4))


def test_resumed_is_uninterrupted(tmp_path):
    moil, optimizer = start("moil")
    trainer = trainer_for(moil, tmp_path, max_epochs=1)
    trainer.fit(Module(moil, optimizer))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    moil, optimizer = start("moil", seed=9)  # other weights everywhere
    trainer_for(moil, tmp_path).fit(Module(moil, optimizer), ckpt_path=tmp_path / "half.ckpt")
    whole, optimizer = start("moil")
    trainer_for(whole, tmp_path).fit(Module(whole, optimizer))
    assert moil.steps == 10
    assert_same(dict(moil.model.state_dict()), dict(whole.model.state_dict()))


def test_what_is_logged(tmp_path):
    moil, optimizer = start("moil")
    logger = pl.loggers.CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    trainer = trainer_for(moil, tmp_path, logger=logger, log_every_n_steps=2)
    trainer.fit(Module(moil, optimizer))
    logger.save()
    rows = [line.split(",") for line in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().split()]
    errors = [float(row[rows[0].index("moil_relative_error")]) for row in rows[1:]]
    assert len(errors) == 5 and errors[-1] == pytest.approx(moil.last_relative_error, rel=1e-6)


def test_what_is_refused(tmp_path):
    moil, optimizer = start("moil")
    other, lora = start("moil")[0], start("lora")[0]
    with pytest.raises(TypeError, match=r"^moil: expected a MoIL, as MoIL.wrap returns it, got LoRA"):
        MoILCallback(lora)

    def refused(match, callbacks, module):
        with pytest.raises(ValueError, match=match):
            trainer_for(moil, tmp_path, callbacks=callbacks).fit(module)
        assert "configure_gradient_clipping" not in vars(module)

    refused(r"Module does not hold the model that the MoIL is of", [MoILCallback(other)], Module(moil, optimizer))
    early = torch.optim.AdamW(moil.parameters("head"))
    refused(r"does not train vilt\S+live_weight and \d+ others", [MoILCallback(moil)], Module(moil, early))
    twice = [MoILCallback(moil), MoILCallback(moil)]
    refused(r"moil.step\(\) was called elsewhere", twice, Module(moil, optimizer))
    by_hand = Module(moil, optimizer)
    by_hand.automatic_optimization = False
    refused("the module optimizes by hand", [MoILCallback(moil)], by_hand)
