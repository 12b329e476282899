"""MoIL on tiny vision-language models of transformers, and its size on the real ViLT."""

from collections import Counter

import pytest
import torch
from adapter_models import MODELS, PRESET, build, hf, loss, output
from moil_cases import adapter_gradients, experts, relative, scatter, train
from moil_cases import output as experts_output

from peft_kernels.adapters import MoIL, MoILConfig
from peft_kernels.layers.imitation_linear import LinearTransform


def wrap(kind: str, dtype=torch.float32, model_options=None, **options):
    model, batch = build(kind, dtype, **(model_options or {}))
    options = {"rank": 4, "transform_rank": 4, "decay": 0.9, **options}
    return MoIL.wrap(model, MoILConfig(preset=PRESET[kind], **options)), batch


def optimizer_for(moil: MoIL, **options) -> torch.optim.Optimizer:
    return torch.optim.AdamW(moil.param_groups(3e-3, adapter_lr=1e-2, adapter_eps=1e-12), **options)


def test_adapters_of_vilt_count_what_method_says():
    """12 layers of three pairs and one transform, of ranks 96 and 96, at a width of 768; no memory is needed."""
    with torch.device("meta"):
        model = hf.ViltForQuestionAnswering(hf.ViltConfig(num_labels=3129))
    moil = MoIL.wrap(model, MoILConfig(preset="vilt"))
    assert moil.num_parameters("adapter") == 7_088_256
    assert moil.num_parameters("live") == 36 * (768 * 768 + 768)
    assert len(moil.layers) == 36 and len(moil.modules["moil"].transforms) == 12
    assert all(p.is_meta for p in moil.parameters()) and not moil.modules["moil"].steps.is_meta


@pytest.mark.parametrize("ffn", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_fresh_merged_and_unmerged(kind, ffn):
    """Fused qkv, cross-attention of two inputs, feed-forward layers."""
    model, batch = build(kind, torch.float64)
    with torch.no_grad():
        fresh = output(model, batch)
        moil = MoIL.wrap(model, MoILConfig(preset=PRESET[kind], rank=4, transform_rank=3, ffn=ffn))
        torch.testing.assert_close(output(model, batch), fresh, rtol=0, atol=0)
        y = output(scatter(moil, 0.05).model, batch)
        assert not torch.allclose(y, fresh, rtol=1e-3)
        weights = {name: t.clone() for name, t in model.state_dict().items()}
        moil.merge()
        torch.testing.assert_close(output(model, batch), y, rtol=1e-12, atol=1e-12)
        moil.unmerge()
        assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
        assert torch.equal(output(model, batch), y)


@pytest.mark.parametrize("kind", ["blip_retrieval", "bridgetower"])
def test_a_step_on_a_whole_model_is_autograd_of_the_definition(kind):
    moil, batch = wrap(kind, torch.float64, ffn=True)
    loss(scatter(moil, 0.05).model.train(), batch).backward()
    moil.modules["moil"].steps += 1
    moil.step()
    gradients = zip(moil.parameters("adapter"), adapter_gradients(moil))
    assert all(relative(adapter.grad, by_hand) < 1e-11 for adapter, by_hand in gradients)


@pytest.mark.parametrize("kind", MODELS)
def test_stock_peft_loads_the_student(kind, tmp_path):
    peft = pytest.importorskip("peft")
    moil, batch = wrap(kind, torch.float64, ffn=kind in ("blip_retrieval", "vilt_vqa"))
    scatter(moil, 0.05)
    moil.export_lora(tmp_path)
    y = output(moil.model.eval(), batch)
    base, _ = build(kind, torch.float64)
    stock = peft.PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False).eval()
    fused = [layer for name, layer in moil.layers.items() if name.endswith("qkv")]
    assert not fused or fused[0].factors()[0].shape[0] == 3 * 4 + 4
    torch.testing.assert_close(output(stock.base_model.model, batch), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", MODELS)
def test_a_transform_is_computed_once_for_what_reads_its_input(kind, monkeypatch):
    """LXMERT's cross-attention reads two inputs in a pass, with one set of weights."""
    moil, batch = wrap(kind, ffn=True)
    calls, forward = [], LinearTransform.forward

    def counted(self, x):
        calls.append((self, x))  # kept, so that every id is one tensor's
        return forward(self, x)

    monkeypatch.setattr(LinearTransform, "forward", counted)
    for repeat in (1, 2):
        with torch.no_grad():
            output(moil.model, batch)
        assert {id(transform) for transform, _ in calls} == {id(t) for t in moil.modules["moil"].transforms}
        assert len({(id(transform), id(x)) for transform, x in calls}) == len(calls)
        crossing = 2 * 2 if kind == "lxmert" else 0
        assert len(calls) == repeat * (len(moil.modules["moil"].transforms) + crossing)
    loss(moil.model.train(), batch).backward()
    assert len(calls) == 2 * (len(moil.modules["moil"].transforms) + crossing)  # training needs none


def test_cross_attention_has_a_transform_for_each_of_its_inputs():
    moil, _ = wrap("blip_retrieval", model_options={"vision": 24})
    name = "text_encoder.encoder.layer.0.{}.self.{}"
    own = {kind: moil.layers[name.format("attention", kind)].transform for kind in ("query", "key", "value")}
    cross = {kind: moil.layers[name.format("crossattention", kind)].transform for kind in ("query", "key", "value")}
    assert own["query"] is own["key"] is own["value"]
    assert cross["key"] is cross["value"] and len({id(own["key"]), id(cross["query"]), id(cross["key"])}) == 3
    assert cross["query"].down.shape == (4, 16) and cross["key"].down.shape == (4, 24)


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"reduction": "mean"}, {"reduction": "sum", "teacher": "live"}, {"approximation": "lora"}]
)
@pytest.mark.parametrize("kind", ["vilt_vqa", "blip_retrieval"])
def test_the_student_nears_its_teacher_while_the_task_is_learned(kind, options):
    moil, batch = wrap(kind, **options)
    model, optimizer, errors, losses = moil.model, optimizer_for(moil), [], []
    before = output(model.eval(), batch)
    for _ in range(4):
        losses += train(moil, optimizer, batch, 10, loss)
        errors.append(moil.last_relative_error)
    assert losses[10] < 0.8 * losses[0] and losses[-1] < 0.3 * losses[0]
    assert errors[-1] < 0.4 and errors == sorted(errors, reverse=True)
    y = {"student": output(model.eval(), batch)}
    for mode in ("live", "teacher"):
        with moil.evaluate(mode):
            y[mode] = output(model, batch)
    far = (before - y["teacher"]).norm()
    assert 0 < (y["student"] - y["teacher"]).norm() < 0.5 * far
    assert (y["live"] - y["student"]).norm() > 0 and (y["live"] - y["teacher"]).norm() > 0


