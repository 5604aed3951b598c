"""The errors a user can cause by what they point the engine at; each message is one line."""


class ModelError(ValueError):
    """A model, device or dtype that cannot be used; the message names the path or value."""


class WeightsError(RuntimeError):
    """Weights that load but hold NaN or Inf; the message names the path and the tensors."""
