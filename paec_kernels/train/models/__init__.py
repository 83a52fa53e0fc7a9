"""Who answers: policies, from a tiny transformer to any causal language model."""
