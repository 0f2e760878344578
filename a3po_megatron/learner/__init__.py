"""The learner: log-probs across vocabulary shards, Megatron's schedules, the optimiser."""
