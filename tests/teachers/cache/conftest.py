"""Caches whose writers do not wait for the disk: processes are killed here, not the machine."""

import os

import pytest


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
