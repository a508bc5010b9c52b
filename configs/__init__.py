"""Configurations: each stage's file extends its parent's; see docs/configuration.md."""
