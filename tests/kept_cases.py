"""What a graph keeps for its backward, in bytes; and the MLPs of transformers' models, adapted."""

import pytest
import torch
from torch import Tensor, nn

from peft_kernels import LoRA, LoRAConfig

WIDTH, WIDE, RANK, ROWS = 16, 64, 4, 10


def kept(result: Tensor, *besides: nn.Module) -> list[int]:
    """The sizes in bytes, ascending, of all memory that autograd's nodes behind `result` keep, none twice.

    Numbers (0-d) do not count, nor do parameters and buffers of modules `besides`.
    """
    known = {t.untyped_storage().data_ptr() for each in besides for t in (*each.parameters(), *each.buffers())}
    found, nodes, seen = {}, [result.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [before for before, _ in node.next_functions]
        for t in _saved(node):
            storage = t.untyped_storage()
            if storage.data_ptr() not in known and t.ndim:
                found[storage.data_ptr()] = storage.nbytes()
    return sorted(found.values())


def _saved(node: torch.autograd.graph.Node) -> list[Tensor]:
    values = [node.saved_tensors] if hasattr(node, "saved_tensors") else []
    values += [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
    flat = [t for value in values for t in (value if isinstance(value, tuple | list) else [value])]
    return [t for t in flat if isinstance(t, Tensor)]


class _Split(nn.Module):
    """BERT's way: two modules; what comes after its second linear is no part of the MLP."""

    def __init__(self, intermediate: nn.Module, output: nn.Module):
        super().__init__()
        self.intermediate, self.output = intermediate, output

    def forward(self, x: Tensor) -> Tensor:
        return self.output.dense(self.intermediate(x))


def mlp(kind: str) -> tuple[nn.Module, list[int]]:
    """An MLP of a model of transformers, and how wide what it keeps besides x and each z is: h, or g and u."""
    hf = pytest.importorskip("transformers")
    models, sizes = hf.models, {"hidden_size": WIDTH, "intermediate_size": WIDE, "num_attention_heads": 2}
    torch.manual_seed(0)
    if kind == "blip":
        return models.blip.modeling_blip.BlipMLP(hf.BlipVisionConfig(**sizes)), [WIDE]
    if kind == "vit":
        return models.vit.modeling_vit.ViTMLP(hf.ViTConfig(**sizes)), [WIDE]
    if kind == "siglip":  # GELU by tanh
        return models.siglip.modeling_siglip.SiglipMLP(hf.SiglipVisionConfig(**sizes)), [WIDE]
    if kind == "clip":
        return models.clip.modeling_clip.CLIPMLP(hf.CLIPVisionConfig(**sizes)), [WIDE]
    if kind == "bert":
        module, config = models.bert.modeling_bert, hf.BertConfig(**sizes)
        return _Split(module.BertIntermediate(config), module.BertOutput(config)), [WIDE]
    if kind == "vilt":
        module, config = models.vilt.modeling_vilt, hf.ViltConfig(**sizes)
        return _Split(module.ViltIntermediate(config), module.ViltOutput(config)), [WIDE]
    if kind == "gemma":  # gated by GELU's tanh
        return models.gemma.modeling_gemma.GemmaMLP(hf.GemmaConfig(**sizes)), [WIDE, WIDE]
    if kind == "qwen2":
        return models.qwen2.modeling_qwen2.Qwen2MLP(hf.Qwen2Config(**sizes)), [WIDE, WIDE]
    return models.llama.modeling_llama.LlamaMLP(hf.LlamaConfig(**sizes)), [WIDE, WIDE]


KINDS = ("blip", "vit", "siglip", "clip", "bert", "vilt", "llama", "qwen2", "gemma")
GATED = ("llama", "qwen2", "gemma")
TARGETS = ("fc1", "fc2", "dense", "gate_proj", "up_proj", "down_proj")


def adapted(model: nn.Module, how: str, dropout: float = 0.0, recompute: bool = True) -> nn.Module:
    torch.manual_seed(0)
    targets = sorted({name.rpartition(".")[2] for name, _ in model.named_modules()} & {*TARGETS})
    if how == "peft":
        peft = pytest.importorskip("peft", minversion="0.21")
        from peft_kernels.integrations.peft import accelerate

        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_dropout=dropout, target_modules=targets))
        accelerate(wrapped, recompute=recompute)
        model = wrapped.base_model.model
    else:
        LoRA.wrap(model, LoRAConfig(rank=RANK, dropout=dropout, targets=targets, recompute=recompute))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 4)
    return model.train()


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    trained = [x, *(p for p in model.parameters() if p.requires_grad)]
    generator = torch.Generator().manual_seed(2)
    return torch.autograd.grad(y, trained, torch.randn(y.shape, generator=generator).to(y.dtype))


def batch(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, ROWS // 2, WIDTH, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
