"""The model that is shipped, in its full size, and when it is taken."""

import pytest
import torch

from peft_kernels.adapters import FullTuning
from peft_kernels.demo import experiment, training
from peft_kernels.demo.experiment import SHIPPED, Settings, pretrained
from peft_kernels.demo.models import TASKS


@pytest.mark.parametrize("task", [folder.name for folder in SHIPPED.iterdir()])
def test_shipped_model_scores_what_its_training_found(task, tmp_path):
    told = []
    own = Settings(tmp_path / "out", progress=lambda *each: told.append(each))
    model, result = pretrained(own, task)
    assert not (tmp_path / "out").exists()
    assert [each[3:] for each in told] == [(f"mean score {result.mean:.1f}, shipped with the package", True)]
    assert len(result.losses) == own.pretraining_steps and result.mean > 90
    found = TASKS[task].evaluate(model, own.data("validation", "source"))
    assert found.scores == pytest.approx(result.scores[""], abs=1.2)  # two of 180 scenes, on another CPU


@pytest.mark.parametrize("changed", [{"pretrain": True}, {"pretraining_steps": 599}, {"scenes": 500}, {"evaluated": 9}])
def test_other_settings_train_a_model_of_their_own(changed, tmp_path, monkeypatch):
    def trained(job, evaluated, folder, progress):
        torch.nn.init.ones_(job.model.itm_head.bias)
        FullTuning.wrap(job.model, FullTuning.config_class()).save_pretrained(folder)
        return training.Result(job.method.name, job.seed, job.lr, job.lr_from)

    monkeypatch.setattr(experiment, "run", trained)
    model, _ = pretrained(Settings(tmp_path / "out", **changed), "retrieval")
    assert model.itm_head.bias.eq(1).all() and (tmp_path / "out/runs/pretraining-retrieval").is_dir()
