"""Training objectives and metrics for retrieval and question answering: what BLIP in transformers does not bring.

    retrieval.py    contrastive loss (ITC), hard negatives and matching loss (ITM), context enhancement, video as frames
    momentum.py     momentum encoder, momentum queue, features of all ranks
    vqa.py          answer-weighted language-model loss
    metrics.py      ranks and recall@k both ways, VQA accuracy

Plain torch: each takes the features or logits that a model has computed, of whatever architecture.
"""

from peft_kernels.objectives.metrics import Ranks, Recall, normalize_answer, recall_at_k, retrieval_ranks, vqa_accuracy
from peft_kernels.objectives.momentum import MomentumQueue, gather_features, momentum_copy, momentum_update
from peft_kernels.objectives.retrieval import (
    contrastive_loss,
    enhance_context,
    matching_loss,
    matching_negatives,
    video_embedding,
)
from peft_kernels.objectives.vqa import weighted_answer_loss

__all__ = [
    "MomentumQueue",
    "Ranks",
    "Recall",
    "contrastive_loss",
    "enhance_context",
    "gather_features",
    "matching_loss",
    "matching_negatives",
    "momentum_copy",
    "momentum_update",
    "normalize_answer",
    "recall_at_k",
    "retrieval_ranks",
    "video_embedding",
    "vqa_accuracy",
    "weighted_answer_loss",
]
