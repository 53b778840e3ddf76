"""Finetuning of quantized models: block reconstruction and end-to-end tuning."""
