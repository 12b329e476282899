"""Objectives of image-text retrieval: contrast (ITC), matching (ITM), context enhancement, and video as frames.

With unit embeddings v_b (images) and t_b (texts), candidates t'_j (the batch, then the bank) and temperature τ:

    ITC    p_bj = softmax_j(v_b · t'_j / τ)        L = −mean_b Σ_j y_bj log p_bj, averaged with the other direction
           hard y_bj = 1/n_b on the n_b candidates of the same image;  soft α softmax_j(v'_b · t'_j / τ) + (1 − α) hard
    ITM    for each image one wrong text, for each text one wrong image, drawn by softmax of their similarity;
           cross-entropy over {no match, match}, one positive to two negatives
    ICE    f_b + 0.1 · mean_b(t_b), f_b the fused [CLS] of a positive pair, t_b the text's own; in training only
    video  the mean of its frames' embeddings, normalised: an image from there on

Sources: docs/method.md, section 4; ALBEF (arXiv 2107.07651), BLIP (arXiv 2201.12086), Aurora (arXiv 2305.08381).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_kernels.autocast import autocast_off
from peft_kernels.checks import DTYPES, check_choice, check_scale, check_shape, check_tensor

ENHANCED = ("positives", "all")


def wide(dtype: torch.dtype) -> torch.dtype:
    """What similarities and losses are computed in: float64 for float64, else float32, autocast or not."""
    return torch.promote_types(dtype, torch.float32)


def check_rows(name: str, value: Tensor, like: Tensor | None = None, columns: int | None = None) -> None:
    check_tensor(name, value, like)
    if value.dim() != 2 or columns not in (None, value.shape[1]):
        raise ValueError(f"{name}: expected shape (rows, {columns or 'columns'}), got {tuple(value.shape)}")


def check_ids(name: str, ids: Tensor, rows: int, like: Tensor) -> None:
    check_tensor(name, ids, like, dtypes=(torch.int64,))
    check_shape(name, ids, (rows,), "one for each pair")


def _check_both(names: str, first: Tensor | None, second: Tensor | None, like: Tensor, rows: int | None = None) -> None:
    """Both None, or two (rows, d) tensors; any number of rows if None."""
    if (first is None) != (second is None):
        raise ValueError(f"{names}: expected both or neither, got one")
    if first is not None:
        for name, value in zip(names.split(", "), (first, second)):
            check_rows(name, value, like, like.shape[1])
            check_shape(name, value, (first.shape[0] if rows is None else rows, like.shape[1]), "that of the other")


def _check_temperature(temperature: float | Tensor, like: Tensor) -> None:
    if isinstance(temperature, Tensor):  # unlike a scale, it may be learned
        check_tensor("temperature", temperature, like)
        check_shape("temperature", temperature, (), "a 0-d Tensor")
        return
    check_scale(temperature, like, "temperature")
    if temperature <= 0:
        raise ValueError(f"temperature: expected a number > 0, got {temperature}")


def _positives(batch: int, image_ids: Tensor | None, bank_ids: Tensor | None, candidates: Tensor) -> Tensor:
    """(B, B + K): is candidate j of pair b's image?"""
    if image_ids is None:
        return torch.eye(batch, candidates.shape[0], dtype=torch.bool, device=candidates.device)
    all_ids = image_ids if bank_ids is None else torch.cat([image_ids, bank_ids])
    return image_ids[:, None] == all_ids


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    temperature: float | Tensor,
    *,
    momentum_image: Tensor | None = None,
    momentum_text: Tensor | None = None,
    alpha: float | Tensor = 0.4,
    image_bank: Tensor | None = None,
    text_bank: Tensor | None = None,
    image_ids: Tensor | None = None,
    bank_ids: Tensor | None = None,
) -> Tensor:
    """ITC: each image finds its text among all texts, each text its image. Differentiable in the first three.

    image, text: (B, d) embeddings of pairs, rows of length 1; under DDP possibly those of `gather_features`
    temperature: a number > 0 or a 0-d tensor. A learned one is the caller's to clamp (BLIP's to [0.001, 0.5])
    momentum_image, momentum_text: (B, d) of the same pairs by the momentum encoder. With them, they are the batch's
        candidates in place of image and text, and the source of soft targets; they get no gradient
    alpha: weight of the soft targets, in [0, 1]; unused without momentum features
    image_bank, text_bank: (K, d) further candidates, pair by pair: a queue's, or anything that is no positive
    image_ids: (B,) int64 ≥ 0, which image each pair has: captions of one image are all positives, in equal parts.
        None: every pair its own
    bank_ids: (K,) int64, likewise for the bank, required with image_ids; candidates with a negative id do not count
    returns loss: () the mean over pairs and both directions, in float32 (float64 for float64)

    Raises ValueError or TypeError, naming the argument. Sources: ALBEF (arXiv 2107.07651), BLIP (arXiv 2201.12086).
    """
    check_rows("image", image)
    batch, has_bank = image.shape[0], image_bank is not None
    if batch == 0:
        raise ValueError(f"image: expected at least one pair, got shape {tuple(image.shape)}")
    _check_both("image, text", image, text, image, batch)
    _check_both("momentum_image, momentum_text", momentum_image, momentum_text, image, batch)
    _check_both("image_bank, text_bank", image_bank, text_bank, image)
    _check_temperature(temperature, image)
    check_scale(alpha, image, "alpha")
    if not isinstance(alpha, Tensor) and not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected a number in [0, 1], got {alpha}")
    if image_ids is not None:
        check_ids("image_ids", image_ids, batch, image)
    if bank_ids is not None:
        check_ids("bank_ids", bank_ids, image_bank.shape[0] if has_bank else 0, image)
    elif has_bank and image_ids is not None:
        raise ValueError("bank_ids: expected with image_ids and a bank: an image of both would be its own negative")
    dtype = wide(image.dtype)
    with autocast_off(image):
        own = [t.to(dtype) for t in (image, text)]
        teachers = [None if t is None else t.detach().to(dtype) for t in (momentum_image, momentum_text)]
        candidates = [each if teacher is None else teacher for each, teacher in zip(own, teachers)]
        if has_bank:  # a copy: the queue may change before the backward, which needs these
            candidates = [torch.cat([each, bank.to(dtype)]) for each, bank in zip(candidates, (image_bank, text_bank))]
        positives, absent = _positives(batch, image_ids, bank_ids, candidates[0]), None
        if bank_ids is not None:
            absent = F.pad(bank_ids < 0, (batch, 0))
        hard = positives.to(dtype) / positives.sum(1, keepdim=True)
        losses = []
        for features, teacher, others in zip(own, teachers, reversed(candidates)):
            targets = hard
            if teacher is not None:
                with torch.no_grad():
                    soft = _logits(teacher, others, temperature, absent).softmax(1)
                    targets = alpha * soft + (1 - alpha) * hard
            losses.append(F.cross_entropy(_logits(features, others, temperature, absent), targets))
        return (losses[0] + losses[1]) / 2