@pytest.mark.parametrize("kind", ["vilt_retrieval", "blip_vqa", "blip_captioning"])
def test_ten_steps_lower_the_loss(kind):
    moil, batch = wrap(kind, reduction="sum")
    losses = train(moil, optimizer_for(moil), batch, 11, loss)
    assert losses[10] < 0.9 * losses[0]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_schedulers_accumulation_and_cleared_gradients(set_to_none):
    """Two halves of a batch give what the whole one gives, in every tensor, whichever way gradients are cleared."""

    def run(parts: int) -> dict:
        moil, batch = wrap("vilt_vqa", torch.float64)
        optimizer = torch.optim.SGD(moil.param_groups(0.1, adapter_lr=10.0))
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 4)
        moil.model.train()
        batch = {name: t[:2] for name, t in batch.items()}
        for _ in range(4):
            optimizer.zero_grad(set_to_none=set_to_none)
            for part in range(parts):
                rows = slice(None) if parts == 1 else slice(part, part + 1)
                torch.manual_seed(0)  # of ViLT's order of patches
                (loss(moil.model, {name: t[rows] for name, t in batch.items()}) / parts).backward()
            moil.step(micro_batches=parts)
            optimizer.step()
            scheduler.step()
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.01, 1.0, 1.0])
        return moil.state_dict()

    whole, halves = run(1), run(2)
    assert all(torch.allclose(whole[name], halves[name], rtol=1e-9, atol=1e-12) for name in whole)
    if not set_to_none:
        return
    moved = [name for name in whole if ".up." in name and whole[name].any()]
    assert len(moved) == 6


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize(("kind", "reentrant"), [("vilt_vqa", False), ("vilt_vqa", True), ("blip_retrieval", False)])
def test_activation_checkpointing_changes_nothing(kind, reentrant):
    states, calls = [], [0, 0]
    for checkpointing in (False, True):
        moil, batch = wrap(kind, model_options={"dropout": 0.1}, reduction="sum")

        def count(*_, run=int(checkpointing)):
            calls[run] += 1

        next(iter(moil.layers.values())).register_forward_hook(count)
        if checkpointing:
            moil.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                moil.model.enable_input_require_grads()
            elif kind == "blip_retrieval" and hasattr(moil.model, "_require_grads_hooks"):
                moil.model.disable_input_require_grads()  # its text embeddings are added to in place
        torch.manual_seed(1)
        train(moil, optimizer_for(moil), batch, 3, loss)
        states.append(moil.state_dict())
    assert calls[1] > calls[0] and all(torch.equal(t, states[1][name]) for name, t in states[0].items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["vilt_vqa", "blip_retrieval"])
