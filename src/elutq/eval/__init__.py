"""Measures of how good a model is, and of what quantization cost it."""

from elutq.eval.perplexity import Evaluation, Scores, evaluate, evaluate_all, mean_evaluation, score_all

__all__ = ["Evaluation", "Scores", "evaluate", "evaluate_all", "mean_evaluation", "score_all"]
