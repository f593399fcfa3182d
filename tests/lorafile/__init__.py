"""Tests of the LoRA file package."""
