"""What is asked: problems with verifiable answers, and the verifiers."""
