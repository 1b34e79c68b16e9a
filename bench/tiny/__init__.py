"""A small gpt-oss that was really trained, and the packs that it was trained and is evaluated on."""

PACKS = ("reasoning_style", "tool_agentic", "chat_if", "code")
"""In the order in which UNION takes its rows."""
CONTEXT = 1024
"""Tokens in a block, in training and in evaluation."""
