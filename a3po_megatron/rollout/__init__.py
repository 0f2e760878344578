"""Rollouts: the engine that samples, and how a step's groups are collected."""
