"""The metrics that Prometheus reads on a Ray cluster: names, units, and the numbers of the run behind them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

PREFIX = "ray_"
"""Ray puts it before every name; to that of a counter it adds `_total`. Tried with Ray 2.60."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One metric. All have the labels `run` and `algorithm`."""

    name: str
    source: str
    """A name in metrics.jsonl, where `*` stands for the value of `label`; or, after `@`, what else it is about."""
    text: str
    unit: str = ""
    kind: Literal["gauge", "counter"] = "gauge"
    label: str | None = None

    @property
    def exported(self) -> str:
        """What Prometheus calls it."""
        return f"{PREFIX}{self.name}{'_total' if self.kind == 'counter' else ''}"

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of its labels."""
        return "run", "algorithm", *(() if self.label is None else (self.label,))

    def values(self, row: Mapping[str, float]) -> dict[str, float]:
        """What a row has for it, by the value of its label; by "" where it has none of its own."""
        before, star, after = self.source.partition("*")
        if not star:
            return {"": row[self.source]} if self.source in row else {}
        return {
            name[len(before) : len(name) - len(after)]: value
            for name, value in row.items()
            if name.startswith(before) and name.endswith(after) and len(name) > len(self.source) - 1
        }


def _gauge(name: str, source: str, unit: str, text: str, label: str | None = None) -> Metric:
    return Metric(name=name, source=source, unit=unit, text=text, label=label)


def _counter(name: str, source: str, unit: str, text: str, label: str | None = None) -> Metric:
    return Metric(name=name, source=source, unit=unit, text=text, label=label, kind="counter")


METRICS = (
    _gauge("bascule_step", "step", "", "last step that is done"),
    _gauge("bascule_max_steps", "@max_steps", "", "steps of the whole run"),
    _gauge("bascule_last_step_timestamp_seconds", "@time", "s", "Unix time at which it was done"),
    _gauge("bascule_phase", "@phase", "0 or 1", "1 for the phase that the loop is in", "phase"),
    _gauge(
        "bascule_wait_seconds", "@wait", "s", "how long the driver has waited for actors; 0 when it does not"
    ),
    _counter("bascule_samples", "samples", "", "completions, or samples of a dataset"),
    _counter("bascule_tokens", "tokens", "tokens", "sampled tokens; of samples of a dataset loss tokens"),
    _gauge("bascule_tokens_per_second", "tokens_per_second", "tokens/s", "of the last step"),
    _gauge("bascule_step_seconds", "time/step", "s", "of the last step"),
    _gauge("bascule_phase_seconds", "time/*", "s", "of each phase of the last step, and of `step`", "phase"),
    _gauge("bascule_loss", "loss", "", "docs/algorithms.md; sft: nats per token"),
    _gauge("bascule_grad_norm", "grad_norm", "", "before clipping"),
    _gauge("bascule_learning_rate", "learning_rate", "", "applied"),
    _gauge("bascule_entropy", "entropy", "nats", "of the policy"),
    _gauge("bascule_kl", "kl", "nats", "of policy and reference"),
    _gauge("bascule_teacher_kl", "teacher_kl", "nats", "of policy and teacher"),
    _gauge("bascule_divergence", "divergence", "nats", "gkd: from the teacher"),
    _gauge("bascule_eval_accuracy", "eval/accuracy", "", "mean of the first reward on held-out prompts"),
    _gauge("bascule_eval_loss", "eval/loss", "nats", "sft: held-out loss per token"),
    _gauge("bascule_eval_divergence", "eval/divergence", "nats", "gkd: held-out divergence"),
    _gauge("bascule_eval_teacher_kl", "eval/teacher_kl", "nats", "held-out reverse KL to the teacher"),
    _gauge("bascule_reward", "reward", "reward", "mean over completions"),
    _gauge("bascule_reward_std", "reward_std", "reward", "mean deviation in a group"),
    _gauge("bascule_reward_function", "rewards/*/mean", "reward", "mean of one reward", "reward"),
    _gauge("bascule_reward_error_ratio", "rewards/*/error_ratio", "share", "calls that failed", "reward"),
    _gauge(
        "bascule_reward_timeout_ratio", "rewards/*/timeout_ratio", "share", "calls that were late", "reward"
    ),
    _gauge("bascule_reward_seconds_p99", "rewards/*/seconds_p99", "s", "of a call", "reward"),
    _gauge("bascule_zero_variance_ratio", "groups/zero_variance_ratio", "share", "groups without a signal"),
    _gauge("bascule_completion_tokens", "completions/mean_length", "tokens", "mean length of completions"),
    _gauge("bascule_completions_clipped_ratio", "completions/clipped_ratio", "share", "cut at the longest"),
    _gauge("bascule_completions_aborted_ratio", "completions/aborted_ratio", "share", "aborted"),
    _gauge("bascule_weight_version", "sync/version", "", "that engines have got last"),
    _gauge("bascule_weight_lag_mean", "sampling/staleness_mean", "versions", "between sampling and training"),
    _gauge("bascule_weight_lag_max", "sampling/staleness_max", "versions", "the largest of the step"),
    _gauge(
        "bascule_engine_mismatch_kl",
        "sampling/mismatch_kl",
        "nats",
        "KL(engine, trainer) of what was sampled",
    ),
    _counter("bascule_sync_bytes", "sync/bytes", "bytes", "that the bridge gave to engines"),
    _counter("bascule_sync_seconds", "sync/seconds", "s", "of weight syncs"),
    _gauge("bascule_sync_part_seconds", "sync/*_seconds", "s", "of a part of the last sync", "part"),
    _gauge("bascule_engines", "engines/up", "", "engines that sample"),
    _gauge("bascule_prompts_running", "engines/running", "prompts", "that engines work on as a step ends"),
    _gauge(
        "bascule_prompts_waiting", "engines/waiting", "prompts", "that no engine has had room for (the queue)"
    ),
    _gauge("bascule_engine_recoveries", "sync/recoveries", "", "engines that were replaced"),
    _gauge(
        "bascule_restarts", "@restart", "", "of trainers, engines, bridge, reward workers, by this command"
    ),
    _counter("bascule_events", "@event", "", "lines of events.jsonl", "kind"),
)
