"""Remedy for a run that ran out of memory: the command that resumes it."""

import shlex

from endwise.models.splicing import sequences_at_a_time
from endwise.training.joint import AnyTrainee


def command_in_less_memory(trainee: AnyTrainee, folder: str, context: int, *, shared: bool) -> str | None:
    """The command that resumes a run in less memory; None: its passes hold one sequence each already.

    Args:
        context: tokens per sequence.
        shared: the memory ran out in the clean pass, which holds all sequences of a pass at once.
    """
    training = trainee.config
    sequences = training.batch // training.accumulation
    rows = min(trainee.microbatch or sequences_at_a_time(context, trainee.device), sequences)
    if rows > 1 and trainee.objective.spliced_terms and not shared:
        change = f"training.microbatch={rows // 2}"
    elif sequences > 1:
        passes = range(training.accumulation + 1, training.batch + 1)
        change = f"training.accumulation={next(each for each in passes if training.batch % each == 0)}"
    else:
        return None
    return f"endwise train --resume {shlex.quote(folder)} {change}"
