"""Measures of how good a model is, and of what quantization cost it."""

from elutq.eval.perplexity import Evaluation, evaluate, evaluate_all, mean_evaluation

__all__ = ["Evaluation", "evaluate", "evaluate_all", "mean_evaluation"]
