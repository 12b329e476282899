"""Bad arguments of the retrieval objectives: an error that begins with the argument's name."""

import math

import pytest
import torch

from peft_kernels.objectives import (
    contrastive_loss,
    enhance_context,
    matching_loss,
    matching_negatives,
    video_embedding,
)

PAIR = (torch.eye(3, 4), torch.eye(3, 4))
IDS = torch.arange(3)
BAD = [
    (contrastive_loss, (PAIR[0][0], PAIR[1], 1.0), {}, "image"),
    (contrastive_loss, (PAIR[0][:0], PAIR[1][:0], 1.0), {}, "image"),
    (contrastive_loss, (PAIR[0], PAIR[1][:2], 1.0), {}, "text"),
    (contrastive_loss, (PAIR[0], PAIR[1][:, :3], 1.0), {}, "text"),
    (contrastive_loss, (PAIR[0], PAIR[1].long(), 1.0), {}, "text"),
    (contrastive_loss, (PAIR[0], PAIR[1].to("meta"), 1.0), {}, "text"),
    (contrastive_loss, (*PAIR, 0.0), {}, "temperature"),
    (contrastive_loss, (*PAIR, math.inf), {}, "temperature"),
    (contrastive_loss, (*PAIR, torch.ones(1)), {}, "temperature"),
    (contrastive_loss, (*PAIR, 1.0), {"momentum_image": PAIR[0]}, "momentum_image, momentum_text"),
    (contrastive_loss, (*PAIR, 1.0), {"momentum_image": PAIR[0][:2], "momentum_text": PAIR[0]}, "momentum_image"),
    (contrastive_loss, (*PAIR, 1.0), {"text_bank": PAIR[0]}, "image_bank, text_bank"),
    (contrastive_loss, (*PAIR, 1.0), {"image_bank": PAIR[0], "text_bank": PAIR[1][:2]}, "text_bank"),
    (contrastive_loss, (*PAIR, 1.0), {"alpha": 1.5}, "alpha"),
    (contrastive_loss, (*PAIR, 1.0), {"image_ids": IDS[:2]}, "image_ids"),
    (contrastive_loss, (*PAIR, 1.0), {"image_ids": IDS.float()}, "image_ids"),
    (contrastive_loss, (*PAIR, 1.0), {"bank_ids": IDS}, "bank_ids"),
    (contrastive_loss, (*PAIR, 1.0), {"image_bank": PAIR[0], "text_bank": PAIR[1], "image_ids": IDS}, "bank_ids"),
    (matching_negatives, (torch.eye(3), torch.eye(2)), {}, "similarity_t2i"),
    (matching_negatives, (PAIR[0], PAIR[0].t()), {}, "similarity_i2t"),
    (matching_negatives, (torch.eye(1), torch.eye(1)), {}, "similarity_i2t"),
    (matching_negatives, (torch.eye(3), torch.eye(3)), {"image_ids": torch.zeros(3).long()}, "image_ids"),
    (matching_negatives, (torch.eye(3), torch.eye(3)), {"image_ids": IDS[:2]}, "image_ids"),
    (matching_loss, (torch.eye(3), torch.eye(2)), {}, "logits_positive"),
    (matching_loss, (torch.eye(2), torch.eye(3)), {}, "logits_negative"),
    (matching_loss, (torch.eye(2)[:0], torch.eye(2)[:0]), {}, "logits_positive"),
    (enhance_context, (torch.eye(3), torch.eye(4, 3)), {}, "text"),
    (enhance_context, (torch.eye(3), torch.eye(3)[:0]), {}, "text"),
    (enhance_context, (torch.eye(3), torch.eye(4)), {}, "text"),
    (enhance_context, (torch.eye(3), torch.eye(3)), {"to": "negatives"}, "to"),
    (enhance_context, (torch.eye(3), torch.eye(3)), {"scale": math.nan}, "scale"),
    (video_embedding, (torch.ones(3),), {}, "frames"),
    (video_embedding, (torch.ones(2, 0, 3),), {}, "frames"),
    (video_embedding, (torch.ones(2, 3, 4), torch.ones(2, 3)), {}, "mask"),
    (video_embedding, (torch.ones(2, 3, 4), torch.ones(2, 4).bool()), {}, "mask"),
]


@pytest.mark.parametrize(("function", "arguments", "options", "name"), BAD)
def test_bad_input_names_the_argument(function, arguments, options, name):
    with pytest.raises((ValueError, TypeError), match=rf"^{name}\b"):
        function(*arguments, **options)
