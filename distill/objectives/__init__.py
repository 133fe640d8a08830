"""What several methods share: plain functions on tensors."""
