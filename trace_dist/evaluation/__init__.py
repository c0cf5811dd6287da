"""Scores: of generated answers by any metric, label log-likelihood, bits per byte; on one process or on all ranks."""

from trace_dist.evaluation.choice import choice_accuracy
from trace_dist.evaluation.decode import greedy_decode
from trace_dist.evaluation.evaluate import evaluate_task
from trace_dist.evaluation.likelihood import log_likelihoods
from trace_dist.evaluation.match import exact_match, score_generated
from trace_dist.evaluation.score import Score
from trace_dist.evaluation.text import answer_bits_per_byte, bits_per_byte

__all__ = [
    "Score",
    "answer_bits_per_byte",
    "bits_per_byte",
    "choice_accuracy",
    "evaluate_task",
    "exact_match",
    "greedy_decode",
    "log_likelihoods",
    "score_generated",
]