def _logits(features: Tensor, others: Tensor, temperature: float | Tensor, absent: Tensor | None) -> Tensor:
    logits = features @ others.t() / temperature
    if absent is None:
        return logits
    return logits.masked_fill(absent, torch.finfo(logits.dtype).min / 2)  # not −inf, which times a target of 0 is NaN


@torch.no_grad()
def matching_negatives(
    similarity_i2t: Tensor,
    similarity_t2i: Tensor,
    image_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Hard negatives for `matching_loss`: a wrong text for each image, a wrong image for each text.

    similarity_i2t: (B, B), image b (row) with text j, divided by the temperature, as the loss has them
    similarity_t2i: (B, B), text b (row) with image j, likewise
    image_ids: (B,) int64, which image each pair has; pairs of the same image are not negatives of each other. To
        see that there are two images at all waits for the device; None (every pair its own image) does not
    generator: of the draws, on the similarities' device
    returns indices: (B,) of texts for the images, and (B,) of images for the texts; drawn by the softmax of the row
        over the pairs that are not excluded

    Raises ValueError or TypeError, naming the argument; ValueError if a row has nothing to draw from: one pair, or one
    image only. Source: ALBEF (arXiv 2107.07651).
    """
    check_rows("similarity_i2t", similarity_i2t)
    check_rows("similarity_t2i", similarity_t2i, similarity_i2t)
    batch = similarity_i2t.shape[0]
    for name, similarity in (("similarity_i2t", similarity_i2t), ("similarity_t2i", similarity_t2i)):
        check_shape(name, similarity, (batch, batch), "(B, B)")
    if batch < 2:
        raise ValueError(f"similarity_i2t: expected at least two pairs to have a negative, got shape {(batch, batch)}")
    same = torch.eye(batch, dtype=torch.bool, device=similarity_i2t.device)
    if image_ids is not None:
        check_ids("image_ids", image_ids, batch, similarity_i2t)
        same = image_ids[:, None] == image_ids
        if same.all():
            raise ValueError(f"image_ids: all {batch} pairs are of one image, none has a negative")
    return _draw(similarity_i2t, same, generator), _draw(similarity_t2i, same, generator)


def _draw(similarity: Tensor, excluded: Tensor, generator: torch.Generator | None) -> Tensor:
    """One index a row by softmax: the largest after Gumbel noise. (multinomial refuses what underflows to 0.)"""
    logits = similarity.to(wide(similarity.dtype))
    noise = torch.empty_like(logits, memory_format=torch.contiguous_format).exponential_(generator=generator)
    return (logits - noise.log()).masked_fill(excluded, -torch.inf).argmax(dim=1)


def matching_loss(logits_positive: Tensor, logits_negative: Tensor) -> Tensor:
    """ITM: cross-entropy of the matching head's two classes, 0 for no match and 1 for a match. Differentiable.

    logits_positive: (B, 2) of pairs that match;  logits_negative: (N, 2) of others: usually N = 2B, each image with a
        wrong text and each text with a wrong image from `matching_negatives`
    returns loss: () the mean over all B + N pairs, in float32 (float64 for float64)
    Raises ValueError or TypeError, naming the argument. Sources: ALBEF (arXiv 2107.07651), BLIP (arXiv 2201.12086).
    """
    check_rows("logits_positive", logits_positive, columns=2)
    check_rows("logits_negative", logits_negative, logits_positive, columns=2)
    counts = [logits_positive.shape[0], logits_negative.shape[0]]
    if sum(counts) == 0:
        raise ValueError("logits_positive, logits_negative: expected at least one pair, got none")
    with autocast_off(logits_positive):
        logits = torch.cat([each.to(wide(each.dtype)) for each in (logits_positive, logits_negative)])
        labels = torch.ones(sum(counts), dtype=torch.int64, device=logits.device)
        labels[counts[0] :] = 0
        return F.cross_entropy(logits, labels)


def enhance_context(
    fused: Tensor, text: Tensor, scale: float | Tensor = 0.1, training: bool = True, to: str = "positives"
) -> Tensor:
    """Informative context enhancement: fused features move by scale · mean(text), in training. Differentiable.

    fused: (N, d) [CLS] features of the fusion encoder, the B positive pairs' first, then negatives' if any
    text: (B, d) [CLS] features of the positive pairs' texts, from the text encoder alone
    scale: a number, or a 0-d tensor without gradient
    training: False returns `fused` itself
    to: "positives" (published): rows 0 to B − 1 | "all": every row
    returns enhanced: (N, d), of fused's dtype

    As published, every positive gets the same shift and no negative does, so labels can leak: the matching head can
    learn the shift in place of the match, and finds none in evaluation. With "all" the shift says nothing of the label.
    Raises ValueError or TypeError, naming the argument. Source: Aurora (arXiv 2305.08381).
    """
    check_choice("to", to, ENHANCED)
    check_rows("fused", fused)
    check_rows("text", text, fused, fused.shape[1])
    check_scale(scale, fused)
    positives = text.shape[0]
    if positives > fused.shape[0] or (positives == 0 and fused.shape[0] > 0):
        raise ValueError(f"text: expected 1 to {fused.shape[0]} rows, as fused, got shape {tuple(text.shape)}")
    if not training or positives == 0:
        return fused
    shift = (scale * text.mean(dim=0, dtype=wide(text.dtype))).to(fused.dtype)
    if to == "all" or positives == fused.shape[0]:
        return fused + shift
    return torch.cat([fused[:positives] + shift, fused[positives:]])


def video_embedding(frames: Tensor, mask: Tensor | None = None) -> Tensor:
    """A video as the normalised mean of its frames: compare and train it as an image. Differentiable.

    frames: (..., F, d) embeddings, after the projection and before normalisation (BLIP's order)
    mask: (..., F) bool, True for frames that exist; what the others hold, NaN included, has no effect
    returns embedding: (..., d) rows of length 1, in float32 (float64 for float64); zeros for a video without frames
    Raises ValueError or TypeError, naming the argument. Source: BLIP (arXiv 2201.12086), text-to-video retrieval.
    """
    check_tensor("frames", frames, dtypes=DTYPES)
    if frames.dim() < 2 or frames.shape[-2] == 0:
        raise ValueError(f"frames: expected shape (..., F, d) with F ≥ 1, got {tuple(frames.shape)}")
    frames = frames.to(wide(frames.dtype))
    if mask is not None:
        check_tensor("mask", mask, frames, dtypes=(torch.bool,))
        check_shape("mask", mask, tuple(frames.shape[:-1]), "(..., F)")
        frames = frames.masked_fill(~mask[..., None], 0)
    return F.normalize(frames.sum(dim=-2), dim=-1)  # the length of the mean does not matter, only its direction
