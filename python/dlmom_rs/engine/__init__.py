"""The model layer: frozen causal LMs behind lanes, driven by the Rust loop.

Everything here holds bytes (weights, keys and values, logits) behind ids; every decision is Rust's.
Importing this package costs nothing: torch and transformers come in with its modules.
"""
