"""Numbers of a running server, as Prometheus reads them."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Of one server; those of answers by model."""

    def __init__(self) -> None:
        disable_created_metrics()
        self._registry = registry = CollectorRegistry()
        of_model = {"labelnames": ["model"], "registry": registry}
        self.responses = Counter("lfm_http_responses", "HTTP responses.", ["path", "status"], registry=registry)
        self.answers = Counter("lfm_answers", "Answers by how they ended.", ["model", "reason"], registry=registry)
        self.prompt_tokens = Counter("lfm_prompt_tokens", "Tokens of prompts.", **of_model)
        self.reused_tokens = Counter("lfm_reused_tokens", "Of them, those read for an earlier prompt.", **of_model)
        self.new_tokens = Counter("lfm_new_tokens", "Tokens made.", **of_model)
        self.running = Gauge("lfm_running", "Answers that have a slot and are being made.", **of_model)
        self.waiting = Gauge("lfm_waiting", "Answers that wait for a slot, or whose prompt is being read.", **of_model)
        self.state_bytes = Gauge("lfm_state_bytes", "Bytes of the states of all slots.", **of_model)
        self.kept_bytes = Gauge("lfm_kept_bytes", "Bytes of the states kept after prompts' pieces.", **of_model)
        self.first_token = Histogram(
            "lfm_first_token_seconds", "From a request to its first token.", buckets=_SECONDS, **of_model
        )
        self.step_seconds = Histogram(
            "lfm_step_seconds", "One token of all running answers, with what was read.", buckets=_SECONDS, **of_model
        )

    def text(self) -> bytes:
        return generate_latest(self._registry)
