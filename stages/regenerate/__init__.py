"""On-policy data: the assistant turns of conversations, said again by the target itself."""
