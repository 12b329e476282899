"""Tiny region features in their published formats, and tiny checkpoints of two-stage models, as the hub has them.

The first region of an image says its colour; the pictures themselves are not there.
"""

import base64
from collections.abc import Iterable
from pathlib import Path

import example_data
import numpy as np
import torch
import transformers as hf
from torch import nn

WIDTH = 8  # numbers in a region's feature
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": len(example_data.WORDS)}


def regions(name: str, width: int = WIDTH) -> dict[str, np.ndarray]:
    """Of the image with this name: 2 to 4 regions, the first of which tells the number that ends the name."""
    number = int("".join(filter(str.isdigit, name)) or 0)
    random = np.random.default_rng(number)
    features = random.normal(size=(2 + number % 3, width)).astype(np.float32)
    features[0] = 3 * np.eye(width)[number % 4]
    left_top = random.uniform(0, 20, size=(len(features), 2))
    return {
        "features": features,
        "boxes": np.concatenate([left_top, left_top + random.uniform(1, 10, (len(features), 2))], 1).astype(np.float32),
        "image_w": np.int64(40),
        "image_h": np.int64(30),
    }


def row(name: str, columns: int = 6, **more) -> str:
    each = {**regions(name), **more}
    boxes, features = (base64.b64encode(each[part].tobytes()).decode() for part in ("boxes", "features"))
    width, height, count = (str(each.get(part, len(each["boxes"]))) for part in ("image_w", "image_h", "count"))
    between = [height, width, "eA==", "eA==", "eA==", "eA=="] if columns == 10 else [width, height]
    return "\t".join([name, *between, count, boxes, features]) + "\n"


def write_tsv(path: Path, names: Iterable[str], columns: int = 6) -> Path:
    path.write_text("".join(row(name, columns) for name in names))
    return path


def write_npz(folder: Path, names: Iterable[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        np.savez(folder / f"{name}.npz", **regions(name))
    return folder


def images(folder: Path) -> list[str]:
    """Names of a data set's pictures, which are then deleted."""
    files = sorted([*folder.rglob("*.jpg"), *folder.rglob("*.png")])
    for file in files:
        file.unlink()
    return [file.stem for file in files]


def checkpoint(folder: Path, model: nn.Module) -> Path:
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):  # the usual 0.02 gives the same score to everything
                module.weight.mul_(10)
    model.save_pretrained(folder)
    tokenizer = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    tokenizer |= {f"{name[1:-1].lower()}_token": name for name in example_data.SPECIAL}
    (folder / "vocab.txt").write_text("\n".join(example_data.WORDS) + "\n")
    example_data.write_json(folder / "tokenizer_config.json", tokenizer)
    return folder


def write_all(root: Path) -> dict[str, Path]:
    """Every data set, with its features, and every checkpoint, by name; those of BERT have never seen a region."""
    made = {each.__name__: each(root / each.__name__) for each in (example_data.vqa2, example_data.nlvr2)}
    example_data.vqa2_test(made["vqa2"])
    for name, folder in list(made.items()):
        names = images(folder)
        made[f"{name}.npz"] = write_npz(root / f"{name}-npz", names)
        made[f"{name}.tsv"] = write_tsv(root / f"{name}.tsv", names, 6 if name == "vqa2" else 10)
    torch.manual_seed(0)
    lxmert = hf.LxmertConfig(**SIZES, l_layers=1, r_layers=1, x_layers=1, visual_feat_dim=WIDTH, num_qa_labels=7)
    made["lxmert"] = checkpoint(root / "lxmert", hf.LxmertForQuestionAnswering(lxmert))
    visual = hf.VisualBertConfig(**SIZES, num_hidden_layers=2, visual_embedding_dim=WIDTH)
    made["visualbert"] = checkpoint(root / "visualbert", hf.VisualBertForPreTraining(visual))
    made["bert"] = checkpoint(root / "bert", hf.BertModel(hf.BertConfig(**SIZES, num_hidden_layers=2)))
    return made
