"""The learning rate over the steps of a run."""

import math
from collections.abc import Callable


def learning_rate_factor(schedule: str, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """Returns a function for LambdaLR, from the number of steps done to the factor of the learning rate in the next
    step.

    The factor rises linearly over the warm-up and reaches 1 in its last step. With "linear" and "cosine" it then falls
    to 0 at the end.
    """

    def factor(done: int) -> float:
        if done < warmup_steps:
            return (done + 1) / warmup_steps
        if schedule == "constant":
            return 1.0
        left = max(0.0, 1.0 - (done - warmup_steps) / max(1, total_steps - warmup_steps))
        return left if schedule == "linear" else 0.5 * (1.0 - math.cos(math.pi * left))

    return factor
