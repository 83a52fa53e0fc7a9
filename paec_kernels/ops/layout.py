"""The table that a forward pass fills and a backward pass reads: one column a token position.

The first five rows are the public statistics; the rest is what the gradient needs beside the logits.
"""

LOGP = 0
ENTROPY = 1
NUCLEUS_ENTROPY = 2
MARGIN = 3
LSE = 4
TOP = 5  # f(z) of the row's largest logit, f being the softcap or the identity
LOG_TOTAL = 6  # lse - TOP / T: kept apart, since lse alone loses the digits in which logits near 5,000 differ
THRESHOLD = 7  # the smallest logit z in the nucleus, as it was given
TIE_WEIGHT = 8  # w = k / n of the tokens at the threshold
LOG_MASS = 9  # log of the nucleus' share of the probability

N_ROWS = 10
N_DIFFERENTIABLE = 3
