"""A stand-in: a client is its own name."""

from __future__ import annotations


def client(service: str) -> str:
    return f"client of {service}"
