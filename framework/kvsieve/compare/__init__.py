"""The harness: one YAML file compares policies on the same model and tasks."""
