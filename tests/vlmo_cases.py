"""A small model of the VLMo kind, built as its authors': multiway blocks whose attention reads its qkv's weight."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, TEXT, PATCHES = 16, 2, 5, 4


class Attention(nn.Module):
    """The qkv has no bias of its own: q_bias and v_bias are added, and the key gets none."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.q_bias, self.v_bias = (nn.Parameter(0.1 * torch.randn(WIDTH)) for _ in range(2))

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None])
        return self.proj(y.transpose(1, 2).flatten(2))


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention over both modalities; an expert for each, or in the last blocks one for both."""

    def __init__(self, fused: bool):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(WIDTH), Attention()
        self.norm2_text, self.norm2_imag, self.mlp_text, self.mlp_imag = *norms(2), Expert(), Expert()
        self.norm2_vl, self.mlp_vl = (nn.LayerNorm(WIDTH), Expert()) if fused else (None, None)
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((WIDTH,), 0.8)) for _ in range(2))

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        x = x + self.gamma_1 * self.attn(self.norm1(x), real)
        if self.mlp_vl is not None:
            return x + self.gamma_2 * self.mlp_vl(self.norm2_vl(x))
        text, image = x[:, :TEXT].contiguous(), x[:, TEXT:].contiguous()
        moved = self.mlp_text(self.norm2_text(text)), self.mlp_imag(self.norm2_imag(image))
        return x + self.gamma_2 * torch.cat(moved, dim=1)


def norms(count: int) -> list[nn.LayerNorm]:
    return [nn.LayerNorm(WIDTH) for _ in range(count)]


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embed, self.text_embed = nn.Linear(12, WIDTH), nn.Embedding(20, WIDTH)
        self.blocks, self.norm = nn.ModuleList(Block(fused) for fused in (False, False, True)), nn.LayerNorm(WIDTH)


class Vlmo(nn.Module):
    """ids (B, 5), mask (B, 5), patches (B, 4, 12) -> (B, 3) answers' logits"""

    def __init__(self):
        super().__init__()
        self.transformer, self.pooler, self.vqa_classifier = Transformer(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor, mask: Tensor, patches: Tensor) -> Tensor:
        of = self.transformer
        x = torch.cat([of.text_embed(ids), of.patch_embed(patches)], dim=1)
        real = torch.cat([mask, mask.new_ones(len(mask), PATCHES)], dim=1)
        for block in of.blocks:
            x = block(x, real)
        return self.vqa_classifier(torch.tanh(self.pooler(of.norm(x)[:, 0])))


def vlmo(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Vlmo, dict[str, Tensor]]:
    """(model, batch)"""
    torch.manual_seed(seed)
    model = Vlmo().to(dtype)
    mask = torch.arange(TEXT) < torch.tensor([[5], [3], [4], [5], [2], [5]])
    patches = torch.randn(6, PATCHES, 12, dtype=dtype)
    return model, {"ids": torch.randint(20, (6, TEXT)), "mask": mask, "patches": patches}


def task_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(**batch), torch.arange(len(batch["ids"])) % 3)
