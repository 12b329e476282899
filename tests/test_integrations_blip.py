"""BLIP's cross-attention leaves out what its mask leaves out, as the loop over questions without padding does."""

import copy

import adapter_models
import pytest
import torch
from torch import nn

from peft_kernels import Aurora, AuroraConfig
from peft_kernels.integrations.blip import _hand_on, hand_on_encoder_masks


def answering():
    """(model, questions): two questions, the second one shorter by three tokens of padding."""
    torch.manual_seed(0)
    model, batch = adapter_models.blip_vqa()
    for name, parameter in model.named_parameters():
        if "crossattention" in name:  # so that what is read matters
            nn.init.normal_(parameter, std=0.3)
    ids, mask = batch["input_ids"][:2], torch.ones(2, adapter_models.TEXT, dtype=torch.long)
    mask[1, 4:] = 0
    return model.eval(), {"input_ids": ids, "attention_mask": mask, "pixel_values": batch["pixel_values"][:2]}


def logits(model, questions):
    """Of the first three tokens of every answer."""
    answers = torch.tensor([[1, 7, 9]]).expand(len(questions["input_ids"]), -1)
    seen = model.vision_model(pixel_values=questions["pixel_values"]).last_hidden_state
    mask = questions["attention_mask"]
    states = model.text_encoder(
        input_ids=questions["input_ids"],
        attention_mask=mask,
        encoder_hidden_states=seen,
        encoder_attention_mask=mask.new_ones(seen.shape[:2]),
    ).last_hidden_state
    return model.text_decoder(
        input_ids=answers, encoder_hidden_states=states, encoder_attention_mask=mask, use_cache=False
    ).logits


def one_by_one(model, questions):
    """Each question alone, without padding."""
    lengths = questions["attention_mask"].sum(1).tolist()
    rows = []
    for row, length in enumerate(lengths):
        own = {name: tensor[row : row + 1] for name, tensor in questions.items()}
        own |= {name: own[name][:, :length] for name in ("input_ids", "attention_mask")}
        rows.append(logits(model, own))
    return torch.cat(rows)


@torch.no_grad()
def test_answers_do_not_depend_on_padding():
    model, questions = answering()
    wanted = one_by_one(model, questions)
    assert not torch.allclose(logits(model, questions), wanted, atol=1e-3), "transformers has mended it: drop the hooks"
    hand_on_encoder_masks(model)
    torch.testing.assert_close(logits(model, questions), wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_generated_answers_do_not_depend_on_padding():
    model, _ = answering()
    hand_on_encoder_masks(model)

    def written(states, mask):
        begin = torch.ones(len(states), 1, dtype=torch.long)
        made = model.text_decoder.generate(
            input_ids=begin,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            max_new_tokens=4,
            num_beams=2,
            output_scores=True,
            return_dict_in_generate=True,
        )
        return made.sequences, made.sequences_scores

    states, mask = torch.randn(1, 7, 16), torch.tensor([[1, 1, 1, 1, 0, 0, 0]])
    ids, scores = written(states, mask)
    alone_ids, alone_scores = written(states[:, :4], mask[:, :4])
    assert torch.equal(ids, alone_ids)
    torch.testing.assert_close(scores, alone_scores)


@torch.no_grad()
def test_once_is_enough_and_copies_keep_it():
    model, questions = answering()
    Aurora.wrap(model, AuroraConfig(preset="blip-vqa", rank=2, gates="additive"))
    hand_on_encoder_masks(model)
    hand_on_encoder_masks(model)
    attention = model.text_decoder.bert.encoder.layer[0].crossattention.self
    assert list(attention._forward_pre_hooks.values()).count(_hand_on) == 1
    copied = copy.deepcopy(model)
    torch.testing.assert_close(logits(copied, questions), one_by_one(copied, questions), rtol=1e-4, atol=1e-5)


def test_a_model_without_cross_attention_is_refused():
    with pytest.raises(ValueError, match="model: expected a BLIP with cross-attention, found none"):
        hand_on_encoder_masks(nn.Linear(2, 2))
