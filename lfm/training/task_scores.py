"""Tasks of lm-evaluation-harness between two steps, by the code of `lfm eval`."""

import math
from typing import Any

from lfm.talk import say
from lfm.training.local_engine import LocalEngine
from lfm.training.run import RunConfig
from lfm.training.state import TrainState


def score_tasks(run: RunConfig, state: TrainState) -> dict[str, Any]:
    """The record of metrics.jsonl: `tasks` is task or group -> metric -> value, those that are finite."""
    engine, tasks, e = state.engine, state.data.tasks, run.evaluation
    assert tasks is not None and isinstance(engine, LocalEngine), "see RunConfig"
    engine.model.eval()
    with engine.evaluating(engine.evaluation_mode):
        found = tasks.evaluate(
            engine.model, state.data.tokenizer, batch_size=e.batch_size, limit=e.limit, num_fewshot=e.num_fewshot
        )
    scores = {
        name: {metric: value for metric, value in result.metrics.items() if math.isfinite(value)}
        for name, result in found.items()
    }
    shown = "; ".join(
        f"{name} " + ", ".join(f"{metric} {value:.4g}" for metric, value in of.items()) for name, of in scores.items()
    )
    say(f"step {state.progress.step}: {shown}")
    return {"step": state.progress.step, "tokens": state.progress.tokens, "tasks": scores}
