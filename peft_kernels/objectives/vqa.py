"""The training objective of open-ended question answering: a decoder's loss for every answer, weighted.

    L = (1/Q) Σ_a w_a Σ_t −log p(token_at | tokens before it)        over all answers a of Q questions

Sources: docs/method.md, section 4; ALBEF (arXiv 2107.07651) and BLIP (arXiv 2201.12086), where w_a is the fraction of
the ten annotators who gave the answer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_kernels.autocast import autocast_off
from peft_kernels.checks import check_probability, check_shape, check_tensor


def _questions(answers: int, counts: int | Sequence[int] | Tensor) -> int:
    """How many questions there are, if the counts fit."""
    name = "answers_per_question"
    if isinstance(counts, int) and not isinstance(counts, bool):
        if counts < 1 or answers == 0 or answers % counts:
            raise ValueError(f"{name}: expected a divisor of the {answers} answers, got {counts}")
        return answers // counts
    if isinstance(counts, Tensor):
        check_tensor(name, counts, dtypes=(torch.int64, torch.int32))
        if counts.dim() != 1 or counts.numel() == 0:
            raise ValueError(f"{name}: expected one for each question, at least one, got shape {tuple(counts.shape)}")
        if counts.device.type != "cpu":  # reading them would wait for the device
            return counts.numel()
        counts = counts.tolist()
    if not isinstance(counts, Sequence) or not all(isinstance(n, int) and n >= 0 for n in counts):
        raise TypeError(f"{name}: expected an integer, or one ≥ 0 for each question, got {counts!r}")
    if len(counts) == 0 or sum(counts) != answers:
        raise ValueError(f"{name}: expected counts that add up to the {answers} answers, got {list(counts)}")
    return len(counts)


def weighted_answer_loss(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    answers_per_question: int | Sequence[int] | Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.1,
) -> Tensor:
    """Answer-weighted language-model loss. Differentiable in logits and weights.

    logits: (A, T, V) of the decoder, for all answers of all questions one after the other
    labels: (A, T) int64 tokens at the logits' own positions, as transformers takes them: the shift happens here, logits
        at t are for labels at t + 1. Padding (and whatever is given, not answered) is ignore_index
    weights: (A,), for instance the fraction of annotators who gave the answer
    answers_per_question: one number for all questions, or one for each, adding up to A; those of a tensor on a GPU are
        counted and not read
    label_smoothing: in [0, 1); BLIP's decoder trains with 0.1
    returns loss: () the weighted sum over tokens and answers, divided by the number of questions; in float32 (float64
        for float64)

    transformers' own BLIP loss is the mean over tokens, without weights. A long answer counts for more here.
    Raises ValueError or TypeError, naming the argument. Source: BLIP (arXiv 2201.12086).
    """
    check_tensor("logits", logits)
    if logits.dim() != 3 or logits.shape[1] < 2:
        raise ValueError(f"logits: expected shape (A, T, V) with T ≥ 2, got {tuple(logits.shape)}")
    answers, steps, vocabulary = logits.shape
    check_tensor("labels", labels, logits, dtypes=(torch.int64,))
    check_shape("labels", labels, (answers, steps), "(A, T)")
    check_tensor("weights", weights, logits)
    check_shape("weights", weights, (answers,), "(A,)")
    check_probability("label_smoothing", label_smoothing)
    questions = _questions(answers, answers_per_question)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    with autocast_off(logits):
        tokens = F.cross_entropy(  # two dimensions: the loss over more has no deterministic kernel on a GPU
            logits[:, :-1].reshape(-1, vocabulary).to(dtype),
            labels[:, 1:].reshape(-1),
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction="none",
        )
        return (tokens.view(answers, steps - 1).sum(dim=1) * weights.to(dtype)).sum() / questions