def test_half_precision_models_learn_in_float32(kind, dtype):
    moil, batch = wrap(kind, dtype, reduction="sum", modules_to_save=())  # AdamW's eps is 0 in a float16 head
    own = [*moil.parameters("adapter"), *moil.parameters("live")]
    assert {t.dtype for t in own} == {torch.float32}
    assert {t.dtype for x in moil.layers.values() for t in (x.teacher_weight, x.teacher_bias)} == {torch.float32}
    losses = train(moil, optimizer_for(moil), batch, 12, loss)
    assert losses[-1] < 0.8 * losses[0] and moil.last_relative_error < 0.9
    y = output(moil.model.eval(), batch)
    assert y.dtype == dtype
    with moil.evaluate("teacher"):
        assert output(moil.model, batch).dtype == dtype
    moil.merge()
    torch.testing.assert_close(output(moil.model, batch), y, rtol=0.05, atol=0.05)


def test_under_autocast():
    """The task runs in bfloat16; the step, inside or outside, and merging stay in float32."""
    states = []
    for inside in (False, True):
        moil, batch = wrap("vilt_vqa", reduction="sum")
        optimizer = optimizer_for(moil)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                value = loss(moil.model.train(), batch)
            value.backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                moil.step()
            optimizer.step()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            moil.merge()
        merged = {f"{name}.{n}": t.clone() for name, x in moil.layers.items() for n, t in x.named_parameters()}
        states.append({**moil.state_dict(), **merged})
        with torch.autocast("cpu", torch.bfloat16):
            merged = output(moil.model.eval(), batch)
            moil.unmerge()
            torch.testing.assert_close(output(moil.model, batch), merged, rtol=0.05, atol=0.05)
    assert all(torch.equal(t, states[1][name]) for name, t in states[0].items())


def test_scaled_gradients_are_what_a_grad_scaler_unscales():
    results = []
    for scale in (1.0, 1024.0):
        moil, batch = wrap("vilt_vqa")
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=True)
        optimizer = optimizer_for(moil)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(loss(moil.model.train(), batch)).backward()
            value = moil.step(loss_scale=scaler.get_scale())
            scaler.step(optimizer)
            scaler.update()
        results.append({**moil.state_dict(), "loss": value})
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-4, atol=1e-6)


def test_backends_agree():
    """Student and step of the interpreted Triton kernels, where they run."""
    outputs = []
    for backend in ("torch", "triton"):
        moil, batch = wrap("blip_retrieval", backend=backend, model_options={"layers": 1}, reduction="sum")
        scatter(moil, 0.05)
        loss(moil.model.train(), batch).backward()
        moil.modules["moil"].steps += 1
        moil.step()
        outputs.append([output(moil.model.eval(), batch), *(p.grad for p in moil.parameters("adapter"))])
    for ours, other in zip(*outputs):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


# ---- generic names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("style", "preset", "per_layer"), [("vit", "vit", 1), ("bert", "bert", 3)])
def test_presets_of_generic_names_fit_modality_experts(style, preset, per_layer):
    """Shared attention by the preset, each modality's expert by "vit" or by the suffixes of its layers."""
    model, batch = experts(style=style)
    moil = MoIL.wrap(model, MoILConfig(preset=preset, rank=4, transform_rank=3))
    assert len(moil.layers) == 2 * per_layer and len(model.moil.transforms) == 2
    assert {x.projections for x in moil.layers.values()} == {3 if style == "vit" else 1}
    moil.remove()
    if style == "vit":
        moil = MoIL.wrap(model, MoILConfig(preset=preset, rank=4, transform_rank=3, ffn=True))
        assert len(moil.layers) == 2 * (1 + 2 + 2) == len(model.moil.transforms)
        moil.remove()
    else:
        with pytest.raises(ValueError, match=r"^ffn: 'bert' matches no feed-forward layer; nearest: .*mlp_text\.fc1"):
            MoIL.wrap(model, MoILConfig(preset=preset, ffn=True))
    names = tuple(t for t in ("qkv", "query", "key", "value") if (t == "qkv") == (style == "vit"))
    moil = MoIL.wrap(model, MoILConfig(targets=(*names, "fc1", "fc2"), rank=4, transform_rank=3, decay=0.9))
    placements = Counter(name.split(".")[-2:][0] + x.placement for name, x in moil.layers.items())
    assert placements["mlp_textoutput"] == placements["mlp_imagoutput"] == 2
    optimizer = torch.optim.AdamW(moil.param_groups(1e-2, adapter_eps=1e-12))
    losses = train(moil, optimizer, batch, 11)
    assert losses[10] < 0.7 * losses[0]
    y = experts_output(model.eval(), batch)
    moil.merge()
    torch.testing.assert_close(experts_output(model, batch), y, rtol=1e-4, atol=1e-4)
