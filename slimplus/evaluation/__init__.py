"""Measurements of a model: perplexity, generated text, speed and memory."""
