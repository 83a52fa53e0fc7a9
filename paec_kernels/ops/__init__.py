"""Token statistics: the operator from logits and from hidden states, its kernels and its torch path."""
