"""Metrics by name ([Note: drop-in parts] in utils/registry.py).

A metric is a module with ``label`` and one of

- ``score(said, references, prompt) -> float`` in [0, 1], higher is better: what the model said, the answers that count as right
  (the trained one first) and the last turn that was asked. It also takes ``options`` where the module has ``Options``.
- ``evaluate(...)`` and ``tokens_needed(...)``, for a metric that generates nothing (``choice``, ``bits_per_byte``).

``requires`` names the package that it needs, of the extra ``metrics``. All are computed example by example, and a task's score is
their mean.
"""
